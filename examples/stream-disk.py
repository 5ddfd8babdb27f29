#!/usr/bin/python3
"""Copies the backing file of a running machine's disk into its overlay, and then detaches it.

    stream-disk.py SOCKET NODE

SOCKET is the QMP socket of qemu or qemu-storage-daemon, and NODE the node name of the overlay. The
machine runs meanwhile. If this is interrupted, run it again: what has been copied stays.
"""

import json
import socket
import sys
import time


class Monitor:
    """A connection to a QMP socket."""

    def __init__(self, path):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(path)
        self.stream = connection.makefile("rw")
        self.failure = None
        self.receive()
        self.execute("qmp_capabilities")

    def receive(self):
        line = self.stream.readline()
        if not line:
            raise SystemExit("the machine has closed the socket")
        message = json.loads(line)
        if message.get("event") == "BLOCK_JOB_COMPLETED":
            self.failure = message["data"].get("error")
        return message

    def execute(self, command, **arguments):
        """Returns the result of a command."""
        json.dump({"execute": command, "arguments": arguments}, self.stream)
        self.stream.flush()
        while True:
            message = self.receive()
            if "error" in message:
                raise SystemExit("%s: %s" % (command, message["error"]["desc"]))
            if "return" in message:
                return message["return"]


def main(path, node):
    monitor = Monitor(path)
    name = "stream-" + node
    monitor.execute("block-stream", **{"job-id": name, "device": node})
    while True:
        jobs = [job for job in monitor.execute("query-block-jobs") if job["device"] == name]
        if not jobs:
            break
        done, total = jobs[0]["offset"], jobs[0]["len"]
        print("%d of %d MiB" % (done >> 20, total >> 20), flush=True)
        time.sleep(1)
    if monitor.failure:
        raise SystemExit("not all was copied: %s" % monitor.failure)
    print("complete: the disk no longer needs the server")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
