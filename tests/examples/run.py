#!/usr/bin/env python3
"""Checks the examples for platforms, and runs what can be run here.

    tests/examples/run.py PROGRAM [NAME...]

PROGRAM is hexz-nbd; a NAME selects the checks whose names contain it. Tools are installed into
target/examples, in the versions of requirements.txt and package-lock.json beside this file. They
are fetched from PyPI, npm and Debian; nothing else needs a network.
"""

import hashlib
import importlib
import os
import pathlib
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TOOLS = ROOT / "target/examples"
# Each check: module, and its function.
CHECKS = {
    "kubernetes": [("cluster", "check"), ("cluster", "check_that_mistakes_are_found")],
    "pod": [("pod", "check")],
    "compose": [("containers", "check")],
    "nginx-slice": [("nginx_slice", "check")],
    "machines": [("machines", "check")],
    "ansible": [("ansible_role", "check")],
}


def install():
    """Installs the tools, and starts this file again with their Python."""
    environment = TOOLS / "venv"
    pinned = [HERE / name for name in ("requirements.txt", "package.json", "package-lock.json")]
    version = hashlib.sha256(b"".join(path.read_bytes() for path in pinned)).hexdigest()
    stamp = TOOLS / "installed"
    if not stamp.exists() or stamp.read_text() != version:
        print("installing tools into target/examples", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", environment], check=True)
        pip = [environment / "bin/pip", "install", "--quiet", "--require-hashes", "--no-deps"]
        subprocess.run([*pip, "-r", pinned[0]], check=True)
        node = TOOLS / "node"
        node.mkdir(exist_ok=True)
        for path in pinned[1:]:
            (node / path.name).write_bytes(path.read_bytes())
        npm = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--silent"]
        subprocess.run(npm, cwd=node, check=True)
        stamp.write_text(version)
    python = environment / "bin/python"
    if pathlib.Path(sys.prefix) != environment:
        os.execv(python, [python, __file__, *sys.argv[1:]])


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    program = pathlib.Path(sys.argv[1]).resolve()
    install()
    wanted = sys.argv[2:]
    passed = failed = 0
    for name, functions in CHECKS.items():
        if wanted and not any(text in name for text in wanted):
            continue
        started = time.monotonic()
        try:
            for module, function in functions:
                for line in getattr(importlib.import_module(module), function)(
                    ROOT, program, TOOLS
                ):
                    print(f"  {line}", flush=True)
        except Exception as error:  # Each check has failures of its own.
            failed += 1
            print(f"{name}: FAILED: {type(error).__name__}: {error}", flush=True)
        else:
            passed += 1
            print(f"{name}: ok, {time.monotonic() - started:.1f} s", flush=True)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
