"""The third-party crates that the program is linked with, from `cargo metadata`."""

import json
import subprocess


def read(target=None):
    """Returns the metadata of the workspace for a target, by default this platform.

    Other platforms' crates, such as those for Windows, aren't in it.
    """
    if target is None:
        rustc = subprocess.run(["rustc", "-vV"], check=True, capture_output=True, text=True).stdout
        target = next(line.split()[1] for line in rustc.splitlines() if line.startswith("host:"))
    command = ["cargo", "metadata", "--locked", "--format-version=1", "--filter-platform", target]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def linked(metadata):
    """Returns the packages that the program is linked with, itself among them, and for each the IDs
    of those that it depends on, both by ID."""
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    packages = {package["id"]: package for package in metadata["packages"]}
    dependencies, todo = {}, [metadata["resolve"]["root"]]
    while todo:
        package = todo.pop()
        if package not in dependencies:
            # Neither build nor test dependencies.
            dependencies[package] = sorted(
                dependency["pkg"]
                for dependency in nodes[package]["deps"]
                if any(kind["kind"] is None for kind in dependency["dep_kinds"])
            )
            todo += dependencies[package]
    return {package: packages[package] for package in dependencies}, dependencies


def third_party(metadata):
    """Returns the crates of others that the program is linked with, sorted by name."""
    packages = (package for package in linked(metadata)[0].values() if package["source"])
    return sorted(packages, key=lambda package: (package["name"], package["version"]))
