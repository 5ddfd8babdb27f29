#!/usr/bin/python3
"""Updates a copy of an older snapshot to a newer one, reading only what may have changed.

    incremental-copy.py URI OLDER COPY

URI is the newer export. COPY is a copy of the snapshot OLDER, and is updated in place: a raw image,
or the NBD URI of a disk of that size that can be written to, such as a qcow2 image that qemu-nbd
serves. OLDER is the name of a parent of the newer snapshot, or of another export of the same
server. Requires python3-libnbd. For example:

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


class ImageCopy:
    """A copy in a raw image."""

    def __init__(self, path, size):
        self.size = size
        self.image = open(path, "r+b")

    def write(self, data, offset):
        self.image.seek(offset)
        self.image.write(data)

    def finish(self):
        self.image.truncate(self.size)
        self.image.close()


class ExportCopy:
    """A copy that is the export of another server."""

    def __init__(self, uri, size):
        self.handle = nbd.NBD()
        self.handle.set_uri_allow_local_file(True)
        self.handle.connect_uri(uri)
        if self.handle.get_size() != size:
            raise SystemExit("the copy has another size than the snapshot")

    def write(self, data, offset):
        self.handle.pwrite(data, offset)

    def finish(self):
        if self.handle.can_flush():
            self.handle.flush()
        self.handle.shutdown()


def main(uri, older, copy):
    context = "hexz:changed:" + older
    handle = nbd.NBD()
    handle.set_uri_allow_local_file(True)
    handle.add_meta_context(context)
    handle.connect_uri(uri)
    if not handle.can_meta_context(context):
        raise SystemExit("the server can't compare with %s" % older)

    size, copied = handle.get_size(), 0
    is_uri = copy.startswith(("nbd://", "nbds://", "nbd+unix:", "nbds+unix:"))
    target = ExportCopy(copy, size) if is_uri else ImageCopy(copy, size)
    for offset, length in changed_extents(handle, context):
        for at in range(offset, offset + length, READ_PIECE):
            target.write(handle.pread(min(READ_PIECE, offset + length - at), at), at)
        copied += length
    target.finish()
    print("%d of %d bytes read" % (copied, size))
    handle.shutdown()


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
