#!/usr/bin/env python3
"""Tests the gateway with object stores that others have written.

    tests/stores/run.py PROGRAM [NAME...]

PROGRAM is hexz-nbd; a NAME selects the stores whose names contain it. The stores are installed into
target/stores. Each serves archives of tests/archives, which are copied with nbdcopy and compared
with what the gateway reads from the files.
"""

import filecmp
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time

import servers

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
ARCHIVES = ROOT / "tests/archives"
TOOLS = ROOT / "target/stores"
NAMES = ["base-zstd.hxz", "child-zstd.hxz", "grandchild-zstd.hxz", "fixed-64k-zstd.hxz"]
FRESH_FOR = 1


class Failure(Exception):
    """Something isn't as it should be."""


class Gateway:
    """A running gateway."""

    def __init__(self, program, arguments, environment=None):
        command = [program, "--listen", "127.0.0.1:0", "--fresh-for", f"{FRESH_FOR}s", *arguments]
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log = []
        self.address = None
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"ready: .*listen=\"?([0-9.:]+)", line):
                self.address = found.group(1)
                break
        if self.address is None:
            raise Failure(f"the gateway doesn't start: {''.join(self.log)}")
        threading.Thread(target=lambda: self.log.extend(self.process.stderr), daemon=True).start()

    def uri(self, export):
        return f"nbd://{self.address}/{export}"

    def copy(self, export, file):
        copied = subprocess.run(["nbdcopy", self.uri(export), file], capture_output=True, text=True)
        if copied.returncode != 0:
            raise Failure(f"nbdcopy {export}: {copied.stderr}{''.join(self.log)}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(30)


def is_same(one, other, what):
    if not filecmp.cmp(one, other, shallow=False):
        raise Failure(f"{what}: other bytes than from the file")


def is_denied(store, program, options, environment):
    """Checks that a store rejects credentials that are wrong."""
    command = [program, "digest", *options, store.url(f"v7/{NAMES[0]}")]
    environment = {**os.environ, **environment}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode != 3 or "store_denied" not in ended.stderr:
        raise Failure(f"wrong credentials: {ended.returncode} {ended.stderr}")


def check(store, program, folder, expected):
    """Serves archives of a store in all ways."""
    options, environment = store.options()
    for name in NAMES:
        store.put(f"v7/{name}", (ARCHIVES / name).read_bytes())
        tree = expected / f"{name}.tree"
        if tree.exists():
            store.put(f"v7/{name}.tree", tree.read_bytes())
    copied = folder / "copied"
    if wrong := store.wrong_options():
        is_denied(store, program, *wrong)

    def gateway(*arguments):
        return Gateway(program, [*options, *arguments], environment)

    with gateway(f"disk={store.url('v7/grandchild-zstd.hxz')}") as server:
        server.copy("disk", copied)
        is_same(copied, expected / "grandchild-zstd.hxz", "a chain of three")
    with gateway("--export-dir", store.url("v7/")) as server:
        info = ["nbdinfo", "--list", "--json", server.uri("")]
        listed = subprocess.run(info, capture_output=True, text=True, check=False).stdout
        for name in NAMES:
            if f'"{name}"' not in listed:
                raise Failure(f"{name} isn't listed: {listed}{''.join(server.log)}")
            server.copy(name, copied)
            is_same(copied, expected / name, name)
    digests = expected / "digests"
    with gateway("--digest", digests, store.url("v7/fixed-64k-zstd.hxz")) as server:
        server.copy("", copied)
        is_same(copied, expected / "fixed-64k-zstd.hxz", "with a digest")
    # A replaced object: new clients get the new version, once the old one isn't fresh any more.
    store.put("v8/disk.hxz", (ARCHIVES / "base-zstd.hxz").read_bytes())
    with gateway(store.url("v8/disk.hxz")) as server:
        server.copy("", copied)
        is_same(copied, expected / "base-zstd.hxz", "before the replacement")
        store.put("v8/disk.hxz", (ARCHIVES / "text-dict-zstd.hxz").read_bytes())
        time.sleep(FRESH_FOR + 1)
        server.copy("", copied)
        is_same(copied, expected / "text-dict-zstd.hxz", "after the replacement")


def expectations(program, folder):
    """Copies what the gateway reads from the files, and makes digests and trees."""
    local = folder / "archives"
    shutil.copytree(ARCHIVES, local)
    with Gateway(program, ["--export-dir", local]) as server:
        for name in [*NAMES, "text-dict-zstd.hxz"]:
            server.copy(name, folder / name)
    paths = [local / name for name in NAMES]
    made = subprocess.run([program, "tree", *paths], capture_output=True, text=True, check=True)
    (folder / "digests").write_text(made.stdout)
    for tree in local.glob("*.tree"):
        shutil.copy(tree, folder)


def main():
    program = pathlib.Path(sys.argv[1]).resolve()
    wanted = sys.argv[2:]
    TOOLS.mkdir(parents=True, exist_ok=True)
    failures = 0
    with tempfile.TemporaryDirectory(prefix="hexz-nbd-stores-") as temporary:
        folder = pathlib.Path(temporary)
        expected = folder / "expected"
        expected.mkdir()
        expectations(program, expected)
        for number, kind in enumerate(servers.ALL):
            if wanted and not any(text in kind.name for text in wanted):
                continue
            store = kind(folder / str(number), TOOLS)
            started = time.monotonic()
            try:
                store.install()
                started = time.monotonic()
                store.start()
                check(store, program, folder, expected)
                result = "ok"
            except Exception as error:  # pylint: disable=broad-except
                failures += 1
                result = f"FAILED: {error}"
            finally:
                store.stop()
            print(f"{kind.name:20} {time.monotonic() - started:5.1f} s  {result}", flush=True)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
