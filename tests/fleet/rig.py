"""Machines of a fleet as network namespaces: a store, second-level caches, gateways, a balancer,
and clients. The configurations are those of examples/, with other file names.

It runs in namespaces of its own (see run.py), so that everything ends with it.
"""

import json
import mmap
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
ADDRESSES = {
    "balancer": "192.0.2.10",
    "gateway-1": "192.0.2.21",
    "gateway-2": "192.0.2.22",
    "gateway-3": "192.0.2.23",
    "store": "192.0.2.30",
    "cache-1": "192.0.2.41",
    "cache-2": "192.0.2.42",
}
GATEWAYS = ("gateway-1", "gateway-2", "gateway-3")
CLIENT = "10.1.0.1"
# The program itself asks monitors from here.
OBSERVER = "192.0.2.1"
NAMES = {
    "nbd.example.org": ["balancer"],
    "gateway-1.example.org": ["gateway-1"],
    "store.example.org": ["store"],
    "cache.example.org": ["cache-1", "cache-2"],
    "cache-1.example.org": ["cache-1"],
    "cache-2.example.org": ["cache-2"],
}
CLIENTS = ("machine-1.boot.example.org", "machine-2.boot.example.org")
EXPORT = "disk.hxz"
STORE_URL = "https://store.example.org/v7/"
CACHE_URL = "https://cache.example.org:8443/v7/"


class Failure(Exception):
    """Something doesn't behave as expected, or can't be measured."""


def expect(condition, what):
    if not condition:
        raise Failure(what)


def find(name):
    found = shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    expect(found, f"{name} isn't installed; try `make fleet-tools`")
    return found


def run(*words, **options):
    words = [str(word) for word in words]
    done = subprocess.run(words, capture_output=True, text=True, check=False, **options)
    if done.returncode != 0:
        raise Failure(f"{' '.join(words)}: {done.stdout}{done.stderr}")
    return done.stdout


def wait_for(what, condition, seconds=30):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    raise Failure(f"no {what} within {seconds} s")


def within(name, words):
    """Returns a command that runs in a machine's network. The process ID stays the same."""
    return ["nsenter", f"--net=/run/netns/{name}", *[str(word) for word in words]]


class Process:
    """A process that is killed at the end."""

    def __init__(self, command, log, **options):
        self.command, self.log = [str(word) for word in command], log
        with open(log, "ab") as out:
            options = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out} | options
            self.started = time.monotonic()
            self.process = subprocess.Popen(self.command, **options)

    @property
    def pid(self):
        return self.process.pid

    def is_running(self):
        return self.process.poll() is None

    def text(self):
        return self.log.read_text(errors="replace")

    def wait_until(self, what, condition, seconds=30):
        def is_met():
            expect(self.is_running(), f"{self.command[2:4]} has ended: {self.text()[-2000:]}")
            return condition()

        return wait_for(what, is_met, seconds)

    def end(self, number, seconds=60):
        """Sends a signal, and returns the exit status."""
        if self.is_running():
            self.process.send_signal(number)
        return self.process.wait(seconds)

    def stop(self):
        self.end(signal.SIGKILL)


class Gateway(Process):
    """A gateway with a monitor."""

    def __init__(self, name, command, log):
        super().__init__(within(name, command), log)
        self.name, self.address = name, ADDRESSES[name]

    def answer(self, path, seconds=5):
        """Returns the status and the body of the monitor's response; `None` if there is none."""
        try:
            url = f"http://{self.address}:10810{path}"
            with urllib.request.urlopen(url, timeout=seconds) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return None, ""

    def wait_until_ready(self):
        """Waits for /readyz, and returns the seconds since the start."""
        self.wait_until("readiness", lambda: self.answer("/readyz")[0] == 200)
        return time.monotonic() - self.started

    def connections(self):
        """Returns the connections of clients that read."""
        status, body = self.answer("/status.json")
        return json.loads(body)["connections"] if status == 200 else []

    def metric(self, name):
        """Returns the sum over a metric's labels."""
        found = re.findall(rf"(?m)^{name}(?:\{{.*\}})? (\S+)$", self.answer("/metrics")[1])
        expect(found, f"no metric {name}")
        return sum(float(value) for value in found)

    def resident(self, key="VmRSS"):
        """Returns memory of the process, in bytes."""
        status = pathlib.Path(f"/proc/{self.pid}/status").read_text()
        return int(re.search(rf"{key}:\s*(\d+) kB", status).group(1)) * 1024


class Rig:
    """The machines, and what runs on them."""

    def __init__(self, program, folder, archive, image):
        self.program, self.folder, self.archive, self.image = program, folder, archive, image
        self.processes = []
        self.make_network()
        self.pki = folder / "pki"
        for words in (
            ["init"],
            ["server", *NAMES, *ADDRESSES.values()],
            *(["client", client] for client in CLIENTS),
        ):
            run(program, "pki", *words, cwd=folder)
        self.server_tls = self.pki / "servers" / next(iter(NAMES))
        self.client_tls = [self.pki / "clients" / client for client in CLIENTS]
        for client in self.client_tls:
            shutil.copy(self.pki / "ca-cert.pem", client)
        self.store_folder = folder / "store"
        (self.store_folder / "v7").mkdir(parents=True)
        (self.store_folder / "v7" / EXPORT).symlink_to(archive)
        # As on a machine of its own, the file is in memory.
        self.archive_size = sum(len(block) for block in read_blocks(archive))
        with open(image, "rb") as file:
            self.content = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)

    def make_network(self):
        run("mount", "--make-rprivate", "/")
        run("mount", "-t", "tmpfs", "tmpfs", "/run")
        hosts = self.folder / "hosts"
        lines = [
            f"{ADDRESSES[machine]} {name}\n"
            for name, machines in NAMES.items()
            for machine in machines
        ]
        hosts.write_text("127.0.0.1 localhost\n" + "".join(lines))
        run("mount", "--bind", hosts, "/etc/hosts")
        run("ip", "link", "set", "lo", "up")
        run("ip", "link", "add", "lan", "type", "bridge")
        run("ip", "address", "add", f"{OBSERVER}/24", "dev", "lan")
        run("ip", "link", "set", "lan", "up")
        for number, (name, address) in enumerate([*ADDRESSES.items(), ("client", CLIENT)]):
            run("ip", "netns", "add", name)
            link = ["type", "veth", "peer", "name", "eth0", "netns", name]
            run("ip", "link", "add", f"port{number}", *link)
            run("ip", "link", "set", f"port{number}", "master", "lan", "up")
            run("ip", "-n", name, "link", "set", "lo", "up")
            length = 8 if name == "client" else 24
            run("ip", "-n", name, "address", "add", f"{address}/{length}", "dev", "eth0")
            self.connect(name)

    def connect(self, name):
        """Connects a machine to the network. A disconnected one has lost its routes."""
        run("ip", "-n", name, "link", "set", "eth0", "up")
        other = "192.0.2.0/24" if name == "client" else "10.0.0.0/8"
        run("ip", "-n", name, "route", "add", other, "dev", "eth0")

    def start(self, process):
        self.processes.append(process)
        return process

    def stop(self):
        """Stops everything that runs."""
        for process in reversed(self.processes):
            process.stop()
        self.processes.clear()

    def start_nginx(self, machine, http):
        folder = self.folder / f"nginx-{machine}"
        folder.mkdir(exist_ok=True)
        temporary = "".join(
            f"{kind}_temp_path {folder}/tmp_{kind};\n"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        (folder / "nginx.conf").write_text(
            f"user root;\ndaemon off;\nworker_processes 1;\npid {folder}/pid;\n"
            f"error_log {folder}/error.log;\nevents {{ worker_connections 1024; }}\n"
            f"http {{\n{temporary}keepalive_requests 1000000;\n{http}\n}}\n"
        )
        words = [find("nginx"), "-p", folder, "-c", folder / "nginx.conf", "-e", "stderr"]
        process = self.start(Process(within(machine, words), folder / "out"))
        port = 443 if machine == "store" else 8443
        process.wait_until(machine, lambda: accepts(ADDRESSES[machine], port))

    def start_store(self):
        """Starts nginx as the store, with an empty log."""
        self.store_log = self.folder / "store.log"
        self.store_log.write_text("")
        self.start_nginx(
            "store",
            "log_format traffic '$body_bytes_sent $status $request_method $uri $remote_addr';\n"
            f"access_log {self.store_log} traffic;\nsendfile on;\ntcp_nopush on;\n"
            f"server {{ listen 443 ssl; server_name store.example.org;\n"
            f"ssl_certificate {self.server_tls}/server-cert.pem;\n"
            f"ssl_certificate_key {self.server_tls}/server-key.pem;\n"
            f"root {self.store_folder}; autoindex on; }}",
        )

    def start_caches(self):
        """Starts the second-level cache of examples/nginx-slice.conf on two machines, empty."""
        for machine in ("cache-1", "cache-2"):
            slices = self.folder / f"slices-{machine}"
            shutil.rmtree(slices, ignore_errors=True)
            text = replaced(
                (ROOT / "examples/nginx-slice.conf").read_text(),
                ("/etc/nginx/hexz", str(self.server_tls), 2),
                ("/var/cache/nginx/hexz", str(slices), 1),
                ("/etc/ssl/certs/ca-certificates.crt", f"{self.pki}/ca-cert.pem", 2),
                ("min_free=10g", "min_free=1g", 1),
            )
            self.start_nginx(machine, f"access_log off;\n{text}")

    def start_balancer(self, gateways):
        """Starts HAProxy with examples/haproxy.cfg."""
        text = (ROOT / "examples/haproxy.cfg").read_text()
        (line,) = re.findall(r"(?m)^    server two .*$", text)
        expect(line.count(ADDRESSES["gateway-2"]) == 1, "haproxy.cfg")
        third = line.replace("two", "three").replace(ADDRESSES["gateway-2"], ADDRESSES["gateway-3"])
        lines = {"gateway-1": None, "gateway-2": line, "gateway-3": third}
        text = text.replace(line, "\n".join(lines[name] for name in gateways if lines[name]))
        socket_path = self.folder / "haproxy.sock"
        text = replaced(text, ("global\n", f"global\n    stats socket {socket_path}\n", 1))
        (self.folder / "haproxy.cfg").write_text(text)
        words = [find("haproxy"), "-db", "-f", self.folder / "haproxy.cfg"]
        process = self.start(Process(within("balancer", words), self.folder / "haproxy.log"))
        process.wait_until("balancer", lambda: self.servers_up() == len(gateways))

    def servers_up(self):
        """Returns the number of gateways that HAProxy sends clients to."""
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(self.folder / "haproxy.sock"))
                connection.sendall(b"show stat\n")
                text = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
        except OSError:
            return None
        rows = [line.split(",") for line in text.splitlines() if line.startswith("nbd,")]
        # A server that has answered once is "UP 1/3" until it counts as up.
        rows = [row for row in rows if row[1] not in ("FRONTEND", "BACKEND")]
        return sum(row[17] == "UP" for row in rows)

    def gateway(self, name, *arguments, url=STORE_URL, is_proxied=True):
        """Starts a gateway."""
        address = ADDRESSES[name]
        command = [self.program, "--listen", f"{address}:10809", "--monitor", f"{address}:10810"]
        command += ["--export-dir", url, "--store-ca", self.pki / "ca-cert.pem"]
        command += ["--tls-cert", self.server_tls / "server-cert.pem"]
        command += ["--tls-key", self.server_tls / "server-key.pem"]
        command += ["--tls-client-ca", self.pki / "ca-cert.pem"]
        command += ["--allow-identity", "dns:*.boot.example.org", "--max-connections", "1000"]
        command += ["--proxy-from", ADDRESSES["balancer"]] if is_proxied else []
        log = self.folder / f"{name}.log"
        return self.start(Gateway(name, [*command, *arguments], log))

    def uri(self, name="nbd.example.org"):
        return f"nbds://{name}/{EXPORT}?tls-certificates={self.client_tls[0]}"

    def sent(self):
        """Returns what the store has sent of the archive: requests, bytes, and the clients."""
        lines = [line.split() for line in self.store_log.read_text().splitlines()]
        lines = [line for line in lines if line[2] == "GET" and line[3] == f"/v7/{EXPORT}"]
        return len(lines), sum(int(line[0]) for line in lines), {line[4] for line in lines}


def replaced(text, *changes):
    """Returns the text with changes, each: before, after, how often it is expected."""
    for before, after, times in changes:
        expect(text.count(before) == times, f"{before} isn't {times} times in the example")
        text = text.replace(before, after)
    return text


def accepts(address, port):
    try:
        socket.create_connection((address, port), timeout=1).close()
    except OSError:
        return False
    return True


def read_blocks(path):
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            yield block


def mib(number):
    return f"{number / (1 << 20):.1f} MiB"
