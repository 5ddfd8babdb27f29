#!/usr/bin/env python3
"""Takes pictures of the status page in Chromium.

    tests/status-page/pictures.py PROGRAM FOLDER [--minutes N]
    tests/status-page/pictures.py PROGRAM FOLDER --check

PROGRAM is hexz-nbd. It is run in three states, each with the archives of tests/archives: quiet,
busy (clients read over TLS) and broken (damage, archives that can't be opened, certificates of the
server and of a client that expire, a rejected reload). FOLDER gets a picture of each state in five
widths, light and dark, and status-page.png, which docs/ shows. The longer the clients of the busy
state have read, the more the curves show; the default is one minute.

--check takes seconds: it clicks on what can be clicked, compares what the page shows then, and
takes one picture.

It needs chromium, libfaketime, nbdcopy and nbdsh, and nothing but Python's standard library.
"""

import argparse
import contextlib
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

from browser import PATIENCE, Browser

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
ARCHIVES = ROOT / "tests/archives"
WIDTHS = [360, 768, 1024, 1440, 2560]
# Width and height of the picture in docs/.
DOCUMENTED = (1265, 862)
# Age of the certificates that expire in five days, in days.
AGE = 85


class Gateway:
    """A running gateway with a monitor."""

    def __init__(self, program, arguments, folder):
        command = [program, "--listen", "127.0.0.1:0", "--monitor", "127.0.0.1:0", *arguments]
        self.process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        # Ends the loop below.
        late = threading.Timer(PATIENCE, self.process.kill)
        late.start()
        try:
            self.port, self.monitor = self.read_addresses()
        except BaseException:
            self.__exit__()
            raise
        finally:
            late.cancel()
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    def read_addresses(self):
        """Returns the port and the URL of the monitor, which the first line of the log has."""
        log = []
        for line in self.process.stderr:
            log.append(line)
            if " ready: " in line:
                port = re.search(r' listen="?127\.0\.0\.1:(\d+)', line)
                monitor = re.search(r' monitor="?([^" \n]+)', line)
                if port and monitor:
                    return int(port.group(1)), f"http://{monitor.group(1)}/"
        raise RuntimeError(f"the gateway doesn't say where it listens: {''.join(log)}")

    def __enter__(self):
        return self

    def __exit__(self, *_error):
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

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        for process in self.processes:
            process.terminate()
            process.wait()


def certify(program, folder, clients, is_old):
    """Creates a CA, a server and clients. If they are old, server and first client expire soon."""

    def pki(*arguments, age=0):
        command = [program, "pki", "--dir", folder / "pki", *arguments]
        environment = dict(os.environ)
        if age:
            library = next(pathlib.Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
            environment |= {"LD_PRELOAD": str(library), "FAKETIME": f"-{age}d"}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)

    age = AGE if is_old else 0
    pki("init", age=age)
    pki("server", "--days", str(AGE + 5 if is_old else 397), "localhost", age=age)
    for number in range(clients):
        arguments = ["client", "--days", str(AGE + 5), f"client{number}.example.org"]
        pki(*arguments, age=age if number == 0 else 0)
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


def quiet(program, folder, _seconds, stack):
    gateway = stack.enter_context(Gateway(program, [ARCHIVES / "base-zstd.hxz"], folder))
    time.sleep(12)
    return gateway


def busy(program, folder, seconds, stack, is_old=False, more=()):
    names = fill(folder / "snapshots")
    tls = certify(program, folder, len(names), is_old)
    arguments = [*tls, "--export-dir", str(folder / "snapshots"), "--allow", "127.0.0.1", *more]
    arguments += ["--audit", str(folder / "audit.jsonl")]
    gateway = stack.enter_context(Gateway(program, arguments, folder))
    # Lengths of reads, and pauses between them.
    reads = [(262144, 0.01), (65536, 0.02), (65536, 0.05), (131072, 0.1), (4096, 0.01)]
    exports = [(name, *read) for name, read in zip(names, reads)]
    stack.enter_context(Clients(gateway.port, folder / "pki", exports))
    time.sleep(seconds)
    return gateway


def broken(program, folder, seconds, stack):
    config = folder / "hexz-nbd.toml"
    config.write_text(f'export-dir = "{folder}/snapshots"\n')
    more = ["--config", str(config)]
    gateway = busy(program, folder, min(seconds, 60), stack, is_old=True, more=more)
    snapshots = folder / "snapshots"
    # No other archive has these blocks, which would be in the cache.
    damaged = bytearray((ARCHIVES / "fixed-64k-zstd.hxz").read_bytes())
    damaged[4096 + 30] ^= 0x10
    (snapshots / "damagedblock.hxz").write_bytes(damaged)
    (snapshots / "broken.hxz").write_bytes(b"junk" * 1000)
    shutil.copy(ARCHIVES / "child-zstd.hxz", snapshots / "thin.hxz")
    (snapshots / "Old.HXZ").write_bytes(b"")
    client = folder / "pki/clients/client0.example.org"
    for name in ["damagedblock.hxz", "damagedblock.hxz", "broken.hxz", "thin.hxz", "gone.hxz"]:
        uri = f"nbds://localhost:{gateway.port}/{name}?tls-certificates={client}"
        subprocess.run(["nbdcopy", uri, "null:"], stderr=subprocess.DEVNULL, check=False)
    # A client that doesn't trust the server, and one without a certificate.
    for uri in ["nbds://localhost:{}/", f"nbds://localhost:{{}}/?tls-certificates={folder}/pki"]:
        command = ["nbdinfo", "--size", uri.format(gateway.port)]
        subprocess.run(command, capture_output=True, check=False)
    config.write_text("alow = '192.0.2.0/24'\n")
    os.kill(gateway.process.pid, signal.SIGHUP)
    time.sleep(5)
    return gateway


def take_all(program, browser, folder, seconds):
    """Takes pictures of all states."""
    for state in (quiet, busy, broken):
        with contextlib.ExitStack() as stack:
            work = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
            gateway = state(program, work, seconds, stack)
            browser.call("Page.navigate", url=gateway.monitor)
            # Rates in tables are those of some seconds.
            time.sleep(12)
            if state is busy:
                width, height = DOCUMENTED
                browser.picture(folder / "status-page.png", width, "light", height)
            if state is broken:
                browser.evaluate("document.querySelector('details').open = true")
            for width in WIDTHS:
                for scheme in ("light", "dark"):
                    name = f"{state.__name__}-{width}-{scheme}.png"
                    browser.picture(folder / name, width, scheme)
            # Its requests would fail when the gateway has ended.
            browser.call("Page.navigate", url="about:blank")


def check(program, browser, folder):
    """Clicks on what can be clicked, compares what the page shows, and takes a picture."""

    def expect(what, script, expected):
        browser.wait(f"JSON.stringify({script}) === JSON.stringify({json.dumps(expected)})")
        print(f"{what}: {expected}")

    with contextlib.ExitStack() as stack:
        work = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        fill(work / "snapshots")
        (work / "snapshots/Old.HXZ").write_bytes(b"")
        arguments = ["--export-dir", work / "snapshots"]
        sizes = {"beta": "base-zstd", "alpha": "fixed-4k-zstd", "x" * 50: "text-dict-zstd"}
        arguments += [f"{name}={ARCHIVES}/{archive}.hxz" for name, archive in sizes.items()]
        gateway = stack.enter_context(Gateway(program, arguments, work))
        browser.show(WIDTHS[0], 800, "light")
        browser.call("Page.navigate", url=gateway.monitor)
        browser.wait("document.querySelectorAll('#exports tbody tr').length === 3")

        column = "document.querySelectorAll('#exports thead button')[{}]"
        order = "[...document.querySelectorAll('#exports thead th')][{}].ariaSort"
        cells = "[...document.querySelectorAll('#exports tbody td.first')].map(it => it.textContent)"
        names = sorted(sizes)
        browser.click(column.format(0))
        expect("order of names", cells, names)
        expect("mark", order.format(0), "ascending")
        browser.click(column.format(0))
        expect("order after a second click", cells, names[::-1])
        expect("mark", order.format(0), "descending")
        browser.click(column.format(0))
        expect("order after a third click", cells, names)

        details = "document.querySelector('#contents-section details')"
        expect("folder contents are open", f"{details}.open", False)
        browser.click(f"{details}.querySelector('summary')")
        expect("after a click", f"{details}.open", True)
        rows = "[...document.querySelectorAll('#contents div')].map(it => it.innerText.split('\\n'))"
        files = sorted(path.name for path in (work / "snapshots").glob("*.hxz"))
        unserved = ["Old.HXZ", "not served: extension isn't in lower case"]
        expect("contents", rows, [[name, "not open"] for name in files] + [unserved])

        long = "document.querySelector('#exports tbody tr:last-child td')"
        expect("a long name is cut off", f"{long}.scrollWidth > {long}.clientWidth", True)
        browser.evaluate(f"{long}.dispatchEvent(new MouseEvent('mouseover', {{ bubbles: true }}))")
        expect("title", f"{long}.title", names[-1])
        browser.picture(folder / "check.png", WIDTHS[0], "light")
        browser.call("Page.navigate", url="about:blank")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program", type=pathlib.Path)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    # All that was started is ended.
    signal.signal(signal.SIGTERM, lambda *_: exit("terminated"))
    program = options.program.resolve()
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        with Browser(profile) as browser:
            if options.check:
                check(program, browser, options.folder)
            else:
                take_all(program, browser, options.folder, 60 * options.minutes)
    if browser.console:
        raise SystemExit(f"the console has messages: {json.dumps(browser.console, indent=1)}")


if __name__ == "__main__":
    main()
