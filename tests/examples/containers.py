"""Checks examples/compose.yml, and runs what it runs: nginx, two gateways and HAProxy, with the
addresses of the example, in namespaces instead of containers."""

import filecmp
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

import yaml
from nginx_slice import Failure, Process, expect

ADDRESSES = {
    "balancer": "192.0.2.10",
    "gateway-1": "192.0.2.21",
    "gateway-2": "192.0.2.22",
    "store": "192.0.2.30",
}
CLIENT = "198.51.100.7"
OVERHEAD = 128
GRACE = 5


def check(root, program, _tools):
    path = root / "examples/compose.yml"
    command = [pathlib.Path(sys.executable).parent / "check-jsonschema"]
    command += ["--builtin-schema", "vendor.compose-spec", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    expect(done.returncode == 0, f"compose.yml: {done.stdout}{done.stderr}")
    # No UniqueLoader: it doesn't know merge keys.
    services = yaml.safe_load(path.read_text())["services"]
    found = {name: it["networks"]["nbd"]["ipv4_address"] for name, it in services.items()}
    expect(found == ADDRESSES, f"addresses: {found}")
    balancer = (root / "examples/haproxy.cfg").read_text()
    for name in ("gateway-1", "gateway-2"):
        service = services[name]
        options = dict(word[2:].split("=", 1) for word in service["command"] if "=" in word)
        expect(f" {ADDRESSES[name]}:10809 send-proxy-v2" in balancer, f"{name} in haproxy.cfg")
        expect(options["proxy-from"] == ADDRESSES["balancer"], f"{name}: {options}")
        expect(service["read_only"] and service["cap_drop"] == ["ALL"], f"{name}: privileges")
        size = int(options["cache-size"].removesuffix("MiB"))
        expect(service["mem_limit"] == f"{size + OVERHEAD}m", f"{name}: memory")
        times = (options["drain-delay"], options["shutdown-timeout"])
        time_limit = sum(int(text.removesuffix("s")) for text in times) + GRACE
        expect(service["stop_grace_period"] == f"{time_limit}s", f"{name}: grace period")
    for service in services.values():
        for volume in service["volumes"]:
            source = root / "examples" / volume.split(":")[0]
            expect(source.exists() and volume.endswith(":ro"), f"volume {volume}")
    yield "compose.yml fits the Compose specification, haproxy.cfg and the configuration"
    if os.geteuid() != 0:
        raise Failure("run it as root: it makes namespaces with the addresses of the example")
    command = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    command += [sys.executable, __file__, root, program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    expect(done.returncode == 0, done.stdout + done.stderr)
    yield from done.stdout.splitlines()


def main():
    root, program = (pathlib.Path(word) for word in sys.argv[1:])

    def run(*words):
        subprocess.run(words, check=True)

    run("ip", "link", "set", "lo", "up")
    # All share one machine, so each listens on its own address only. Connections to one of them
    # come from the one that connects to it in the example.
    for machine, client in (
        ("balancer", CLIENT),
        ("gateway-1", ADDRESSES["balancer"]),
        ("gateway-2", ADDRESSES["balancer"]),
        ("store", ADDRESSES["gateway-1"]),
    ):
        for address in (ADDRESSES[machine], client):
            run("ip", "address", "replace", f"{address}/32", "dev", "lo")
        run(
            "ip",
            "route",
            "replace",
            "local",
            ADDRESSES[machine],
            "dev",
            "lo",
            "table",
            "local",
            "src",
            client,
        )
    with tempfile.TemporaryDirectory(prefix="hexz-nbd-compose-") as temporary:
        folder, processes = pathlib.Path(temporary), []
        try:
            run_services(root, program, folder, processes)
        finally:
            for process in reversed(processes):
                process.stop()


def run_services(root, program, folder, processes):
    services = yaml.safe_load((root / "examples/compose.yml").read_text())["services"]
    quiet = {"check": True, "capture_output": True, "cwd": folder}
    for words in (
        ["init"],
        ["server", "localhost", "127.0.0.1", ADDRESSES["balancer"]],
        ["client", "machine-1.boot.example.org"],
    ):
        subprocess.run([program, "pki", *words], **quiet)
    files = folder / "pki/clients/machine-1.boot.example.org"
    shutil.copy(folder / "pki/ca-cert.pem", files)
    path = os.environ["PATH"] + ":/usr/sbin"

    archives = root / "tests/archives"
    site = (root / "examples/compose/nginx.conf").read_text()
    site = site.replace("/archives", str(archives)).replace("80", f"{ADDRESSES['store']}:80")
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"user root; daemon off; pid {folder}/pid; error_log stderr;\n"
        f"events {{}}\nhttp {{ access_log off; {temporary}\n{site} }}\n"
    )
    nginx = [shutil.which("nginx", path=path), "-c", folder / "nginx.conf"]
    processes.append(Process(nginx, folder / "store.log"))
    gateways = {}
    for name in ("gateway-1", "gateway-2"):
        words = [
            word.replace("/tls/", f"{folder}/pki/servers/localhost/")
            .replace("0.0.0.0:10809", f"{ADDRESSES[name]}:10809")
            .replace("0.0.0.0:10810", f"{ADDRESSES[name]}:10810")
            for word in services[name]["command"]
        ]
        gateways[name] = Process([program, *words], folder / f"{name}.log")
        processes.append(gateways[name])
    for gateway in gateways.values():
        gateway.wait_for("ready: serving")
    health = [program, *services["gateway-1"]["healthcheck"]["test"][2:]]
    subprocess.run([*health, "--monitor", f"{ADDRESSES['gateway-1']}:10810"], **quiet)
    balancer = (root / "examples/haproxy.cfg").read_text()
    expect(balancer.count("bind :10809") == 1, "haproxy.cfg")
    balancer = balancer.replace("bind :10809", f"bind {ADDRESSES['balancer']}:10809")
    (folder / "haproxy.cfg").write_text(balancer)
    haproxy = [shutil.which("haproxy", path=path), "-db", "-f", folder / "haproxy.cfg"]
    processes.append(Process(haproxy, folder / "haproxy.log"))

    name = "grandchild-zstd.hxz"
    subprocess.run(
        ["nbdcopy", "--", "[", program, archives / name, "]", folder / "expected"], **quiet
    )
    uri = f"nbds://{ADDRESSES['balancer']}/{name}?tls-certificates={files}"
    for _ in range(6):
        for _ in range(50):
            done = subprocess.run(
                ["nbdcopy", uri, folder / "copy"], capture_output=True, check=False
            )
            if done.returncode == 0:
                break
            time.sleep(0.2)
        else:
            raise Failure(f"nbdcopy: {done.stderr}")
        expect(filecmp.cmp(folder / "copy", folder / "expected", shallow=False), "wrong bytes")
    pattern = re.compile(rf"peer={CLIENT} via={ADDRESSES['balancer']}")
    for name, gateway in gateways.items():
        expect(pattern.search(gateway.log.read_text()), f"{name} has served nobody")
    print(
        "both gateways serve through HAProxy, and see the client's address; the health check works"
    )


if __name__ == "__main__":
    main()
