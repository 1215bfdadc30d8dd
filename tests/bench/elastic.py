"""What it costs that shards move while they are served: how long a key waits, and how fast data goes.

    python -m tests.bench.elastic [--moves 30] [--megabytes 200] [--keys 1000000] [--rows NAME...] [--json]

Starts clusters with `shardkv cluster up` on directories of their own, two nodes each, in the default durability.

pause of a key during a move    one thread reads a key, one writes it, one after the other without rest, while others
                                load the cluster; the shard goes back and forth. Of each move the longest read or write
                                from its begin to 0.2 s after its end; told is the 99th percentile over the moves
speed of a move                 a shard of so many megabytes (values that do not compress) goes to the other node,
                                without load; megabytes a second from the begin of the change to its end, against `cp`
                                and fsync of as many
growth, steady, shards          elastic_growth.py
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shardkv import Client
from shardkv.errors import ShardKVError
from tests.bench.elastic_growth import growth_row, shards_row, steady_row
from tests.bench.report import LESS, RATE, WITHIN, heading, machine, machine_lines, note, row_line
from tests.worlds.changes import Meta
from tests.worlds.cluster import ClusterWorld, cluster_world

PAUSE_BAR_S = 0.1
SPEED_BAR = 0.5
SPEED_ENOUGH = 300.0
"""Half of cp and fsync, or of so many megabytes a second where those are faster."""
VALUE_BYTES = 4096
BATCH = 256
LOAD_THREADS = 2
AFTER_S = 0.2
PAUSE_MEGABYTES = 20

Row = dict[str, Any]


class Prober(threading.Thread):
    """Does one thing to a key all the time; `longest` since it was last asked."""

    def __init__(self, world: ClusterWorld, call: Callable[[Client[bytes], int], object]) -> None:
        super().__init__(daemon=True)
        self._world, self._call = world, call
        self._ending = threading.Event()
        self._told: list[tuple[float, float]] = []
        self.failures = 0

    def run(self) -> None:
        count = 0
        with self._world.client(timeout=10) as db:
            while not self._ending.is_set():
                count += 1
                began = time.monotonic()
                try:
                    self._call(db, count)
                except ShardKVError:
                    self.failures += 1
                self._told.append((began, time.monotonic()))

    def longest(self, begin: float, end: float) -> float:
        """Of the calls that were under way between these times."""
        return max(ended - began for began, ended in list(self._told) if ended > begin and began < end)

    def stop(self) -> None:
        self._ending.set()
        self.join(20)


class Loader(threading.Thread):
    """Puts and gets of random keys, until told to stop."""

    def __init__(self, world: ClusterWorld, number: int) -> None:
        super().__init__(daemon=True)
        self._world, self._rng = world, random.Random(number)
        self._ending = threading.Event()
        self.count = 0

    def run(self) -> None:
        with self._world.client(timeout=10) as db:
            while not self._ending.is_set():
                keys = [b"load-%d" % self._rng.randrange(100_000) for _ in range(10)]
                try:
                    db.put_many(dict.fromkeys(keys, b"v" * 100))
                    db.get_many(keys)
                except ShardKVError:
                    continue
                self.count += 20

    def stop(self) -> None:
        self._ending.set()
        self.join(20)


def fill(world: ClusterWorld, megabytes: int) -> int:
    """Put so many megabytes; the bytes of the values."""
    rng = random.Random(1)
    count = megabytes * 1_000_000 // VALUE_BYTES
    with world.client(timeout=60) as db:
        for first in range(0, count, BATCH):
            db.put_many({b"%016x" % rng.getrandbits(64): rng.randbytes(VALUE_BYTES) for _ in range(BATCH)})
            note(f"fill {first * VALUE_BYTES / 1e6:.0f} MB")
    return count * VALUE_BYTES


@contextmanager
def cluster(*options: str) -> Iterator[tuple[ClusterWorld, Meta]]:
    with (
        tempfile.TemporaryDirectory(prefix="shardkv-elastic-") as directory,
        cluster_world(Path(directory), "--nodes", "2", *options) as world,
    ):
        host, port = world.address_of("meta")
        yield world, Meta(f"{host}:{port}")


def move(meta: Meta, shard: int) -> tuple[float, float]:
    """To the other node; when it began and ended."""
    there = "node-2" if meta.shard(shard).node == "node-1" else "node-1"
    began = time.monotonic()
    done = meta.wait_over(shard, meta.move(shard, there), timeout_s=300)
    assert done is not None
    assert done.node == there, done
    return began, time.monotonic()


def pause_row(moves: int) -> Row:
    """How long a key cannot be read or written."""
    with cluster() as (world, meta):
        fill(world, PAUSE_MEGABYTES)
        topology = meta.topology()
        shard = topology.keyspaces["default"].shard_for(b"the key").id
        probers = [
            Prober(world, lambda db, count: db.get(b"the key")),
            Prober(world, lambda db, count: db.put(b"the key", b"%d" % count)),
        ]
        loaders = [Loader(world, number) for number in range(LOAD_THREADS)]
        for one in (*probers, *loaders):
            one.start()
        time.sleep(1)
        quiet_began = time.monotonic()
        time.sleep(2)
        quiet = max(one.longest(quiet_began, time.monotonic()) for one in probers)
        longest = []
        for number in range(moves):
            note(f"move {number + 1} of {moves}")
            began, ended = move(meta, shard)
            time.sleep(AFTER_S)
            longest.append(max(one.longest(began, ended + AFTER_S) for one in probers))
        for one in (*probers, *loaders):
            one.stop()
        assert not any(one.failures for one in probers), "a call failed during a move"
    longest.sort()
    return {
        "title": "pause of a key during a move, seconds (99th percentile)",
        "kind": WITHIN,
        "bar": PAUSE_BAR_S,
        "figure": longest[min(len(longest) - 1, int(len(longest) * 0.99))],
        "median": longest[len(longest) // 2],
        "longest": longest[-1],
        "without_a_move": quiet,
        "moves": moves,
    }


def speed_row(megabytes: int) -> Row:
    """Megabytes a second of a move, against cp and fsync of as many."""
    with cluster("--shards", "1") as (world, meta):
        size = fill(world, megabytes)
        time.sleep(2)  # flushes end
        shard = next(iter(meta.topology().shards))
        speeds, copies = [], []
        for _ in range(3):
            began, ended = move(meta, shard)
            speeds.append(size / 1e6 / (ended - began))
            copies.append(size / 1e6 / copy_s(world.directory, size))
    return {
        "title": f"speed of a move, MB/s, of cp and fsync ({megabytes} MB)",
        "kind": RATE,
        "bar": SPEED_BAR,
        "ratios": [speed / min(copy, SPEED_ENOUGH) for speed, copy in zip(speeds, copies, strict=True)],
        "ours": speeds,
        "copies": copies,
    }


def copy_s(directory: Path, size: int) -> float:
    """How long it takes to copy a file of so many bytes and have it on disk."""
    source, target = directory / "source", directory / "target"
    block = os.urandom(1 << 20)
    with source.open("wb") as file:
        for _ in range(0, size, len(block)):
            file.write(block)
        os.fsync(file.fileno())
    began = time.monotonic()
    with source.open("rb") as reader, target.open("wb") as writer:
        while data := reader.read(1 << 20):
            writer.write(data)
        writer.flush()
        os.fsync(writer.fileno())
    took = time.monotonic() - began
    source.unlink()
    target.unlink()
    return took


ROWS: dict[str, Callable[[argparse.Namespace], Row]] = {
    "pause": lambda asked: pause_row(asked.moves),
    "speed": lambda asked: speed_row(asked.megabytes),
    "growth": lambda asked: growth_row(asked.keys),
    "steady": lambda asked: steady_row(),
    "shards": lambda asked: shards_row(),
}


def line(row: Row) -> str:
    if row["kind"] in (WITHIN, LESS):
        return row_line(row["title"], row["kind"], row["bar"], [row["figure"]], [[row["median"]], [row["longest"]]])
    return row_line(row["title"], row["kind"], row["bar"], row["ratios"], [row["ours"], row["copies"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moves", type=int, default=30)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--keys", type=int, default=1_000_000, help="of the cluster that grows")
    parser.add_argument("--rows", nargs="+", choices=[*ROWS], default=[*ROWS])
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    facts = machine()
    rows = [ROWS[name](asked) for name in asked.rows]
    note("")
    if asked.json:
        print(json.dumps({"machine": facts, "rows": rows}))
        return
    for text in machine_lines(facts, {}, []):
        print(text)
    print(heading("", ["ours", "other"]))
    for row in rows:
        print(line(row))
        if "told" in row:
            print(f"    {row['told']}")


if __name__ == "__main__":
    main()
