"""What a scan of everything costs in memory, on every process it passes, while the data grows tenfold.

    python -m tests.bench.scan_memory [--rows 50000 500000] [--value-bytes 200] [--partition hash] [--json]

Starts a cluster of three nodes and one router, with caches so small that most of the data is only on disk. Before each
measurement router and nodes are killed and start anew, so nothing of the load or of an earlier scan is left in them;
the client has a process of its own, too. Printed is by how much each process grew at most during one scan of all rows,
of the nodes the one that grew most: what the kernel kept as the peak of its resident memory, less what it had before.
A node's growth has its block cache in it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from shardkv import AsyncClient, Client
from tests.worlds.cluster import ClusterWorld, cluster_world, until
from tests.worlds.memory import Peaks

MIB = 1 << 20
CONFIG = """
[engine]
durability = "os"
memtable_bytes_max = 4194304
block_cache_bytes = 4194304
[launcher]
restart_first_ms = 20
restart_most_ms = 100
crash_loop_starts = 1000
"""
NODES = 3
BATCH_BYTES = 1 * MIB
TIMEOUT_S = 60
PAUSE_ROWS = 1_000


@dataclass(frozen=True)
class Way:
    """A way to scan."""

    what: str
    asynchronous: bool = False
    reverse: bool = False
    keys_only: bool = False
    pause_s: float = 0.0
    """After every PAUSE_ROWS rows."""


WAYS = [
    Way("scan"),
    Way("reverse", reverse=True),
    Way("keys only", keys_only=True),
    Way("slow consumer", pause_s=0.01),
    Way("asyncio", asynchronous=True),
    Way("asyncio, slow consumer", asynchronous=True, pause_s=0.01),
]


class Reader:
    """A client in a process of its own that scans when it is told to."""

    def __init__(self, address: str, way: Way) -> None:
        command = [sys.executable, "-m", "tests.bench.scan_memory", "--read", address, json.dumps(asdict(way))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    @property
    def pid(self) -> int:
        return self._process.pid

    def scan(self) -> int:
        """Scan everything; how many rows there were."""
        assert self._process.stdin is not None
        print("scan", file=self._process.stdin, flush=True)
        return int(self._answer())

    def close(self) -> None:
        self._process.communicate()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the reader ended"
        return line


def read(address: str, way: Way) -> None:
    """What the process of a Reader does."""
    with Client(address, timeout=TIMEOUT_S) as db:
        db.get("nothing")
        print("ready", flush=True)
        for _ in sys.stdin:
            rows = db.scan(reverse=way.reverse, keys_only=way.keys_only)
            print(count(rows, way.pause_s), flush=True)


def count(rows: Iterable[object], pause_s: float) -> int:
    number = 0
    for number, _ in enumerate(rows, 1):
        if pause_s and not number % PAUSE_ROWS:
            time.sleep(pause_s)
    return number


async def read_async(address: str, way: Way) -> None:
    """As `read`."""
    async with AsyncClient(address, timeout=TIMEOUT_S) as db:
        await db.get("nothing")
        print("ready", flush=True)
        while await asyncio.to_thread(sys.stdin.readline):
            number = 0
            async for _ in db.scan(reverse=way.reverse, keys_only=way.keys_only):
                number += 1
                if way.pause_s and not number % PAUSE_ROWS:
                    await asyncio.sleep(way.pause_s)
            print(number, flush=True)


def fill(world: ClusterWorld, first: int, stop: int, value_bytes: int) -> None:
    """Rows of these numbers, with values that do not compress."""
    rng, step = random.Random(first), max(1, BATCH_BYTES // value_bytes)
    with world.client(timeout=TIMEOUT_S) as db:
        for start in range(first, stop, step):
            numbers = range(start, min(start + step, stop))
            db.put_many({b"%016d" % number: rng.randbytes(value_bytes) for number in numbers})


def grown_bytes(world: ClusterWorld, way: Way, rows: int, *, nodes: int = NODES) -> dict[str, int]:
    """By how much client, router, and the node that did so most, grew while all rows were scanned."""
    names = ["router-1", *[f"node-{number}" for number in range(1, nodes + 1)]]
    start_anew(world, names)
    reader = Reader(world.address, way)
    try:
        peaks = Peaks({"client": reader.pid} | {name: world.pid(name) for name in names})
        assert reader.scan() == rows
        grown = peaks.grown_bytes()
    finally:
        reader.close()
    client, router = grown.pop("client"), grown.pop("router-1")
    return {"client": client, "router": router, "node": max(grown.values())}


def start_anew(world: ClusterWorld, names: list[str]) -> None:
    """Kill these processes, and wait until their successors serve."""
    before = {name: world.pid(name) for name in names}
    world.kill(*names)
    until(lambda: all(world.pid(name) != pid for name, pid in before.items()), timeout_s=60)
    world.wait_serving()


def measure(options: argparse.Namespace) -> Iterator[tuple[int, str, dict[str, int]]]:
    """(rows, way, growth in bytes)."""
    with tempfile.TemporaryDirectory(prefix="shardkv-scan-") as name:
        arguments = ("--nodes", str(NODES), "--partition", options.partition)
        with cluster_world(Path(name), *arguments, config=CONFIG) as world:
            there = 0
            for rows in sorted(options.rows):
                fill(world, there, rows, options.value_bytes)
                there = rows
                for way in WAYS:
                    yield rows, way.what, grown_bytes(world, way, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[50_000, 500_000])
    parser.add_argument("--value-bytes", type=int, default=200)
    parser.add_argument("--partition", choices=["hash", "range"], default="hash")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--read", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        address, told = options.read
        way = Way(**json.loads(told))
        if way.asynchronous:
            asyncio.run(read_async(address, way))
        else:
            read(address, way)
        return
    found = []
    for rows, what, grown in measure(options):
        found.append({"rows": rows, "way": what, "grown_bytes": grown})
        if not options.json:
            told = ", ".join(f"{name} {size / MIB:5.1f}" for name, size in grown.items())
            print(f"{rows:>10,} rows  {what:24} MiB more at most: {told}", flush=True)
    if options.json:
        machine = f"{os.cpu_count()} cores, {platform.machine()}, CPython {platform.python_version()}"
        print(json.dumps({"machine": machine, "value_bytes": options.value_bytes, "found": found}, indent=2))


if __name__ == "__main__":
    main()
