"""Bytes that the store sends to one gateway with one client, and to three with many."""

import concurrent.futures
import hashlib
import shutil
import subprocess
import time

from rig import CACHE_URL, GATEWAYS, STORE_URL, expect, find, mib, within

CLIENTS = 30
# Decoded blocks of the whole image fit into two thirds of it.
LARGE, SMALL = ("--cache-size", "1GiB"), ("--cache-size", "128MiB")
MOST_ALONE, MOST_WITH_CACHE = 3.05, 1.05


def check(rig):
    expected = hashlib.sha256(rig.content).hexdigest()

    def read(delay):
        """Reads the whole image after some seconds, and compares its hash."""
        time.sleep(delay)
        words = within("client", ["nbdcopy", "--connections=1", rig.uri(), "-"])
        copy = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        summed = subprocess.run(
            [find("sha256sum")], stdin=copy.stdout, capture_output=True, text=True, check=True
        )
        copy.stdout.close()
        problems = copy.stderr.read().decode()
        expect(copy.wait() == 0, f"nbdcopy: {problems}")
        expect(summed.stdout.split()[0] == expected, "wrong bytes")

    def measure(names, clients, arguments, url=STORE_URL, has_caches=False, pause=0):
        """Returns the bytes of a cold start, and a text about it."""
        rig.start_store()
        if has_caches:
            rig.start_caches()
        gateways = [rig.gateway(name, *arguments(name), url=url) for name in names]
        for gateway in gateways:
            gateway.wait_until_ready()
        rig.start_balancer(names)
        started = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(clients) as pool:
            list(pool.map(read, (pause * number for number in range(clients))))
        seconds = time.monotonic() - started
        served = [gateway.metric("hexz_nbd_connections_served_total") for gateway in gateways]
        requests, sent, _ = rig.sent()
        rig.stop()
        for name in names:
            shutil.rmtree(rig.folder / f"disk-{name}", ignore_errors=True)
        return sent, f"{mib(sent)} in {requests} requests, {seconds:.0f} s", served

    one, text, _ = measure(GATEWAYS[:1], 1, lambda _: LARGE)
    what = f"one gateway, one client: {mib(rig.archive_size)} archive of {mib(len(rig.content))}"
    yield what, text, "", None

    three, text, served = measure(GATEWAYS, CLIENTS, lambda _: LARGE)
    text = f"{three / one:.3f} times; {text}"
    is_even = min(served) >= CLIENTS / len(GATEWAYS) - 2
    expect(is_even, f"clients aren't distributed evenly: {served}")
    what = f"three gateways, {CLIENTS} clients"
    yield what, text, f"at most {MOST_ALONE} times", three <= MOST_ALONE * one

    sent, text, _ = measure(GATEWAYS, CLIENTS, lambda _: LARGE, url=CACHE_URL, has_caches=True)
    text = f"{sent / one:.3f} times; {text}"
    what = "the same with a second-level cache, at the store"
    yield what, text, f"at most {MOST_WITH_CACHE} times", sent <= MOST_WITH_CACHE * one

    # Not enough memory for the image: what a fleet should avoid, and what a disk cache changes.
    small, text, _ = measure(GATEWAYS, CLIENTS, lambda _: SMALL, pause=1)
    what = "three gateways with `cache-size` 128 MiB, a client each second"
    yield what, f"{small / one:.2f} times; {text}", "", None

    def disk(name):
        return [*SMALL, "--disk-cache-size", "1GiB", "--disk-cache", rig.folder / f"disk-{name}"]

    sent, text, _ = measure(GATEWAYS, CLIENTS, disk, pause=1)
    text, bound = f"{sent / one:.3f} times; {text}", f"at most {MOST_ALONE} times"
    yield "the same with a disk cache", text, bound, sent <= MOST_ALONE * one
