#!/usr/bin/python3
"""Machines that read random parts of their disks, and compare them with an image, until this is
terminated.

    reader.py SOCKET IMAGE MACHINES

The disk of a machine is the export with its number. Prints one JSON object: reads, errors, wrong
reads, and the gaps between the ends of a machine's reads that were longer than LONG.
"""

import json
import random
import signal
import sys
import threading
import time

import nbd

SIZE = 64 * 1024
LONG = 0.1
PAUSE = 0.005

is_ending = threading.Event()


class Machine(threading.Thread):
    """A thread with a connection."""

    def __init__(self, socket, number, content):
        super().__init__()
        self.content, self.numbers = content, random.Random(number)
        self.reads = self.wrong = 0
        self.errors, self.gaps = [], []
        self.handle = nbd.NBD()
        self.handle.set_export_name(str(number))
        self.handle.connect_unix(socket)

    def run(self):
        last = time.monotonic()
        while not is_ending.is_set():
            offset = self.numbers.randrange(len(self.content) // SIZE) * SIZE
            try:
                data = self.handle.pread(SIZE, offset)
            except nbd.Error as error:
                self.errors.append(str(error))
                if not self.handle.aio_is_ready():
                    return
            else:
                self.wrong += data != self.content[offset : offset + SIZE]
            now = time.monotonic()
            self.reads += 1
            if now - last > LONG:
                self.gaps.append((last, now - last))
            last = now
            time.sleep(PAUSE)


def main():
    socket, image, count = sys.argv[1:]
    signal.signal(signal.SIGTERM, lambda *_: is_ending.set())
    with open(image, "rb") as file:
        content = file.read()
    machines = [Machine(socket, number, content) for number in range(int(count))]
    for machine in machines:
        machine.start()
    print("connected", file=sys.stderr, flush=True)
    for machine in machines:
        while machine.is_alive():
            # A signal is handled between two waits.
            machine.join(0.2)
    found = {
        "reads": sum(machine.reads for machine in machines),
        "wrong": sum(machine.wrong for machine in machines),
        "errors": [error for machine in machines for error in machine.errors[:5]],
        "gaps": sorted(gap for machine in machines for gap in machine.gaps),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
