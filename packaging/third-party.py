#!/usr/bin/env python3
"""Prints the third-party crates that the program contains, with their licenses and license texts.

Most licenses permit binaries to be distributed only with their copyright notices. The crates are
those that Cargo.lock has for this platform, except build and test dependencies and the packages of
this workspace.
"""

import json
import pathlib
import subprocess
import sys

NAMES = ("license", "licence", "copying", "copyright", "notice", "unlicense")


def packages(metadata):
    """Returns the third-party crates that the program is linked with, sorted by name."""
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    root = metadata["resolve"]["root"]
    found, todo = set(), [root]
    while todo:
        for dependency in nodes[todo.pop()]["deps"]:
            is_linked = any(kind["kind"] is None for kind in dependency["dep_kinds"])
            if is_linked and dependency["pkg"] not in found:
                found.add(dependency["pkg"])
                todo.append(dependency["pkg"])
    linked = (package for package in metadata["packages"] if package["id"] in found)
    linked = (package for package in linked if package["source"])
    return sorted(linked, key=lambda package: (package["name"], package["version"]))


def texts(package):
    """Returns the license texts of a crate, including those of C code that it bundles."""
    folder = pathlib.Path(package["manifest_path"]).parent
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name.lower().startswith(NAMES) and path.suffix not in (".rs", ".go"):
            text = path.read_text(encoding="utf-8", errors="replace").strip()
            if text:
                yield str(path.relative_to(folder)), text


def main():
    # Only this platform: there are no Windows crates on Linux.
    rustc = subprocess.run(["rustc", "-vV"], check=True, capture_output=True, text=True).stdout
    host = next(line.split()[1] for line in rustc.splitlines() if line.startswith("host:"))
    command = ["cargo", "metadata", "--locked", "--format-version=1", "--filter-platform", host]
    metadata = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    linked, where = packages(metadata), {}
    for package in linked:
        for name, text in texts(package):
            where.setdefault(text, []).append(f"{package['name']} {package['version']}: {name}")
    print("The program contains these crates:\n")
    for package in linked:
        license = package["license"] or "see its license file"
        print(f"  {package['name']} {package['version']}: {license}")
    for text, places in where.items():
        print("\n" + "=" * 78, *places, "-" * 78, text, sep="\n")


if __name__ == "__main__":
    sys.exit(main())
