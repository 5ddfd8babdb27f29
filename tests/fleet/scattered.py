#!/usr/bin/python3
"""Reads parts of an export in random order, and compares them with an image.

    scattered.py URI IMAGE SEED COUNT

Prints one JSON object: reads, errors, and wrong reads.
"""

import json
import random
import sys

import nbd

SIZES = (4096, 65536, 1 << 20)


def main():
    uri, image, seed, count = sys.argv[1:]
    with open(image, "rb") as file:
        content = file.read()
    numbers = random.Random(int(seed))
    handle = nbd.NBD()
    handle.set_uri_allow_local_file(True)
    handle.connect_uri(uri)
    print("connected", file=sys.stderr, flush=True)
    wrong, errors = 0, []
    for _ in range(int(count)):
        size = numbers.choice(SIZES)
        offset = numbers.randrange(len(content) // size) * size
        try:
            wrong += handle.pread(size, offset) != content[offset : offset + size]
        except nbd.Error as error:
            errors.append(str(error))
            if not handle.aio_is_ready():
                break
    print(json.dumps({"reads": int(count), "errors": errors[:5], "wrong": wrong}))


if __name__ == "__main__":
    main()
