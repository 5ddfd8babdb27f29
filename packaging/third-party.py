#!/usr/bin/env python3
"""Prints the third-party crates that the program contains, with their licenses and license texts.

Most licenses permit binaries to be distributed only with their copyright notices. The crates are
those that Cargo.lock has for this platform, except build and test dependencies and the packages of
this workspace.
"""

import pathlib
import sys

import crates

NAMES = ("license", "licence", "copying", "copyright", "notice", "unlicense")


def texts(package):
    """Returns the license texts of a crate, including those of C code that it bundles."""
    folder = pathlib.Path(package["manifest_path"]).parent
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name.lower().startswith(NAMES) and path.suffix not in (".rs", ".go"):
            text = path.read_text(encoding="utf-8", errors="replace").strip()
            if text:
                yield str(path.relative_to(folder)), text


def main():
    linked, where = crates.third_party(crates.read()), {}
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
