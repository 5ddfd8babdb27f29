"""The program in a container of runc without privileges, as in a restricted pod."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

from rig import ADDRESSES, GATEWAYS, STORE_URL, Failure, Gateway, accepts, expect, find, mib, run
from rig import ROOT, wait_for, within

USER = 65534
DRAIN_DELAY, SHUTDOWN_TIMEOUT = 5, 10
MEMORY = 384 << 20


def seccomp(path):
    """Returns the default profile of Podman and CRI-O for a process without capabilities."""
    profile = json.loads(path.read_text())
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine)

    def applies(rule):
        arches = rule.get("includes", {}).get("arches")
        return not rule.get("includes", {}).get("caps") and (not arches or machine in arches)

    keys = ("names", "action", "args", "errnoRet")
    return {
        "defaultAction": profile["defaultAction"],
        "defaultErrnoRet": profile["defaultErrnoRet"],
        "syscalls": [
            {key: rule[key] for key in keys if rule.get(key) is not None}
            for rule in profile["syscalls"]
            if applies(rule)
        ],
    }


def config(rig, root, arguments, is_static):
    """Returns the container's configuration for the OCI runtime."""

    def volume(source, target, *options):
        options = ["rbind", "nosuid", "nodev", *options]
        return {"destination": target, "type": "bind", "source": str(source), "options": options}

    libraries = [] if is_static else [p for p in ("/lib", "/lib64", "/usr/lib") if os.path.isdir(p)]
    mounts = [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {
            "destination": "/dev",
            "type": "tmpfs",
            "source": "tmpfs",
            "options": ["nosuid", "strictatime", "mode=755", "size=64k"],
        },
        volume(rig.folder / "container-tls", "/tls", "ro"),
        volume(rig.folder / "hosts", "/etc/hosts", "ro"),
        volume(rig.folder / "container-cache", "/cache", "rw"),
        *(volume(folder, folder, "ro") for folder in libraries),
    ]
    none = dict.fromkeys(("bounding", "effective", "inheritable", "permitted", "ambient"), [])
    kinds = ("pid", "mount", "ipc", "uts")
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False,
            "user": {"uid": USER, "gid": USER},
            "args": ["/hexz-nbd", *map(str, arguments)],
            "env": [],
            "cwd": "/",
            "capabilities": none,
            "noNewPrivileges": True,
        },
        "root": {"path": str(root), "readonly": True},
        "mounts": mounts,
        "linux": {
            "namespaces": [
                *({"type": kind} for kind in kinds),
                {"type": "network", "path": f"/run/netns/{GATEWAYS[0]}"},
            ],
            "resources": {"memory": {"limit": MEMORY}, "pids": {"limit": 100}},
            **({"seccomp": seccomp(rig.seccomp)} if rig.seccomp else {}),
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list"],
            "readonlyPaths": ["/proc/sys", "/proc/sysrq-trigger"],
        },
    }


def check(rig):
    rig.start_store()
    bundle = rig.folder / "bundle"
    root = bundle / "root"
    for folder in (root / "etc", rig.folder / "container-tls", rig.folder / "container-cache"):
        folder.mkdir(parents=True)
    shutil.copy(rig.program, root / "hexz-nbd")
    (root / "hexz-nbd").chmod(0o755)
    headers = run(find("readelf"), "--program-headers", rig.program)
    is_static = "INTERP" not in headers
    for name in ("server-cert.pem", "server-key.pem"):
        shutil.copy(rig.server_tls / name, rig.folder / "container-tls")
    shutil.copy(rig.pki / "ca-cert.pem", rig.folder / "container-tls")
    for path in (rig.folder / "container-cache", *(rig.folder / "container-tls").iterdir()):
        os.chown(path, USER, USER)
    address = ADDRESSES[GATEWAYS[0]]
    arguments = ["--listen", f"{address}:10809", "--monitor", f"{address}:10810"]
    arguments += ["--export-dir", STORE_URL, "--store-ca", "/tls/ca-cert.pem"]
    arguments += ["--tls-cert", "/tls/server-cert.pem", "--tls-key", "/tls/server-key.pem"]
    arguments += ["--tls-client-ca", "/tls/ca-cert.pem"]
    arguments += ["--allow-identity", "dns:*.boot.example.org", "--sandbox", "require"]
    arguments += ["--disk-cache", "/cache", "--disk-cache-size", "256MiB"]
    arguments += ["--drain-delay", f"{DRAIN_DELAY}s", "--shutdown-timeout", f"{SHUTDOWN_TIMEOUT}s"]
    text = json.dumps(config(rig, root, arguments, is_static))
    (bundle / "config.json").write_text(text)
    # Without a name service in the container, the dialer uses /etc/hosts.
    command = [find("runc"), "--root", rig.folder / "runc", "run", "--bundle", bundle, "gateway"]
    log = rig.folder / "container.log"
    gateway = Gateway(GATEWAYS[0], command, log)
    rig.start(gateway)
    try:
        yield from inside(rig, gateway, is_static)
    except Failure as error:
        raise Failure(f"{error}; {gateway.text()[-1500:]}") from error
    finally:
        kill = [find("runc"), "--root", str(rig.folder / "runc"), "delete", "--force", "gateway"]
        subprocess.run(kill, check=False, capture_output=True)


def inside(rig, gateway, is_static):
    gateway.wait_until_ready()
    state = json.loads(run(find("runc"), "--root", rig.folder / "runc", "state", "gateway"))
    with open(f"/proc/{state['pid']}/status", encoding="utf-8") as file:
        status = dict(re.findall(r"(\w+):\t(.*)", file.read()))
    expected = {"Uid": "\t".join([str(USER)] * 4), "NoNewPrivs": "1", "Seccomp": "2"}
    expected |= dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), "0" * 16)
    wrong = {key: status[key] for key, value in expected.items() if status[key] != value}
    expect(not wrong, f"privileges: {wrong}")
    with open(f"/proc/{state['pid']}/mountinfo", encoding="utf-8") as file:
        (options,) = [line.split()[5] for line in file if line.split()[4] == "/"]
    expect("ro" in options.split(","), f"the root is mounted with {options}")
    events = run(find("runc"), "--root", rig.folder / "runc", "events", "--stats", "gateway")
    limit = json.loads(events)["data"]["memory"]["usage"]["limit"]
    expect(limit == MEMORY, f"the limit of memory is {limit}")
    probes = {path: gateway.answer(path)[0] for path in ("/healthz", "/readyz", "/metrics")}
    expect(set(probes.values()) == {200}, f"probes: {probes}")

    expected_hash = hashlib.sha256(rig.content).hexdigest()
    copy = rig.folder / "container-copy"

    def read_all():
        uri = rig.uri(f"{GATEWAYS[0]}.example.org")
        words = within("client", ["nbdcopy", uri, copy])
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        expect(done.returncode == 0, f"nbdcopy: {done.stderr}")
        with open(copy, "rb") as file:
            expect(hashlib.file_digest(file, "sha256").hexdigest() == expected_hash, "wrong bytes")

    read_all()
    memory = gateway.metric("process_resident_memory_bytes")
    kind = "static program" if is_static else "program with the system's libraries"
    kind += ", default seccomp profile" if rig.seccomp else ""
    text = f"user {USER}, no capability, no new privileges, root read-only, {mib(MEMORY)} of memory"
    text += f" ({mib(memory)} used): ready, healthy, the image is right"
    yield f"container of runc, {kind}", text, "serves, answers probes", True

    # A client that comes while the gateway drains.
    words = [sys.executable, ROOT / "tests/fleet/scattered.py"]
    words = within("client", [*words, rig.uri(f"{GATEWAYS[0]}.example.org"), rig.image, 5, 20])
    gateway.process.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    wait_for("unreadiness", lambda: gateway.answer("/readyz")[0] == 503, 2)
    unready = time.monotonic() - begin
    expect(gateway.answer("/healthz")[0] == 200, "/healthz fails while it drains")
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    expect(done.returncode == 0, f"a client that comes while it drains: {done.stderr}")
    found = json.loads(done.stdout)
    expect(not found["errors"] and not found["wrong"], f"a client while it drains: {found}")
    served = time.monotonic() - begin
    refused = []

    def watch():
        while not refused and gateway.is_running():
            if not accepts(gateway.address, 10809):
                refused.append(time.monotonic() - begin)
            time.sleep(0.05)

    watching = threading.Thread(target=watch)
    watching.start()
    status = gateway.process.wait(60)
    seconds = time.monotonic() - begin
    watching.join()
    expect(served < DRAIN_DELAY, f"the client was too slow to show it: {served:.1f} s")
    expect(status == 0, f"it ends with {status}")
    closed = refused[0] if refused else seconds
    expect(closed >= DRAIN_DELAY, f"it refuses clients after {closed:.2f} s")
    text = f"/readyz is 503 after {unready:.2f} s, /healthz stays 200; a client that comes then "
    text += f"reads; no more clients after {closed:.2f} s; exit status 0 after "
    text += f"{seconds:.2f} s"
    bound = f"exit with 0 within {DRAIN_DELAY + SHUTDOWN_TIMEOUT} s"
    is_met = seconds <= DRAIN_DELAY + SHUTDOWN_TIMEOUT
    yield f"SIGTERM with `drain-delay` {DRAIN_DELAY} s", text, bound, is_met
