"""Runs examples/nginx-slice.conf: gateways, two cache machines, and nginx as the store.

Everything is on loopback, and slices are 64 KiB instead of 1 MiB, since the archives are small;
otherwise only names, ports and files differ from the example.
"""

import concurrent.futures
import filecmp
import http.client
import os
import pathlib
import re
import shutil
import socket
import ssl
import subprocess
import tempfile
import time

SLICE = 64 * 1024
CLIENTS = 20
GATEWAYS = 3
ARCHIVE, OTHER = "text-dict-zstd.hxz", "fixed-4k-zstd.hxz"
# Time for which the store's object is believed.
VALID = 2


class Failure(Exception):
    """The cache doesn't behave as expected."""


def expect(condition, what):
    if not condition:
        raise Failure(what)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Process:
    """A process that is terminated at the end."""

    def __init__(self, command, log, **options):
        self.log = log
        with open(log, "ab") as out:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, **options
            )

    def wait_for(self, pattern):
        for _ in range(200):
            text = self.log.read_text(errors="replace")
            if found := re.search(pattern, text):
                return found
            expect(self.process.poll() is None, f"{self.process.args}: {text}")
            time.sleep(0.05)
        raise Failure(f"{self.process.args}: no {pattern} in {self.log.read_text()}")

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(30)


class Rig:
    """The store, the caches and the gateways."""

    def __init__(self, root, program, folder, slice_size=SLICE):
        self.program, self.folder, self.processes = program, folder, []
        self.nginx = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin")
        expect(self.nginx, "nginx isn't installed")
        self.example = (root / "examples/nginx-slice.conf").read_text()
        self.store = folder / "store"
        (self.store / "v7").mkdir(parents=True)
        self.store_port = free_port()
        self.ports = [(free_port(), free_port()) for _ in range(2)]
        self.slice = slice_size
        self.run("pki", "init")
        self.run("pki", "server", "localhost", "127.0.0.1")

    def run(self, *words):
        subprocess.run([self.program, *words], cwd=self.folder, check=True, capture_output=True)

    def start_nginx(self, name, http):
        folder = self.folder / name
        folder.mkdir()
        temporary = "".join(
            f"{kind}_temp_path {folder}/tmp_{kind};\n"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        user = "user root;\n" if os.geteuid() == 0 else ""
        (folder / "nginx.conf").write_text(
            f"{user}daemon off;\nworker_processes 2;\npid {folder}/pid;\n"
            f"error_log {folder}/error.log;\n"
            f"events {{ worker_connections 512; }}\nhttp {{\n{temporary}{http}\n}}\n"
        )
        command = [
            self.nginx,
            "-c",
            folder / "nginx.conf",
            "-p",
            folder,
            "-e",
            folder / "error.log",
        ]
        tested = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)
        expect(tested.returncode == 0 and "warn" not in tested.stderr, f"nginx -t: {tested.stderr}")
        process = Process(command, folder / "out")
        self.processes.append(process)
        return process

    def start_store(self):
        log = self.folder / "store.log"
        self.start_nginx(
            "store-nginx",
            f'log_format t "$status $body_bytes_sent $uri";\naccess_log {log} t;\n'
            f"server {{ listen 127.0.0.1:{self.store_port}; root {self.store}; autoindex on; }}",
        )

    def start_caches(self):
        for number, (for_gateways, for_caches) in enumerate(self.ports):
            folder = self.folder / f"cache-{number}"
            changed = self.example
            for before, after, times in (
                (r"listen 8443 ssl;", f"listen 127.0.0.1:{for_gateways} ssl;", 1),
                (r"listen 8081;", f"listen 127.0.0.1:{for_caches};", 1),
                (r"cache-1\.example\.org:8081", f"127.0.0.1:{self.ports[0][1]}", 1),
                (r"cache-2\.example\.org:8081", f"127.0.0.1:{self.ports[1][1]}", 1),
                (
                    r"server store\.example\.org:443",
                    f"server 127.0.0.1:{self.store_port}",
                    1,
                ),
                (r"https://hexz_store", "http://hexz_store", 2),
                (r"/etc/nginx/hexz", f"{self.folder}/pki/servers/localhost", 2),
                (r"/var/cache/nginx/hexz", f"{folder}/slices", 1),
                (r"allow 192\.0\.2\.0/24;", "allow 127.0.0.1;", 2),
                (r"min_free=10g", "min_free=1k", 1),
                (r"200 206 1m", f"200 206 {VALID}s", 1),
                (r"slice 1m;", f"slice {self.slice};", 2),
            ):
                changed, count = re.subn(before, after, changed)
                expect(count == times, f"{before} is {count} times in the example")
            self.start_nginx(f"cache-{number}", f"access_log off;\n{changed}")

    def start_gateway(self, number, *arguments):
        url = f"https://127.0.0.1:{self.ports[number % 2][0]}/v7/"
        command = [
            self.program,
            "--listen",
            "127.0.0.1:0",
            "--fresh-for",
            "1s",
            "--export-dir",
            url,
        ]
        command += [
            "--store-ca",
            self.folder / "pki/ca-cert.pem",
            "--store-timeout",
            "10s",
            *arguments,
        ]
        process = Process(command, self.folder / f"gateway-{number}-{len(self.processes)}.log")
        self.processes.append(process)
        return process, process.wait_for(r'ready: .*listen="?([0-9.:]+)').group(1)

    def put(self, source, name):
        shutil.copy(source, self.store / "v7/.new")
        (self.store / "v7/.new").rename(self.store / "v7" / name)

    def sent(self, name):
        """Returns the number of requests for an object, and the bytes sent."""
        lines = (self.folder / "store.log").read_text().splitlines()
        lines = [line for line in lines if line.endswith(f"/{name}")]
        return len(lines), sum(int(line.split()[1]) for line in lines)

    def copy(self, address, name, file):
        command = ["nbdcopy", f"nbd://{address}/{name}", file]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

    def stop(self):
        for process in reversed(self.processes):
            process.stop()


def check(root, program, _tools):
    with tempfile.TemporaryDirectory(prefix="hexz-nbd-slice-") as temporary:
        rig = Rig(root, program, pathlib.Path(temporary))
        try:
            yield from checks(root, rig)
        except Failure as error:
            logs = [*rig.folder.glob("gateway*.log"), *rig.folder.glob("*/error.log")]
            texts = "".join(f"{log.name}:\n{log.read_text()[-2000:]}\n" for log in logs)
            raise Failure(f"{error}\n{texts}") from error
        finally:
            rig.stop()


def checks(root, rig):
    archives = root / "tests/archives"
    expected = {}
    for name in (ARCHIVE, OTHER):
        expected[name] = rig.folder / f"{name}.img"
        command = ["nbdcopy", "--", "[", rig.program, archives / name, "]", expected[name]]
        subprocess.run(command, check=True, capture_output=True)
    rig.start_store()
    rig.start_caches()
    rig.put(archives / ARCHIVE, "disk.hxz")
    gateways = [rig.start_gateway(number) for number in range(GATEWAYS)]

    # Many clients, all caches cold.
    def copy(number):
        file = rig.folder / f"copy-{number}"
        done = rig.copy(gateways[number % GATEWAYS][1], "disk.hxz", file)
        expect(done.returncode == 0, f"nbdcopy: {done.stderr}")
        expect(filecmp.cmp(file, expected[ARCHIVE], shallow=False), "wrong bytes")
        file.unlink()

    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(copy, range(CLIENTS)))
    size = (archives / ARCHIVE).stat().st_size
    requests, sent = rig.sent("disk.hxz")
    slices = -(-size // SLICE)
    expect(sent <= size * 1.05, f"{sent} bytes at the store for an object of {size}")
    expect(requests <= slices * 1.5 + 4, f"{requests} requests for {slices} slices")
    kept = [len([*(rig.folder / f"cache-{n}/slices").rglob("?" * 32)]) for n in range(2)]
    expect(sum(kept) == slices and min(kept) > 0, f"slices are kept: {kept}")
    yield (
        f"{CLIENTS} clients of {GATEWAYS} gateways, cold: {requests} requests and "
        f"{sent / size:.2f} times the object at the store"
    )

    ranges_and_validators(rig, archives)
    yield "ranges are exact, the ETag is the store's, nothing is compressed"

    # A replaced object. Until its slices are revalidated, reads may fail, but are never wrong.
    rig.put(archives / OTHER, "disk.hxz")
    results = {"old": 0, "new": 0, "error": 0}
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not results["new"]:
        file = rig.folder / "copy"
        done = rig.copy(gateways[results["error"] % GATEWAYS][1], "disk.hxz", file)
        if done.returncode != 0:
            results["error"] += 1
        elif filecmp.cmp(file, expected[ARCHIVE], shallow=False):
            results["old"] += 1
        else:
            expect(filecmp.cmp(file, expected[OTHER], shallow=False), "a mixture of two versions")
            results["new"] += 1
        time.sleep(0.2)
    expect(results["new"], f"the new object isn't served: {results}")
    yield f"a replaced object: {results['old']} reads of the old one, {results['error']} errors"

    # One cache machine fails; the other one is asked.
    rig.processes[1].stop()
    _, address = rig.start_gateway(1)
    done = rig.copy(address, "disk.hxz", rig.folder / "copy")
    expect(done.returncode == 0, f"after the failure of a cache: {done.stderr}")
    expect(filecmp.cmp(rig.folder / "copy", expected[OTHER], shallow=False), "wrong bytes")
    yield "a cache machine fails: its slices come from the other one"


def ranges_and_validators(rig, archives):
    """Compares responses with those of the store."""
    content = (archives / ARCHIVE).read_bytes()
    context = ssl.create_default_context(cafile=rig.folder / "pki/ca-cert.pem")

    def request(port, headers, secure=True):
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        options = {"context": context} if secure else {}
        connection = kind("127.0.0.1", port, timeout=30, **options)
        connection.request("GET", "/v7/disk.hxz", headers=headers)
        response = connection.getresponse()
        body = response.read()
        connection.close()
        return response, body

    for first, last in (
        (0, 0),
        (1, SLICE),
        (SLICE - 1, 3 * SLICE),
        (len(content) - 5, len(content) + 9),
    ):
        headers = {"Range": f"bytes={first}-{last}", "Accept-Encoding": "gzip"}
        theirs, _ = request(rig.store_port, headers, secure=False)
        response, body = request(rig.ports[0][0], headers)
        what = f"{first}-{last}: {response.status} {response.headers}"
        expect(response.status == theirs.status == 206, what)
        for name in ("ETag", "Content-Range", "Content-Length", "Last-Modified"):
            expect(response.headers[name] == theirs.headers[name], what)
        expect(response.headers["Content-Encoding"] is None, what)
        expect(body == content[first : last + 1], f"{what}: wrong bytes")
    etag = theirs.headers["ETag"]
    response, _ = request(rig.ports[0][0], {"If-None-Match": etag, "Range": "bytes=0-9"})
    expect(response.status in (206, 304), f"If-None-Match: {response.status}")
