#!/usr/bin/env python3
"""Prints a software bill of materials of the program, in CycloneDX 1.5: sbom.py TARGET

It lists the crates that the program is linked with, with versions, licenses, checksums and
dependencies, as Cargo.lock and `cargo metadata` have them. Build and test dependencies, and the
compiler, aren't in it. C code is part of the crates that bundle it (aws-lc-sys, zstd-sys,
tikv-jemalloc-sys). The time is that of SOURCE_DATE_EPOCH, so that the same commit has the same one.
"""

import datetime
import json
import os
import pathlib
import re
import sys
import uuid

import crates

ROOT = pathlib.Path(__file__).resolve().parent.parent


def component(package, kind, checksums):
    """Returns the description of a package."""
    name, version = package["name"], package["version"]
    found = {
        "type": kind,
        "bom-ref": f"{name}@{version}",
        "name": name,
        "version": version,
        "description": (package["description"] or "").strip(),
        "scope": "required",
    }
    # The packages of this workspace aren't those that a registry may have under the same names.
    if package["source"]:
        found["purl"] = f"pkg:cargo/{name}@{version}"
    if package["license"]:
        # "MIT/Apache-2.0" is an older form of the expression.
        found["licenses"] = [{"expression": package["license"].replace("/", " OR ")}]
    if checksum := checksums.get((name, version)):
        found["hashes"] = [{"alg": "SHA-256", "content": checksum}]
    if package["repository"]:
        found["externalReferences"] = [{"type": "vcs", "url": package["repository"]}]
    return found


def main():
    target = sys.argv[1]
    metadata = crates.read(target)
    packages, dependencies = crates.linked(metadata)
    root = metadata["resolve"]["root"]
    # Not tomllib: it is newer than some distributions' Python.
    lock = re.findall(
        r'^name = "(.+)"\nversion = "(.+)"\nsource = .+\nchecksum = "(.+)"$',
        (ROOT / "Cargo.lock").read_text(),
        re.MULTILINE,
    )
    checksums = {(name, version): checksum for name, version, checksum in lock}
    components = {
        id: component(package, "application" if id == root else "library", checksums)
        for id, package in packages.items()
    }
    program = components.pop(root)
    program["properties"] = [{"name": "target", "value": target}]
    references = {id: found["bom-ref"] for id, found in {**components, root: program}.items()}
    time = datetime.datetime.fromtimestamp(int(os.environ["SOURCE_DATE_EPOCH"]), datetime.timezone.utc)
    content = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {
            "timestamp": time.isoformat().replace("+00:00", "Z"),
            "component": program,
        },
        "components": sorted(components.values(), key=lambda found: found["bom-ref"]),
        "dependencies": sorted(
            (
                {
                    "ref": references[id],
                    "dependsOn": sorted({references[it] for it in dependencies[id]}),
                }
                for id in packages
            ),
            key=lambda it: it["ref"],
        ),
    }
    # Derived from the content, since it has to be unique but the same for the same commit.
    number = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(content, sort_keys=True))
    print(json.dumps({"serialNumber": f"urn:uuid:{number}", **content}, indent=2))


if __name__ == "__main__":
    sys.exit(main())
