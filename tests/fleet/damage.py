"""A disk cache whose files are damaged after kill -9, while clients read.

The same at the level of the library, a thousand times: the test
`after_a_thousand_crashes_no_byte_is_wrong_and_no_read_fails` of the package object-reader.
"""

import json
import random
import shutil
import signal
import subprocess
import sys
import time

from rig import EXPORT, GATEWAYS, ROOT, Process, expect, wait_for, within

ROUNDS = 50
# Smaller than the archive, so that chunks are evicted and slots reused.
OPTIONS = ("--cache-size", "32MiB", "--disk-cache-size", "64MiB", "--disk-cache")
FILES = ("slots", "chunks", "objects")
BLOCK = 512


def damage(numbers, cache, old):
    """Damages some places of the files. Returns what was done."""
    done = []
    for _ in range(numbers.randrange(1, 8)):
        path = cache / numbers.choice(FILES)
        length = path.stat().st_size
        kind = numbers.choice(["flip", "flip", "flip", "truncate", "stale", "stale", "zero"])
        done.append(f"{kind} {path.name}")
        if length == 0:
            continue
        place = numbers.randrange(length)
        with open(path, "r+b") as file:
            if kind == "truncate":
                file.truncate(place)
                continue
            if kind == "flip":
                # Many, so that some are where something is.
                for _ in range(200):
                    file.seek(numbers.randrange(length))
                    byte = file.read(1)[0]
                    file.seek(-1, 1)
                    file.write(bytes([byte ^ 1 << numbers.randrange(8)]))
                continue
            # Blocks of an earlier time, or that were never written.
            start = place // BLOCK * BLOCK
            size = min(numbers.randrange(1, 4000) * BLOCK, length - start)
            file.seek(start)
            if kind == "zero":
                file.write(bytes(size))
            else:
                with open(old / path.name, "rb") as source:
                    source.seek(start)
                    file.write(source.read(size))
    return done


def check(rig):
    rig.start_store()
    name, cache, old = GATEWAYS[0], rig.folder / "damaged", rig.folder / "old"
    numbers = random.Random(11)
    uri = rig.uri(f"{name}.example.org")
    reads = 0
    counts = dict.fromkeys(("hits", "misses", "bad", "evicted"), 0)
    kinds = {}

    def start():
        gateway = rig.gateway(name, *OPTIONS, cache, is_proxied=False)
        gateway.wait_until_ready()
        return gateway

    def start_reader(seed, count):
        command = [sys.executable, ROOT / "tests/fleet/scattered.py", uri, rig.image, seed, count]
        log = rig.folder / f"scattered-{seed}.log"
        log.write_text("")
        reader = Process(within("client", command), log, stdout=subprocess.PIPE)
        return rig.start(reader)

    gateway = start()
    for number in range(ROUNDS):
        # Killed while it fetches and writes.
        reader = start_reader(2 * number, 1_000_000)
        reader.wait_until("reader", lambda: "connected" in reader.text())
        time.sleep(numbers.uniform(0.05, 0.5))
        # A copy of a running cache, whose parts are of different times.
        shutil.rmtree(old, ignore_errors=True)
        shutil.copytree(cache, old)
        time.sleep(numbers.uniform(0.05, 0.5))
        gateway.end(signal.SIGKILL)
        reader.stop()
        done = damage(numbers, cache, old)
        for kind in done:
            kinds[kind] = kinds.get(kind, 0) + 1
        gateway = start()
        reader = start_reader(2 * number + 1, 300)
        output, _ = reader.process.communicate(timeout=120)
        expect(reader.process.returncode == 0, f"after {done}: {reader.text()}")
        found = json.loads(output)
        expect(not found["errors"], f"after {done}: {found['errors']}")
        expect(found["wrong"] == 0, f"after {done}: {found['wrong']} wrong reads")
        reads += found["reads"]
        expect(gateway.metric("hexz_nbd_disk_cache_off") == 0, f"off after {done}")
        for count in counts:
            counts[count] += gateway.metric(f"hexz_nbd_disk_cache_{count}_total")
    wait_for("an end", lambda: gateway.end(signal.SIGTERM) == 0)
    expect(counts["bad"] > 0 and counts["hits"] > 0, f"nothing was damaged: {counts}")
    rig.stop()
    kinds = sum(kinds.values())
    text = f"{reads} reads of {EXPORT} right, 0 errors; chunks: {counts['hits']:.0f} hits, "
    text += f"{counts['misses']:.0f} misses, {counts['bad']:.0f} of them damaged"
    what = f"disk cache killed under load and damaged in {kinds} places, {ROUNDS} rounds"
    yield what, text, "no wrong byte, no failed read", True
