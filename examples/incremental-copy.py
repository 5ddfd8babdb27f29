#!/usr/bin/python3
"""Updates a copy of an older snapshot to a newer one, reading only what may have changed.

    incremental-copy.py URI OLDER COPY

URI is the newer export. COPY is a raw image of the snapshot OLDER, and is updated in place.
OLDER is the name of a parent of the newer snapshot, or of another export of the same server.
Requires python3-libnbd. For example:

    nbdcopy nbd://localhost/monday.hexz disk.img
    incremental-copy.py nbd://localhost/tuesday.hexz monday.hexz disk.img
"""

import sys

import nbd

# Maximum lengths of block status requests and reads, in bytes.
STATUS_PIECE = 1 << 30
READ_PIECE = 1 << 22


def changed_extents(handle, context):
    """Yields (offset, length) of each extent that may differ."""
    size, at = handle.get_size(), 0
    while at < size:
        runs = []

        def extents(name, offset, entries, error):
            if name == context:
                runs.extend(zip(entries[::2], entries[1::2]))

        handle.block_status(min(STATUS_PIECE, size - at), at, extents)
        if not runs:
            raise SystemExit("the server says nothing of what lies at byte %d" % at)
        for length, flags in runs:
            length = min(length, size - at)
            if flags & 1:
                yield at, length
            at += length


def main(uri, older, copy):
    context = "hexz:changed:" + older
    handle = nbd.NBD()
    handle.set_uri_allow_local_file(True)
    handle.add_meta_context(context)
    handle.connect_uri(uri)
    if not handle.can_meta_context(context):
        raise SystemExit("the server can't compare with %s" % older)

    copied = 0
    with open(copy, "r+b") as image:
        for offset, length in changed_extents(handle, context):
            for at in range(offset, offset + length, READ_PIECE):
                image.seek(at)
                image.write(handle.pread(min(READ_PIECE, offset + length - at), at))
            copied += length
        image.truncate(handle.get_size())
    print("%d of %d bytes read" % (copied, handle.get_size()))
    handle.shutdown()


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
