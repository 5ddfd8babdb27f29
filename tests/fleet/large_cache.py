"""Start and memory of a gateway with a large disk cache, empty and full."""

import os
import random
import struct
import subprocess
import zlib

from rig import GATEWAYS, expect, find, mib, run, within

SIZE = 100 << 30
SLOT = 256 * 1024
# The file system that it is in, as a sparse file.
DISK = 110 << 30
CACHE_SIZE = 256 << 20
# `hexz-nbd --help`: "The program needs up to 64 MiB more for itself and its connections".
MOST_MEMORY = CACHE_SIZE + (64 << 20)
MOST_SECONDS = 1


def fill(slots):
    """Writes an entry into each free slot, of an object that isn't there: the layout is that of
    crates/object-reader/src/disk_cache/format.rs."""
    count = SIZE // SLOT
    numbers = random.Random(3)
    with open(slots, "r+b") as file:
        head = file.read(4096)
        magic, version, slots_in_head = struct.unpack_from("<8sII", head)
        expect((magic, version, slots_in_head) == (b"objcache", 1, count), "another format")
        nonce = head[16:32]
        entries = bytearray(file.read(count * 64))
        for slot in range(count):
            if any(entries[slot * 64 : slot * 64 + 64]):
                continue
            # As many objects as machines may have images.
            name = numbers.randrange(100).to_bytes(16, "little")
            fields = struct.pack("<16sII", name, slot, SLOT)
            fields += numbers.randbytes(16) + struct.pack("<II", numbers.randrange(1 << 30), 0)
            crc = zlib.crc32(nonce + struct.pack("<I", slot) + fields)
            entries[slot * 64 : slot * 64 + 52] = fields + struct.pack("<I", crc)
        file.seek(4096)
        file.write(entries)


def check(rig):
    disk, folder = rig.folder / "disk.img", rig.folder / "large"
    folder.mkdir()
    with open(disk, "wb") as file:
        file.truncate(DISK)
    run(find("mkfs.ext4"), "-q", "-F", disk)
    run("mount", "-o", "loop", disk, folder)
    try:
        yield from starts(rig, folder / "cache", disk)
    finally:
        rig.stop()
        run("umount", folder)
        disk.unlink()


def starts(rig, cache, disk):
    rig.start_store()
    name = GATEWAYS[0]
    read = within("client", ["nbdcopy", rig.uri(f"{name}.example.org"), "null:"])

    def started(what):
        """Starts, reads the image, and stops."""
        gateway = rig.gateway(
            name,
            *["--cache-size", CACHE_SIZE, "--disk-cache", cache, "--disk-cache-size", SIZE],
            is_proxied=False,
        )
        seconds = gateway.wait_until_ready()
        capacity = gateway.metric("hexz_nbd_disk_cache_capacity_bytes")
        expect(capacity == SIZE, f"{mib(capacity)} instead of {mib(SIZE)}: {gateway.text()}")
        at_start = gateway.resident()
        subprocess.run(read, check=True, capture_output=True)
        used = gateway.metric("hexz_nbd_disk_cache_bytes")
        peak = gateway.resident("VmHWM")
        expect(gateway.end(15) == 0, gateway.text()[-2000:])
        text = f"ready after {seconds:.2f} s; {mib(at_start)} then, at most {mib(peak)} while the "
        text += f"image is read; {used / SIZE:.1%} of the cache in use"
        bound = f"{MOST_SECONDS} s, {mib(MOST_MEMORY)}"
        return what, text, bound, seconds <= MOST_SECONDS and peak <= MOST_MEMORY

    yield started("disk cache of 100 GiB, created")
    yield started("started again, nearly empty")
    fill(cache / "slots")
    # As after the start of a machine: nothing of the disk is in memory.
    run("umount", cache.parent)
    with open(disk, "rb") as file:
        os.fsync(file)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    run("mount", "-o", "loop", disk, cache.parent)
    yield started("started with all slots in use, after a restart of the machine")
    blocks = disk.stat().st_blocks * 512
    expect(blocks < DISK // 10, f"the file isn't sparse: {mib(blocks)}")
