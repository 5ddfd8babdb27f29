"""Gateways that are killed or restarted under qemu with reconnect-delay."""

import filecmp
import json
import signal
import statistics
import subprocess
import sys
import threading
import time

from rig import CLIENTS, EXPORT, GATEWAYS, Failure, Process, accepts, expect, find, mib
from rig import ROOT, run, wait_for, within

RESTARTS = 20
# With as many on each gateway, `leastconn` prefers a gateway that has none because it is down.
MACHINES = 9
MOST_SECONDS = 2
# Time for which a killed gateway stays away, in seconds: what a service manager waits, or longer.
AWAY = (0.1, 5)
DRAIN_DELAY = 3
# Time for which a machine is lost, in seconds.
LOST = 15
# Time without any restart, in seconds, which shows the delays of a busy machine.
CALM = 10
# So that blocks come from disk, and from the store if they are lost.
SMALL = ("--cache-size", "64MiB", "--disk-cache-size", "1GiB", "--disk-cache")


class Readers:
    """Machines that read from their disks, and copies of the image, one after another."""

    def __init__(self, rig, host):
        self.rig, self.host = rig, host
        self.socket = rig.folder / "disk.sock"
        self.socket.unlink(missing_ok=True)
        tls = ["--object", f"tls-creds-x509,id=tls,endpoint=client,dir={rig.client_tls[1]}"]
        command = [find("qemu-storage-daemon"), *tls]
        for number in range(MACHINES):
            disk = {
                "driver": "nbd",
                "read-only": True,
                "node-name": f"disk-{number}",
                "server": {"type": "inet", "host": host, "port": "10809"},
                "export": EXPORT,
                "tls-creds": "tls",
                "reconnect-delay": 60,
            }
            command += ["--blockdev", json.dumps(disk)]
        command += ["--nbd-server", f"addr.type=unix,addr.path={self.socket},max-connections=0"]
        for number in range(MACHINES):
            export = f"type=nbd,id=disk-{number},node-name=disk-{number},name={number}"
            command += ["--export", export]
        log = rig.folder / "qemu.log"
        self.qemu = rig.start(Process(within("client", command), log))
        self.qemu.wait_until("qemu's socket", self.socket.exists)
        log = rig.folder / "reader.log"
        log.write_text("")
        script = ROOT / "tests/fleet/reader.py"
        command = [sys.executable, script, self.socket, rig.image, MACHINES]
        self.reader = Process(command, log, stdout=subprocess.PIPE)
        rig.start(self.reader)
        self.reader.wait_until("reader", lambda: "connected" in self.reader.text())
        self.copies, self.problems = 0, []
        self.is_ending = threading.Event()
        self.copying = threading.Thread(target=self.copy_repeatedly)
        self.copying.start()

    def copy_repeatedly(self):
        """Copies the image with qemu-img, and compares the copy, until the end."""
        tls = f"tls-creds-x509,id=tls,endpoint=client,dir={self.rig.client_tls[0]}"
        source = f"driver=nbd,server.type=inet,server.host={self.host},server.port=10809"
        source += f",export={EXPORT},tls-creds=tls,reconnect-delay=60,open-timeout=60"
        copy = self.rig.folder / "copy.img"
        command = [find("qemu-img"), "convert", "--object", tls, "--image-opts", source]
        command += ["-r", "40M", "-O", "raw", copy]
        while not self.is_ending.is_set():
            done = subprocess.run(
                within("client", command), capture_output=True, text=True, check=False
            )
            if done.returncode != 0:
                self.problems.append(f"qemu-img: {done.stderr}")
            elif not filecmp.cmp(copy, self.rig.image, shallow=False):
                self.problems.append("qemu-img: other bytes")
            else:
                self.copies += 1

    def end(self):
        """Returns what the reader has found."""
        self.is_ending.set()
        self.reader.process.send_signal(signal.SIGTERM)
        found = json.loads(self.reader.process.communicate(timeout=60)[0])
        self.copying.join()
        expect(not self.problems, f"{self.problems}")
        expect(not found["errors"], f"read errors: {found['errors']}")
        expect(found["wrong"] == 0, f"{found['wrong']} wrong reads")
        return found


def gaps_after(found, times):
    """Returns the largest gap between reads after each time, in seconds."""
    ends = [*times[1:], float("inf")]
    return [
        max([gap for at, gap in found["gaps"] if start < at + gap <= end], default=0)
        for start, end in zip(times, ends)
    ]


def calm():
    """Waits for some time, and returns its begin."""
    begin = time.monotonic()
    time.sleep(CALM)
    return begin


def describe(found, readers, gaps, sent):
    """Describes the delays, of which the first one is without a restart. `sent` are the bytes from
    the store at each restart, and at the end."""
    longest = f"{max(gaps[1:]):.2f} s (median {statistics.median(gaps[1:]):.2f} s, "
    longest += f"without a restart {gaps[0]:.2f} s)"
    text = f"longest delay {longest}; {found['reads']} reads and {readers.copies} copies"
    late = mib(sent[-1] - sent[RESTARTS // 2])
    return f"{text} right, 0 errors; {late} from the store during the later half"


def check(rig):
    yield from behind_a_balancer(rig)
    yield from alone(rig)


def behind_a_balancer(rig):
    rig.start_store()

    def start(name):
        options = [*SMALL, rig.folder / f"disk-{name}", "--drain-delay", f"{DRAIN_DELAY}s"]
        return rig.gateway(name, *options)

    gateways = {name: start(name) for name in GATEWAYS}
    for gateway in gateways.values():
        gateway.wait_until_ready()
    rig.start_balancer(GATEWAYS)
    readers = Readers(rig, "nbd.example.org")

    def serving():
        """Returns the gateway with most of the machines, if all are connected."""
        counts = {gateway: machines_of(gateway) for gateway in gateways.values()}
        return max(counts, key=counts.get) if sum(counts.values()) == MACHINES else None

    def restarted(number):
        is_killed = number % 2 == 0
        gateway = wait_for("connections of all machines", serving, 90)
        sent.append(rig.sent()[1])
        begin = time.monotonic()
        if is_killed:
            gateway.end(signal.SIGKILL)
            time.sleep(AWAY[number // 2 % 2])
        else:
            drain(gateway)
        gateways[gateway.name] = start(gateway.name)
        gateways[gateway.name].wait_until_ready()
        wait_for("balancer that uses all gateways", lambda: rig.servers_up() == len(GATEWAYS))
        wait_for("connections of all machines", serving, 90)
        time.sleep(0.5)
        return begin

    def lost():
        """Disconnects a gateway from the network for some time."""
        gateway = wait_for("connections of all machines", serving, 90)
        begin = time.monotonic()
        run("ip", "-n", gateway.name, "link", "set", "eth0", "down")
        time.sleep(LOST)
        rig.connect(gateway.name)
        return begin

    sent = []
    times = [calm(), *(restarted(number) for number in range(RESTARTS))]
    sent.append(rig.sent()[1])
    times.append(lost())
    found = readers.end()
    gaps = gaps_after(found, times)
    rig.stop()
    bound = f"at most {MOST_SECONDS} s, no error"
    for what, of_kind in (
        ("`kill -9`", [gaps[0], *gaps[1:-1:2]]),
        ("SIGTERM", [gaps[0], *gaps[2:-1:2]]),
    ):
        text = describe(found, readers, of_kind, sent)
        what = f"{len(of_kind) - 1} times {what} on that of three gateways with most machines"
        yield what, text, bound, max(of_kind[1:]) <= MOST_SECONDS
    text = f"longest delay {gaps[-1]:.2f} s, 0 errors"
    yield "a gateway's machine that is lost: its network is disconnected", text, "no error", True


def machines_of(gateway):
    """Returns the number of machines that are connected to a gateway."""
    identities = [connection["identity"] or "" for connection in gateway.connections()]
    return sum(CLIENTS[1] in identity for identity in identities)


def drain(gateway):
    """Restarts as in a rolling update: not ready, but accepting; then gone, with status 0."""
    gateway.process.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    wait_for("unreadiness", lambda: gateway.answer("/readyz")[0] == 503, 2)
    expect(accepts(gateway.address, 10809), "a gateway that isn't ready accepts no connections")
    status = gateway.process.wait(60)
    seconds = time.monotonic() - begin
    expect(status == 0, f"it ends with {status}")
    expect(DRAIN_DELAY <= seconds <= DRAIN_DELAY + 12, f"it ends after {seconds:.1f} s")


def alone(rig):
    """One gateway without a balancer, which its service manager restarts at once."""
    rig.start_store()
    name = GATEWAYS[0]

    def start():
        return rig.gateway(name, *SMALL, rig.folder / f"disk-{name}", is_proxied=False)

    gateway = start()
    gateway.wait_until_ready()
    readers = Readers(rig, f"{name}.example.org")
    times, sent, signals = [calm()], [], (signal.SIGKILL, signal.SIGTERM)
    for number in range(RESTARTS):
        wait_for("clients", lambda: machines_of(gateway) == MACHINES, 90)
        time.sleep(0.5)
        sent.append(rig.sent()[1])
        times.append(time.monotonic())
        status = gateway.end(signals[number % 2])
        if status not in (0, -signal.SIGKILL):
            raise Failure(f"it ends with {status}: {gateway.text()[-2000:]}")
        time.sleep(AWAY[0])
        gateway = start()
        gateway.wait_until_ready()
    wait_for("clients", lambda: machines_of(gateway) == MACHINES, 90)
    time.sleep(0.5)
    sent.append(rig.sent()[1])
    found = readers.end()
    gaps = gaps_after(found, times)
    rig.stop()
    text = describe(found, readers, gaps, sent)
    bound = f"at most {MOST_SECONDS} s, no error"
    what = f"{RESTARTS} restarts of a gateway without a balancer, half of them by `kill -9`"
    yield what, text, bound, max(gaps[1:]) <= MOST_SECONDS
