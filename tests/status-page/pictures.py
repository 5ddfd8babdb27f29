#!/usr/bin/env python3
"""Takes pictures of the status page in Chromium.

    tests/status-page/pictures.py PROGRAM FOLDER [--minutes N]

PROGRAM is hexz-nbd. It is run in three states, each with the archives of tests/archives: quiet,
busy (clients read over TLS) and broken (damage, archives that can't be opened, a certificate that
expires, a failed reload). FOLDER gets a picture of each state in five widths,
light and dark, and status-page.png, which docs/ shows. The longer the clients have read, the more
the curves show; the default is one minute.

It needs chromium, nbdcopy and nbdsh, and nothing but Python's standard library.
"""

import argparse
import base64
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
ARCHIVES = ROOT / "tests/archives"
WIDTHS = [360, 768, 1024, 1440, 2560]
# Width and height of the picture in docs/.
DOCUMENTED = (1265, 862)


class Browser:
    """A browser without a window, which is driven through a pipe."""

    def __init__(self, profile):
        self.requests, requests = os.pipe()
        responses, self.responses = os.pipe()
        command = ["chromium", "--headless=new", "--remote-debugging-pipe", "--no-sandbox"]
        command += ["--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars"]
        command += ["--ignore-certificate-errors", f"--user-data-dir={profile}", "about:blank"]

        def connect():
            # The browser expects its pipes at descriptors 3 and 4.
            os.dup2(os.dup(self.requests), 3)
            os.dup2(os.dup(self.responses), 4)
            os.set_inheritable(3, True)
            os.set_inheritable(4, True)

        self.process = subprocess.Popen(
            command, preexec_fn=connect, close_fds=False, stderr=subprocess.DEVNULL
        )
        self.write = os.fdopen(requests, "wb", buffering=0)
        self.read = os.fdopen(responses, "rb")
        self.number, self.session, self.console = 0, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        self.call("Page.enable")
        self.call("Log.enable")
        self.call("Runtime.enable")

    def call(self, method, **parameters):
        self.number += 1
        request = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            request["sessionId"] = self.session
        self.write.write(json.dumps(request).encode() + b"\0")
        while True:
            message = self.receive()
            if message.get("id") == self.number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]

    def receive(self):
        text = bytearray()
        while (byte := self.read.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("the browser has ended")
            text += byte
        message = json.loads(text)
        if message.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown"):
            self.console.append(message["params"])
        return message

    def evaluate(self, script):
        return self.call("Runtime.evaluate", expression=script)["result"].get("value")

    def show(self, width, height, scheme):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def picture(self, path, width, scheme, height=None):
        self.show(width, height or 800, scheme)
        whole = height is None
        if whole:
            self.show(width, self.evaluate("document.documentElement.scrollHeight"), scheme)
        overflow = self.evaluate("document.documentElement.scrollWidth > innerWidth")
        if overflow:
            raise RuntimeError(f"{path.name}: the page is wider than the window")
        time.sleep(0.5)
        taken = self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(taken["data"]))

    def close(self):
        self.process.kill()
        self.process.wait()


class Gateway:
    """A running gateway with a monitor."""

    def __init__(self, program, arguments, folder):
        command = [program, "--listen", "127.0.0.1:0", "--monitor", "0", *arguments]
        self.process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self.monitor = self.port = None
        log = []
        for line in self.process.stderr:
            log.append(line)
            if found := re.search(r"monitor started monitor=\"?([^\" \n]+)", line):
                self.monitor = f"http://{found.group(1)}/"
            if found := re.search(r"ready: .*listen=\"?127.0.0.1:(\d+)", line):
                self.port = int(found.group(1))
                break
        if not (self.monitor and self.port):
            raise RuntimeError(f"the gateway doesn't start: {''.join(log)}")
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    def close(self):
        self.process.terminate()
        self.process.wait()


class Clients:
    """Clients that read random parts of one export each until they are closed."""

    READ = """
import random, time
h.set_uri_allow_local_file(True)
h.connect_uri("{uri}")
size = h.get_size()
while True:
    h.pread({length}, random.randrange((size - {length}) // 512) * 512)
    time.sleep({pause} * random.uniform(0.5, 1.5))
"""

    def __init__(self, port, authority, exports):
        self.processes = []
        for number, (export, length, pause) in enumerate(exports):
            client = authority / "clients" / f"client{number}.example.org"
            uri = f"nbds://localhost:{port}/{export}?tls-certificates={client}"
            script = self.READ.format(uri=uri, length=length, pause=pause)
            command = ["nbdsh", "--command", script]
            # nbdsh needs Debian's Python.
            environment = {**os.environ, "PATH": "/usr/bin:" + os.environ["PATH"]}
            process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
            self.processes.append(process)

    def close(self):
        for process in self.processes:
            process.terminate()
            process.wait()


def certify(program, folder, days, clients):
    def pki(*arguments):
        command = [program, "pki", "--dir", folder / "pki", *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    pki("init")
    pki("server", "--days", str(days), "localhost")
    for number in range(clients):
        pki("client", f"client{number}.example.org")
    server = folder / "pki/servers/localhost"
    files = [("cert", server / "server-cert.pem"), ("key", server / "server-key.pem")]
    files += [("client-ca", folder / "pki/ca-cert.pem"), ("client-crl", folder / "pki/crl.pem")]
    return [word for name, path in files for word in (f"--tls-{name}", str(path))]


def fill(folder):
    """Fills an export folder with archives under names that somebody could have given them."""
    names = {
        "web-server": "base-zstd",
        "database-2026-11-29": "signed-zstd",
        "database-2026-11-30": "fixed-4k-zstd",
        "mail": "base-lz4",
        "desktop": "sparse-zstd",
        "archive": "text-dict-zstd",
    }
    folder.mkdir()
    for name, archive in names.items():
        shutil.copy(ARCHIVES / f"{archive}.hxz", folder / f"{name}.hxz")
    return [f"{name}.hxz" for name in names]


def quiet(program, folder, _seconds):
    gateway = Gateway(program, [str(ARCHIVES / "base-zstd.hxz")], folder)
    time.sleep(12)
    return gateway, None


def busy(program, folder, seconds, days=397, more=()):
    names = fill(folder / "snapshots")
    tls = certify(program, folder, days, len(names))
    arguments = [*tls, "--export-dir", str(folder / "snapshots"), "--allow", "127.0.0.1", *more]
    arguments += ["--audit", str(folder / "audit.jsonl")]
    gateway = Gateway(program, arguments, folder)
    # Lengths of reads, and pauses between them.
    reads = [(262144, 0.01), (65536, 0.02), (65536, 0.05), (131072, 0.1), (4096, 0.01)]
    exports = [(name, *read) for name, read in zip(names, reads)]
    clients = Clients(gateway.port, folder / "pki", exports)
    time.sleep(seconds)
    return gateway, clients


def broken(program, folder, seconds):
    config = folder / "hexz-nbd.toml"
    config.write_text(f'export-dir = "{folder}/snapshots"\n')
    gateway, clients = busy(program, folder, seconds, days=5, more=["--config", str(config)])
    snapshots = folder / "snapshots"
    # No other archive has these blocks, which would be in the cache.
    damaged = bytearray((ARCHIVES / "fixed-64k-zstd.hxz").read_bytes())
    damaged[4096 + 30] ^= 0x10
    (snapshots / "files.hxz").write_bytes(damaged)
    (snapshots / "broken.hxz").write_bytes(b"junk" * 1000)
    shutil.copy(ARCHIVES / "child-zstd.hxz", snapshots / "thin.hxz")
    (snapshots / "Old.HXZ").write_bytes(b"")
    client = folder / "pki/clients/client0.example.org"
    for name in ["files.hxz", "files.hxz", "broken.hxz", "thin.hxz"]:
        uri = f"nbds://localhost:{gateway.port}/{name}?tls-certificates={client}"
        subprocess.run(["nbdcopy", uri, "null:"], stderr=subprocess.DEVNULL, check=False)
    config.write_text("alow = '192.0.2.0/24'\n")
    os.kill(gateway.process.pid, signal.SIGHUP)
    time.sleep(5)
    return gateway, clients


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program", type=pathlib.Path)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--minutes", type=float, default=1)
    options = parser.parse_args()
    program = options.program.resolve()
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(profile)
        try:
            for state in (quiet, busy, broken):
                with tempfile.TemporaryDirectory() as folder:
                    gateway, clients = state(program, pathlib.Path(folder), 60 * options.minutes)
                    try:
                        browser.call("Page.navigate", url=gateway.monitor)
                        # Rates in tables are those of some seconds.
                        time.sleep(12)
                        for width in WIDTHS:
                            for scheme in ("light", "dark"):
                                name = f"{state.__name__}-{width}-{scheme}.png"
                                browser.picture(options.folder / name, width, scheme)
                        if state is busy:
                            width, height = DOCUMENTED
                            path = options.folder / "status-page.png"
                            browser.picture(path, width, "light", height)
                    finally:
                        browser.call("Page.navigate", url="about:blank")
                        if clients:
                            clients.close()
                        gateway.close()
        finally:
            browser.close()
    if browser.console:
        raise SystemExit(f"the console has messages: {json.dumps(browser.console, indent=1)}")


if __name__ == "__main__":
    main()
