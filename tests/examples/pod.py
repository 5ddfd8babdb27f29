"""Runs the program as in a pod of examples/kubernetes: as an unprivileged user without
capabilities, in a root that is read-only and has nothing but the program, with volumes as the
kubelet lays them out.

The pod's seccomp profile and cgroup are not imitated. Needs root, for the namespaces and the user.
"""

import filecmp
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import urllib.request

import kustomize

USER = 10809
POD, STORE, DNS = "192.0.2.10", "192.0.2.20", "192.0.2.53"
NAME = "store.example.org"
ARCHIVE = "grandchild-zstd.hxz"
# Libraries of a program that isn't static.
LIBRARIES = ["/lib", "/lib64", "/usr/lib"]


class Failure(Exception):
    """The program doesn't behave as expected."""


def check(root, program, _tools):
    """Runs this file in new namespaces."""
    if os.geteuid() != 0:
        raise Failure("run it as root: it makes namespaces and changes the user")
    command = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    command += [sys.executable, __file__, root, program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != 0:
        raise Failure(done.stdout + done.stderr)
    yield from done.stdout.splitlines()


def run(*words, **options):
    done = subprocess.run(words, capture_output=True, text=True, check=False, **options)
    if done.returncode != 0:
        raise Failure(f"{words}: {done.stdout}{done.stderr}")
    return done.stdout


def wait_for(what, condition):
    for _ in range(300):
        if condition():
            return
        time.sleep(0.1)
    raise Failure(f"no {what}")


def put_volume(folder, files, number):
    """Writes a volume as the kubelet does: files are links to ..data, a link that is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    version = folder / f"..{number}"
    version.mkdir()
    for name, content in files.items():
        (version / name).write_bytes(content)
        (version / name).chmod(0o440)
        os.chown(version / name, 0, USER)
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")
    (folder / "..data_tmp").symlink_to(version.name)
    (folder / "..data_tmp").rename(folder / "..data")


def serve_dns():
    """Answers queries for the store's IPv4 address."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    listener.bind((DNS, 53))
    while True:
        query, client = listener.recvfrom(512)
        end = query.index(b"\0", 12) + 5
        name, at = [], 12
        while query[at]:
            name.append(query[at + 1 : at + 1 + query[at]].decode())
            at += query[at] + 1
        is_known = ".".join(name).lower() == NAME
        has_answer = is_known and query[end - 4 : end - 2] == b"\0\1"
        answer = b"\xc0\x0c" + struct.pack("!HHIH", 1, 1, 60, 4) + socket.inet_aton(STORE)
        flags = 0x8580 if is_known else 0x8583
        head = query[:2] + struct.pack("!HHHHH", flags, 1, int(has_answer), 0, 0)
        listener.sendto(head + query[12:end] + answer * has_answer, client)


def start_store(folder, archives):
    (folder / "store").mkdir()
    config = folder / "nginx.conf"
    temporary = "".join(
        f"{kind}_temp_path {folder}/store;"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config.write_text(
        f"daemon off; user root; worker_processes 1; pid {folder}/pid; error_log stderr;\n"
        f"events {{}} http {{ access_log off; {temporary}\n"
        f"server {{ listen {STORE}:8080;\n"
        f"location /v7/ {{ alias {archives}/; autoindex on; }} }} }}\n"
    )
    return subprocess.Popen([find("nginx"), "-c", config])


def find(name):
    return shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin") or name


def make_root(root, program):
    """Makes the container's root: the program, its libraries, /proc and some devices."""
    for folder in ("proc", "dev", "etc"):
        (root / folder).mkdir(parents=True)
    shutil.copy(program, root / "hexz-nbd")
    (root / "hexz-nbd").chmod(0o755)
    is_static = b"INTERP" not in run("readelf", "--program-headers", program).encode()
    for library in [] if is_static else LIBRARIES:
        if pathlib.Path(library).is_dir():
            (root / library[1:]).mkdir(parents=True)
            run("mount", "--rbind", library, root / library[1:])
            run("mount", "-o", "remount,bind,ro", root / library[1:])
    run("mount", "-t", "proc", "-o", "nosuid,nodev,noexec", "proc", root / "proc")
    for device in ("null", "urandom"):
        (root / "dev" / device).touch()
        run("mount", "--bind", f"/dev/{device}", root / "dev" / device)
    # The kubelet mounts these two as single files.
    for name, text in (
        ("resolv.conf", f"nameserver {DNS}\nsearch hexz-nbd.svc.cluster.local\noptions ndots:5\n"),
        ("hosts", f"127.0.0.1 localhost\n{POD} hexz-nbd-0\n"),
    ):
        source = root.parent / name
        source.write_text(text)
        (root / "etc" / name).touch()
        run("mount", "--bind", source, root / "etc" / name)
    return is_static


def main():
    repository, program = (pathlib.Path(word) for word in sys.argv[1:])
    folder = pathlib.Path(tempfile.mkdtemp(prefix="hexz-nbd-pod-"))
    run("mount", "--make-rprivate", "/")
    run("mount", "-t", "tmpfs", "tmpfs", folder)
    folder.chmod(0o755)
    run("ip", "link", "set", "lo", "up")
    for address in (POD, STORE, DNS):
        run("ip", "address", "add", f"{address}/32", "dev", "lo")
    threading.Thread(target=serve_dns, daemon=True).start()
    store = start_store(folder, repository / "tests/archives")
    try:
        inside(repository, program, folder)
    finally:
        store.terminate()
        store.wait(30)


def inside(repository, program, folder):
    def pki(*words):
        run(program, "pki", *words, cwd=folder)

    pki("init")
    pki("server", "nbd.example.org", POD)
    pki("client", "machine-1.boot.example.org")
    client = folder / "pki/clients/machine-1.boot.example.org"

    def certificate():
        files = folder / "pki/servers/nbd.example.org"
        return {
            "tls.crt": (files / "server-cert.pem").read_bytes(),
            "tls.key": (files / "server-key.pem").read_bytes(),
        }

    # The configuration of the example, with another store.
    (config,) = [
        it["data"]["hexz-nbd.toml"]
        for it in kustomize.render(repository / "examples/kubernetes/overlays/minio-private-ca")
        if "hexz-nbd.toml" in it.get("data", {})
    ]
    config = re.sub(r"(?m)^(store-|export-dir).*\n", "", config)
    config = f'export-dir = "http://{NAME}:8080/v7/"\nstore-insecure = true\n{config}'
    tomllib.loads(config)

    root = folder / "root"
    root.mkdir()
    run("mount", "-t", "tmpfs", "tmpfs", root)
    is_static = make_root(root, program)
    volumes = {
        "hexz-nbd": {"hexz-nbd.toml": config.encode()},
        "hexz-nbd-tls": certificate(),
        "hexz-nbd-client-ca": {"ca.crt": (folder / "pki/ca-cert.pem").read_bytes()},
    }
    for name, files in volumes.items():
        put_volume(folder / "volumes" / name, files, 1)
        (root / "etc" / name).mkdir()
        run("mount", "--bind", folder / "volumes" / name, root / "etc" / name)
        run("mount", "-o", "remount,bind,ro", root / "etc" / name)
    run("mount", "-o", "remount,ro", root)

    log = folder / "log"
    with open(log, "wb") as out:
        process = subprocess.Popen(
            ["setpriv", "--no-new-privs", "--inh-caps=-all", "--ambient-caps=-all"]
            + ["--bounding-set=-all,+sys_chroot,+setuid,+setgid"]
            + [find("chroot"), f"--userspec={USER}:{USER}", "--groups=", root]
            + ["/hexz-nbd", "--config", "/etc/hexz-nbd/hexz-nbd.toml"],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env={},
        )

    def lines():
        return [json.loads(line) for line in log.read_text().splitlines()]

    def said(text):
        return any(text in line["message"] for line in lines())

    def answer(path):
        try:
            # As the kubelet and Prometheus do, by the pod's address.
            with urllib.request.urlopen(f"http://{POD}:10810{path}", timeout=5) as response:
                return response.status
        except OSError:
            return None

    try:
        wait_for("start", lambda: process.poll() is not None or said("ready: serving"))
        if process.poll() is not None:
            raise Failure(log.read_text())
        status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
        status = dict(re.findall(r"(\w+):\t(.*)", status))
        for key, value in (
            ("Uid", "\t".join([str(USER)] * 4)),
            ("NoNewPrivs", "1"),
            ("Seccomp", "2"),
            ("CapEff", "0" * 16),
            ("CapPrm", "0" * 16),
            ("Groups", ""),
        ):
            if status[key].strip() != value:
                raise Failure(f"{key}: {status[key]}")
        for path in ("/healthz", "/readyz", "/metrics"):
            if answer(path) != 200:
                raise Failure(f"{path}: {answer(path)}")
        yield_line(f"starts as user {USER} in a read-only root" + (", static" if is_static else ""))
        children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        (dialer,) = children.split()
        status = pathlib.Path(f"/proc/{dialer}/status").read_text()
        if f"Uid:\t{USER}" not in status or "Seccomp:\t2" not in status:
            raise Failure(f"dialer: {status}")

        copied, expected = folder / "copied", folder / "expected"
        uri = f"nbds://{POD}/{ARCHIVE}?tls-certificates={client_folder(client)}"
        run("nbdcopy", uri, copied)
        archive = repository / "tests/archives" / ARCHIVE
        run("nbdcopy", "--", "[", program, archive, "]", expected)
        if not filecmp.cmp(copied, expected, shallow=False):
            raise Failure("other bytes than from the file")
        yield_line("the dialer finds the store by /etc/resolv.conf; a chain of three is read")

        # A renewed certificate.
        shutil.rmtree(folder / "pki/servers")
        pki("server", "nbd.example.org", POD, "renewed.example.org")
        put_volume(folder / "volumes/hexz-nbd-tls", certificate(), 2)
        wait_for("reload", lambda: said("reloaded"))
        run("nbdinfo", "--size", uri)
        yield_line("a renewed certificate is used without a restart")

        # The network policy restricts the monitor.
        problems = [
            line
            for line in lines()
            if line["level"] in ("WARN", "ERROR") and line["reason"] != "monitor_exposed"
        ]
        if problems:
            raise Failure(f"{problems}")
        process.send_signal(signal.SIGTERM)
        if process.wait(15) != 0:
            raise Failure(f"it ends with {process.returncode}")
        yield_line("no warning but that of the monitor; it ends with 0 after SIGTERM")
    except Exception:
        sys.stderr.write(log.read_text())
        raise
    finally:
        process.kill()


def client_folder(folder):
    # libnbd wants the CA there too.
    shutil.copy(folder.parent.parent / "ca-cert.pem", folder)
    return folder


def yield_line(text):
    print(text, flush=True)


if __name__ == "__main__":
    main()
