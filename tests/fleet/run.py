#!/usr/bin/python3
"""Measures a fleet: gateways in network namespaces, between nginx as the store and real clients.

    tests/fleet/run.py [--help]

Prints a table in Markdown, and fails if a bound isn't met. As root: it makes namespaces, which end
with it. It uses Debian's Python, which has libnbd's module.
"""

import argparse
import importlib
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
CASES = {
    "downloads": "bytes from the store: 3 gateways, 30 clients, with and without a second level",
    "restarts": "gateways that are killed and restarted under qemu",
    "large_cache": "start and memory with a disk cache of 100 GiB",
    "container": "a container without privileges",
    "damage": "a disk cache whose files are damaged after kill -9",
}
IMAGE, ZEROS = 256 << 20, 64 << 20
INSIDE = "HEXZ_NBD_FLEET_INSIDE"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--program", type=pathlib.Path, default=ROOT / "target/release/hexz-nbd")
    parser.add_argument("--packer", type=pathlib.Path, default=ROOT / "target/release/hexz-peer")
    help_folder = "folder of the image and the archive, which are created if they are missing"
    parser.add_argument(
        "--folder", type=pathlib.Path, default=ROOT / "target/fleet", help=help_folder
    )
    parser.add_argument(
        "--seccomp",
        type=pathlib.Path,
        default=pathlib.Path("/usr/share/containers/seccomp.json"),
        help="profile for the container, as Podman and CRI-O have it; unused if it is missing",
    )
    parser.add_argument("--output", type=pathlib.Path, help="write the table to this file, too")
    names = "".join(f"\n  {name}: {what}" for name, what in CASES.items())
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"only these:{names}")
    options = parser.parse_args()
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"unknown cases: {', '.join(unknown)}; there are {', '.join(CASES)}")
    return options


def make_image(path):
    """Writes an image with the first files of /usr, by name, and zeros in the middle."""
    with open(path, "wb") as image:
        for file in sorted(pathlib.Path("/usr").rglob("*")):
            if file.is_file() and not file.is_symlink():
                image.write(file.read_bytes()[: IMAGE - image.tell()])
                image.write(bytes(-image.tell() % 4096))
            if image.tell() >= IMAGE:
                break
    if path.stat().st_size < IMAGE:
        sys.exit(f"there are not enough files in /usr: {path.stat().st_size} bytes")
    with open(path, "r+b") as image:
        image.truncate(IMAGE + ZEROS)
        # Something after the zeros.
        image.seek(IMAGE + ZEROS - (1 << 20))
        image.write(random.Random(1).randbytes(1 << 20))


def prepare(options):
    """Returns the image and the archive."""
    options.folder.mkdir(parents=True, exist_ok=True)
    image, archive = options.folder / "image.raw", options.folder / "image.hxz"
    if not image.exists():
        print("making the image", file=sys.stderr)
        unfinished = image.with_suffix(".unfinished")
        make_image(unfinished)
        unfinished.rename(image)
        archive.unlink(missing_ok=True)
    if not archive.exists():
        unfinished = archive.with_suffix(".unfinished")
        subprocess.run([options.packer, "pack", image, unfinished], check=True)
        unfinished.rename(archive)
    return image.resolve(), archive.resolve()


def main():
    options = arguments()
    if os.geteuid() != 0:
        sys.exit("run it as root: it makes network namespaces")
    if os.environ.get(INSIDE) != "1":
        prepare(options)
        command = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child"]
        command += ["--mount-proc", sys.executable, __file__, *sys.argv[1:]]
        os.execvpe(command[0], command, os.environ | {INSIDE: "1"})
    image, archive = prepare(options)
    folder = pathlib.Path(tempfile.mkdtemp(prefix="hexz-nbd-fleet-"))
    # Containers change the user, and have to get through.
    folder.chmod(0o755)
    try:
        return measure(options, folder, archive, image)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(options, folder, archive, image):
    # Imported late, so that --help works without libnbd.
    from rig import Failure, Rig

    rig = Rig(options.program.resolve(), folder, archive, image)
    rig.seccomp = options.seccomp if options.seccomp.exists() else None
    rows, failures = [], 0
    for case in options.cases or CASES:
        started = time.monotonic()
        try:
            for what, measured, bound, is_met in importlib.import_module(case).check(rig):
                met = {None: "", True: "yes", False: "NO"}[is_met]
                failures += is_met is False
                rows.append(f"| {what} | {measured} | {bound} | {met} |")
                print(f"{case}: {rows[-1]}", file=sys.stderr, flush=True)
        except (Failure, subprocess.SubprocessError, OSError, ValueError) as error:
            failures += 1
            text = " ".join(f"{type(error).__name__}: {error}".replace("|", "/").split())
            rows.append(f"| {case} | {text} | | FAILED |")
            print(f"{case}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            rig.stop()
        seconds = time.monotonic() - started
        print(f"{case}: {seconds:.0f} s", file=sys.stderr, flush=True)
    head = "| what | measured | bound | met |\n| --- | --- | --- | --- |\n"
    table = head + "\n".join(rows) + "\n"
    print(table, end="")
    if options.output:
        options.output.write_text(table)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
