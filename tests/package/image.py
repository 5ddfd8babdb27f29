#!/usr/bin/env python3
"""Unpacks an image from an OCI archive, and runs its program in it, as an engine would: as the
image's user, without capabilities, in a root that is read-only. image.py ARCHIVE SNAPSHOTS

Needs root, and namespaces of its own: the caller makes them.
"""

import ctypes
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tarfile
import tempfile
import time

SHA256 = "f678f7a8470339469d914c44f299df0d5ea6e06704b62be9c1b526bcf39ef67c"
PR_SET_NO_NEW_PRIVS = 38
PR_CAPBSET_DROP = 24
LABELS = ("title", "description", "version", "licenses")


class Failure(Exception):
    """The image isn't as expected."""


def expect(condition, what):
    if not condition:
        raise Failure(what)


def step(text):
    print(f"* {text}", flush=True)


def run(*words):
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    expect(done.returncode == 0, f"{words}: {done.stdout}{done.stderr}")
    return done.stdout


def blob(archive, digest):
    """Returns a blob of the archive, whose digest is checked."""
    name, value = digest.split(":")
    data = archive.extractfile(f"blobs/{name}/{value}").read()
    expect(hashlib.new(name, data).hexdigest() == value, f"blob {digest}")
    return data


def unpack(path, root):
    """Unpacks all layers, and returns the configuration."""
    with tarfile.open(path) as archive:
        layout = json.load(archive.extractfile("oci-layout"))
        expect(layout == {"imageLayoutVersion": "1.0.0"}, f"{layout}")
        (entry,) = json.load(archive.extractfile("index.json"))["manifests"]
        manifest = json.loads(blob(archive, entry["digest"]))
        config = json.loads(blob(archive, manifest["config"]["digest"]))
        expect(
            manifest["config"]["mediaType"] == "application/vnd.oci.image.config.v1+json",
            "not in OCI format",
        )
        for layer in manifest["layers"]:
            file = root.parent / "layer.tar"
            file.write_bytes(blob(archive, layer["digest"]))
            with tarfile.open(file) as content:
                # Numbers, not the names of this machine.
                content.extractall(root, numeric_owner=True, filter="fully_trusted")
            file.unlink()
    return config


def check_config(config):
    settings = config["config"]
    machine = {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]
    expect(config["architecture"] == machine and config["os"] == "linux", f"{config}")
    expect(settings["User"] == "10809:10809", settings["User"])
    expect(settings["Entrypoint"] == ["/hexz-nbd"], f"{settings['Entrypoint']}")
    expect(settings["StopSignal"] == "SIGTERM", f"{settings['StopSignal']}")
    expect("10809/tcp" in settings["ExposedPorts"], f"{settings['ExposedPorts']}")
    for label in LABELS:
        expect(settings["Labels"].get(f"org.opencontainers.image.{label}"), f"no label {label}")
    return settings


def check_files(root):
    """Nothing in the image may be written by its user, except the cache."""
    for path in root.rglob("*"):
        status = path.lstat()
        expect(status.st_mode & 0o6002 == 0, f"mode of {path}")
        is_cache = path == root / "cache"
        expect(status.st_uid == (10809 if is_cache else 0), f"owner of {path}")
    certificates = (root / "etc/ssl/certs/ca-certificates.crt").read_text()
    expect(certificates.count("BEGIN CERTIFICATE") > 10, "CA certificates")
    for name in ("LICENSE-APACHE", "LICENSE-MIT", "third-party"):
        expect((root / "licenses" / name).stat().st_size > 500, name)
    programs = [path for path in root.rglob("*") if path.is_file() and os.access(path, os.X_OK)]
    expect(programs == [root / "hexz-nbd"], f"{programs}")


class Container:
    """The image's file system and settings."""

    def __init__(self, root, settings):
        self.root, self.settings = root, settings
        self.user, self.group = (int(number) for number in settings["User"].split(":"))

    def enter(self):
        """Gives up everything, in the process that becomes the program."""
        libc = ctypes.CDLL(None, use_errno=True)
        os.chroot(self.root)
        os.chdir("/")
        for capability in range(64):
            # The last ones don't exist.
            libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
        os.setgroups([])
        os.setgid(self.group)
        os.setuid(self.user)
        expect(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0, "no new privileges")

    def start(self, *arguments, **options):
        words = [*self.settings["Entrypoint"], *(arguments or self.settings["Cmd"])]
        return subprocess.Popen(
            words, env={}, preexec_fn=self.enter, stdin=subprocess.DEVNULL, **options
        )

    def run(self, *arguments):
        """Runs a command to its end: its exit code and what it printed."""
        process = self.start(*arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output.decode()


def wait_for(what, condition):
    for _ in range(300):
        if condition():
            return
        time.sleep(0.1)
    raise Failure(f"waited in vain: {what}")


def main():
    archive, snapshots = (pathlib.Path(word).resolve() for word in sys.argv[1:])
    run("mount", "--make-rprivate", "/")
    run("ip", "link", "set", "lo", "up")
    folder = pathlib.Path(tempfile.mkdtemp(prefix="hexz-nbd-image-"))
    run("mount", "-t", "tmpfs", "tmpfs", folder)
    folder.chmod(0o755)
    try:
        test(archive, snapshots, folder)
    finally:
        run("umount", "--lazy", folder)
        folder.rmdir()


def test(archive, snapshots, folder):
    root = folder / "root"
    root.mkdir()
    step("the image has labels, a user, and nothing that runs but the program")
    settings = check_config(unpack(archive, root))
    check_files(root)
    container = Container(root, settings)

    # The volumes, and what engines mount. The root itself first, to make it read-only later.
    run("mount", "--bind", root, root)
    (root / "snapshots/base.hxz").touch()
    run("mount", "--bind", snapshots / "base-zstd.hxz", root / "snapshots/base.hxz")
    config = root / "etc/hexz-nbd/hexz-nbd.toml"
    for name in ("proc", "dev"):
        (root / name).mkdir(exist_ok=True)
    run("mount", "-t", "proc", "-o", "nosuid,nodev,noexec", "proc", root / "proc")
    for device in ("null", "urandom"):
        (root / "dev" / device).touch()
        run("mount", "--bind", f"/dev/{device}", root / "dev" / device)

    step("without a configuration, it says what is missing")
    code, output = container.run()
    expect(code == 2 and "/etc/hexz-nbd/hexz-nbd.toml" in output, f"{code}: {output}")

    step("it serves what the configuration says, and its health check agrees")
    config.write_text('export-dir = "/snapshots"\nmonitor = "127.0.0.1:10810"\n')
    run("mount", "-o", "remount,bind,ro", root)
    code, output = container.run("health")
    expect(code == 1 and 'reason="connect_failed"' in output, f"{code}: {output}")
    with open(folder / "log", "w+b") as log:
        server = container.start(stdout=log, stderr=log)
        try:
            wait_for("ready", lambda: b"ready: " in (folder / "log").read_bytes())
            for arguments in (["health"], ["health", "--ready"]):
                expect(container.run(*arguments) == (0, "ok\n"), f"{arguments}")
            status = pathlib.Path(f"/proc/{server.pid}/status").read_text()
            fields = dict(line.split(":\t") for line in status.splitlines() if ":\t" in line)
            expect(fields["Uid"].split() == ["10809"] * 4, fields["Uid"])
            for name in ("CapEff", "CapPrm", "CapBnd"):
                expect(int(fields[name], 16) == 0, f"{name}: {fields[name]}")
            disk = subprocess.run(
                ["nbdcopy", "nbd://localhost/base.hxz", "-"], check=True, capture_output=True
            ).stdout
            expect(hashlib.sha256(disk).hexdigest() == SHA256, "wrong bytes")
            server.send_signal(signal.SIGTERM)
            expect(server.wait(60) == 0, f"it ended with {server.returncode}")
        except (Failure, subprocess.SubprocessError):
            print((folder / "log").read_text())
            raise
        finally:
            server.kill()
            server.wait()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failure as failure:
        sys.exit(f"FAILED: {failure}")
