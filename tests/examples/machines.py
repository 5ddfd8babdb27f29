"""Checks the examples for client machines: the libvirt domain and the cloud-init configuration."""

import json
import pathlib
import re
import shutil
import subprocess
import tempfile

import jsonschema
import yaml
from nginx_slice import Failure, expect

# Debian packages from which schemas are taken. They are unpacked, not installed.
PACKAGES = ["cloud-init", "libvirt0"]
# libvirt 9.0, whose schema this is, doesn't know the element yet.
NEWER = r"\s*<reconnect delay='\d+'/>"


def check(root, program, tools):
    folder = tools / "debian"
    if not all((folder / f"{package}.done").exists() for package in PACKAGES):
        folder.mkdir(parents=True, exist_ok=True)
        for package in PACKAGES:
            run("apt-get", "download", package, cwd=folder)
            (file,) = folder.glob(f"{package}_*.deb")
            run("dpkg-deb", "--extract", file, folder)
            file.unlink()
            (folder / f"{package}.done").touch()
    yield from libvirt(root, folder)
    yield from cloud_init(root, folder)


def run(*words, **options):
    done = subprocess.run(words, capture_output=True, text=True, check=False, **options)
    if done.returncode != 0:
        raise Failure(f"{words}: {done.stdout}{done.stderr}")
    return done.stdout


def libvirt(root, folder):
    """Validates the domain as virt-xml-validate does."""
    text = (root / "examples/libvirt-domain.xml").read_text()
    text, count = re.subn(NEWER, "", text)
    expect(count == 1, f"libvirt-domain.xml has {count} reconnect elements")
    expect(shutil.which("xmllint"), "xmllint isn't installed (Debian: libxml2-utils)")
    schema = folder / "usr/share/libvirt/schemas/domain.rng"

    def validate(text):
        command = ["xmllint", "--noout", "--relaxng", schema, "-"]
        return subprocess.run(command, input=text, capture_output=True, text=True, check=False)

    done = validate(text)
    expect(done.returncode == 0, f"libvirt-domain.xml: {done.stderr}")
    expect(validate(text.replace("protocol='nbd'", "protocol='ndb'")).returncode, "no validation")
    yield "libvirt-domain.xml fits libvirt's schema, without the element reconnect"


def cloud_init(root, folder):
    """Validates the configuration as "cloud-init schema" does, and the units in it."""
    text = (root / "examples/cloud-init.yml").read_text()
    expect(text.startswith("#cloud-config\n"), "cloud-init.yml: first line")
    config = yaml.safe_load(text)
    path = "usr/lib/python3/dist-packages/cloudinit/config/schemas/schema-cloud-config-v1.json"
    schema = json.loads((folder / path).read_text())
    validator = jsonschema.Draft4Validator(schema)
    problems = [error.message for error in validator.iter_errors(config)]
    expect(not problems, f"cloud-init.yml: {problems}")
    expect(not validator.is_valid(config | {"write_files": [{"mode": 1}]}), "no validation")
    # The schema permits unknown keys at the top.
    expect(set(config) == {"packages", "write_files", "runcmd"}, f"keys: {set(config)}")

    with tempfile.TemporaryDirectory() as temporary:
        units = []
        for file in config["write_files"]:
            if file["path"].startswith("/etc/systemd/system/"):
                unit = pathlib.Path(temporary) / pathlib.Path(file["path"]).name
                # The programs needn't be installed here.
                unit.write_text(
                    re.sub(r"=/sbin/(modprobe|nbd-client)", "=/bin/true", file["content"])
                )
                units.append(unit)
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", "--generators=no", *units],
            capture_output=True,
            text=True,
            check=False,
        )
        complaints = [line for line in done.stderr.splitlines() if "snapshot" in line]
        expect(units and not complaints, f"units: {done.stderr}")
        enabled = config["runcmd"][-1][3:]
        expect(sorted(enabled) == sorted(unit.name for unit in units), f"enabled: {enabled}")
    yield f"cloud-init.yml fits cloud-init's schema; its {len(units)} units verify"
