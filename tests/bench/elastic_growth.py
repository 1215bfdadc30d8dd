"""Rows of `elastic.py` about a cluster that grows while it is used, and about one with very many shards.

growth      three nodes with so many keys of 1 KiB, under load, get a fourth: seconds from the call of `add_node` to
            the end of its job, and how far the fullest or emptiest node is then from the mean, by bytes
steady      one client that puts and gets at half the pace it can go at: calls a second while shards move back and
            forth, against calls a second while nothing moves
shards      a topology of 10,000 shards: microseconds to route a key, bytes of all documents, seconds to read them
"""

from __future__ import annotations

import random
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from shardkv import Admin, Client
from shardkv.errors import ShardKVError
from shardkv.topology.documents import (
    CLUSTER_KEY,
    HASH_TOKENS,
    KEYSPACES,
    NODES,
    SHARDS,
    ClusterDocument,
    KeyspaceDocument,
    NodeDocument,
    ShardDocument,
    encode_document,
)
from shardkv.topology.view import Topology
from tests.bench.report import RATE, WITHIN, note
from tests.worlds.cluster import ClusterWorld, cluster_world

GROWTH_BAR_S = 60.0
STEADY_BAR = 0.8
ROUTING_BAR_US = 1.0
GROWTH_VALUE_BYTES = 1024
BATCH = 200
PACE_S = 3.0
STEADY_S = 8.0
SHARD_COUNT = 10_000
ROUTED = 100_000

Row = dict[str, Any]


class Caller(threading.Thread):
    """Puts and gets batches of random keys, as fast as it can or at a pace; counts them."""

    def __init__(self, world: ClusterWorld, number: int, *, pause_s: float = 0.0) -> None:
        super().__init__(daemon=True)
        self._world, self._rng, self._pause_s = world, random.Random(number), pause_s
        self._ending = threading.Event()
        self.count = self.failures = 0

    def run(self) -> None:
        with self._world.client(timeout=20) as db:
            due = time.monotonic()
            while not self._ending.is_set():
                self._call(db)
                due += self._pause_s
                if self._pause_s:
                    self._ending.wait(max(0.0, due - time.monotonic()))

    def _call(self, db: Client[bytes]) -> None:
        keys = [b"load-%d" % self._rng.randrange(100_000) for _ in range(10)]
        try:
            db.put_many(dict.fromkeys(keys, b"v" * 100))
            db.get_many(keys)
        except ShardKVError:
            self.failures += 1
        else:
            self.count += 1

    def per_s(self, seconds: float) -> float:
        """Batches a second in so many seconds from now on."""
        before, began = self.count, time.monotonic()
        time.sleep(seconds)
        return (self.count - before) / (time.monotonic() - began)

    def stop(self) -> None:
        self._ending.set()
        self.join(30)


def growth_row(keys: int) -> Row:
    with (
        tempfile.TemporaryDirectory(prefix="shardkv-growth-") as directory,
        cluster_world(Path(directory), "--nodes", "3") as world,
    ):
        _fill(world, keys)
        callers = [Caller(world, number) for number in range(2)]
        for caller in callers:
            caller.start()
        with Admin(f"127.0.0.1:{world.port}", timeout=120) as admin:
            began = time.monotonic()
            job = admin.wait_job(admin.add_node().job, timeout=600)
            seconds = time.monotonic() - began
            assert job.state == "done", job
            for caller in callers:
                caller.stop()
            carried = [node.bytes or 0 for node in admin.nodes()]
        assert not any(caller.failures for caller in callers), "a call failed while the cluster grew"
        with world.client(timeout=60) as db:
            assert db.count(prefix="grow-") == keys
    mean = statistics.mean(carried)
    return {
        "title": f"3 -> 4 nodes with {keys:,} keys of 1 KiB under load, seconds",
        "kind": WITHIN,
        "bar": GROWTH_BAR_S,
        "figure": seconds,
        "median": max(abs(each - mean) for each in carried) / mean,
        "longest": float(len(job.done)),
        "told": "second column: farthest from the mean, by bytes; third: shards moved",
    }


def _fill(world: ClusterWorld, keys: int) -> None:
    rng = random.Random(1)
    with world.client(timeout=60) as db:
        for first in range(0, keys, BATCH):
            count = min(BATCH, keys - first)
            db.put_many({b"grow-%09d" % (first + n): rng.randbytes(GROWTH_VALUE_BYTES) for n in range(count)})
            note(f"fill {first:,} of {keys:,}")


def steady_row() -> Row:
    """The second figures are batches a second with moves, and without."""
    with (
        tempfile.TemporaryDirectory(prefix="shardkv-steady-") as directory,
        cluster_world(Path(directory), "--nodes", "2") as world,
        Admin(f"127.0.0.1:{world.port}", timeout=120) as admin,
    ):
        _fill(world, 100_000)
        fastest = Caller(world, 1)
        fastest.start()
        time.sleep(1)
        pace_s = 2 / fastest.per_s(PACE_S)
        fastest.stop()
        caller = Caller(world, 2, pause_s=pace_s)
        caller.start()
        quiet, moving, moved = [], [], 0
        for _ in range(3):
            quiet.append(caller.per_s(STEADY_S / 2))
            before, began = caller.count, time.monotonic()
            while time.monotonic() - began < STEADY_S:
                shard = admin.shards()[moved % 16]
                there = "node-2" if shard.node == "node-1" else "node-1"
                admin.wait_job(admin.move_shard(shard.id, there).id, timeout=60)
                moved += 1
            moving.append((caller.count - before) / (time.monotonic() - began))
        caller.stop()
        assert not caller.failures, "a call failed while shards moved"
    return {
        "title": f"a client at half load while {moved} shards move, of its pace without",
        "kind": RATE,
        "bar": STEADY_BAR,
        "ratios": [one / other for one, other in zip(moving, quiet, strict=True)],
        "ours": moving,
        "copies": quiet,
    }


def shards_row() -> Row:
    documents = {
        CLUSTER_KEY: encode_document(ClusterDocument("c", 3, "hash", SHARD_COUNT, [])),
        f"{KEYSPACES}default": encode_document(KeyspaceDocument("default", "hash")),
    }
    for number in range(1, 4):
        node = NodeDocument(f"node-{number}", "00" * 16, 1, "127.0.0.1:7401", 1)
        documents[f"{NODES}{node.name}"] = encode_document(node)
    starts = [HASH_TOKENS * number // SHARD_COUNT for number in range(SHARD_COUNT)]
    for number, (start, stop) in enumerate(zip(starts, [*starts[1:], None], strict=True), 1):
        shard = ShardDocument(number, "default", start, stop, 1, f"node-{number % 3 + 1}")
        documents[f"{SHARDS}{number}"] = encode_document(shard)
    began = time.perf_counter()
    view = Topology().with_entries(1, [*documents.items()]).keyspace("default")
    read_s = time.perf_counter() - began
    keys = [b"key-%d" % number for number in range(ROUTED)]
    began = time.perf_counter()
    for key in keys:
        view.shard_for(key)
    routing_us = (time.perf_counter() - began) / ROUTED * 1e6
    return {
        "title": f"{SHARD_COUNT:,} shards: microseconds to route a key",
        "kind": WITHIN,
        "bar": ROUTING_BAR_US,
        "figure": routing_us,
        "median": sum(map(len, documents.values())) / 1e6,
        "longest": read_s,
        "told": "second column: MB of all documents; third: seconds to read them",
    }
