#!/usr/bin/env python3
"""Simulates machines that boot from snapshots in an object store, through gateways.

    benches/fleet_simulation.py [--help]

It prints how many requests and bytes the store serves, with and without a second-level cache. This
is arithmetic on the assumptions below, which are options; it measures nothing. A test compares the
table in docs/fleet.md with the output.

Model: each machine reads the working set of its image once, in order and at a constant rate. Boots
are spread evenly over the window, images and gateways take turns. An image shares a part of its
working set with all others (a common parent), the rest is its own. The unit is what one request
fetches, 1 MiB of the stored archive. A gateway keeps the units that were used last: as many as fit,
decoded, into two thirds of its cache-size or, as stored, into one third, after 48 MiB for other
things. The second-level cache keeps everything. Units that are being fetched aren't requested
again.

The gateway's cache is better than that in one respect: a reader that passes through a disk once
doesn't evict what others use again and again.
"""

import argparse
from collections import OrderedDict

# Part of cache-size for index pages and replies in flight, in MiB.
OTHER = 48


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])

    def number(name, **rest):
        parser.add_argument(name, type=int, **rest)

    number("--machines", nargs="+", default=[1000, 10000])
    number("--gateways", nargs="+", default=[3, 10])
    number("--cache", nargs="+", default=[256, 1024, 2048], help="cache-size of a gateway, in MiB")
    number("--images", default=8, help="number of images")
    number("--read", default=300, help="what a boot reads of its disk, in MiB")
    number("--stored", default=150, help="the same in the archive, compressed, in MiB")
    number("--shared", default=80, help="part of it that all images share, in percent")
    number("--window", default=600, help="time in which all machines boot, in seconds")
    number("--boot", default=30, help="time in which a machine reads its working set, in seconds")
    return parser.parse_args()


def reads(options, machines):
    """Yields the reads of all machines, in order of time: machine, and its unit."""
    # A unit is due after each of these steps; a machine starts at a multiple of them.
    step = options.boot / options.stored
    at_step = [[] for _ in range(round(options.window / step))]
    for machine in range(machines):
        at_step[int(machine * options.window / machines / step)].append(machine)
    active = []
    for now in range(len(at_step) + options.stored):
        if now < len(at_step):
            active += [(machine, now) for machine in at_step[now]]
        for machine, start in active:
            yield machine, now - start
        if active and now - active[0][1] == options.stored - 1:
            active = [it for it in active if it[1] + options.stored - 1 > now]


def simulate(options, machines, gateways, cache):
    """Returns the units that gateways fetch, and the distinct ones among them."""
    shared = options.stored * options.shared // 100
    memory = cache - OTHER
    capacity = max(memory * 2 // 3 * options.stored // options.read, memory // 3)
    kept = [OrderedDict() for _ in range(gateways)]
    fetched, distinct = 0, set()
    for machine, number in reads(options, machines):
        # Gateways and images take turns independently of each other.
        unit = number if number < shared else (machine // gateways % options.images, number)
        cached = kept[machine % gateways]
        if unit in cached:
            cached.move_to_end(unit)
            continue
        fetched += 1
        distinct.add(unit)
        cached[unit] = True
        if len(cached) > capacity:
            cached.popitem(last=False)
    return fetched, len(distinct)


def main():
    options = arguments()
    print("                                        requests                GiB      MiB/s")
    print("                                    at the store       at the store   of each")
    print("machines  gateways  cache-size   alone  2nd level   alone  2nd level  gateway")

    def line(machines, gateways, cache, fetched, distinct, rate):
        second = [f"{distinct}", f"{distinct / 1024:.1f}"] if distinct else ["", ""]
        text = (
            f"{machines:8}  {gateways:>8}  {cache:>10}  {fetched:7}  {second[0]:>9}"
            f"  {fetched / 1024:6.1f}  {second[1]:>9}  {rate:>7}"
        )
        print(text.rstrip())

    for machines in options.machines:
        line(machines, "none", "", machines * options.stored, 0, "")
        for gateways in options.gateways:
            # What gateways send to machines, while boots begin and end at the same rate.
            rate = machines * options.read / options.window / gateways
            for cache in options.cache:
                fetched, distinct = simulate(options, machines, gateways, cache)
                line(machines, gateways, f"{cache} MiB", fetched, distinct, f"{rate:.0f}")


if __name__ == "__main__":
    main()
