"""What one caller's flood costs another: latency of single gets beside a pipeline of 100,000.

    python -m tests.bench.fairness [--requests 100000] [--value-bytes 100] [--json]

Starts a cluster of one node and one router. One connection pipelines gets (then puts) as fast as it is read; another,
in another process, sends one get after the other; both directly to the node, then both through the router. Prints p50
and p99 of the single gets alone and beside the flood, and how many of the flood's requests were answered for each of
the other's: turns are fair when that is bounded by what fits into a turn, not by the length of the flood.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import socket
import statistics
import struct
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import msgspec

from shardkv.wire.hello import Identity
from shardkv.wire.messages import OK, Op, Read, Request, Write, encode_batch, raw
from tests.worlds.cluster import ClusterWorld, cluster_world

SHARD, EPOCH = 1, 1
CHUNK = 256
"""Requests of one frame of the flood."""
ALONE_S = 1.0


def frame(requests: list[Request]) -> bytes:
    body = encode_batch(1, list(requests))
    return struct.pack(">I", len(body)) + body


class Wire:
    """A raw connection; `ask` is one round trip, `flood` sends frames and reads replies at the same time."""

    def __init__(self, address: tuple[str, int], *, node: bool) -> None:
        self._node = node
        self.socket = socket.create_connection(address, timeout=60)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._answers = self.socket.makefile("rb", buffering=1 << 20)
        self.socket.sendall(frame([Request(0, Op.HELLO, 0, None, None, None, raw(Identity("client", "x").hello()))]))
        self.replies()

    def request(self, number: int, op: Op, key: bytes, value: bytes = b"") -> Request:
        payload = raw(Read([key]) if op == Op.READ else Write(None, None, 1, [key], [value], False))
        shard, epoch = (SHARD, EPOCH) if self._node else (None, None)
        return Request(number, op, 0, shard, epoch, None, payload)

    def replies(self) -> list[Any]:
        (length,) = struct.unpack(">I", self._answers.read(4))
        _, replies = msgspec.msgpack.decode(self._answers.read(length))
        assert all(status == OK for _, status, _ in replies), replies[:3]
        return list(replies)

    def ask(self, key: bytes) -> float:
        """Seconds of one get."""
        began = time.perf_counter()
        self.socket.sendall(frame([self.request(1, Op.READ, key)]))
        self.replies()
        return time.perf_counter() - began

    def flood(self, frames: list[bytes], count: int) -> None:
        sender = threading.Thread(target=lambda: [self.socket.sendall(each) for each in frames], daemon=True)
        sender.start()
        answered = 0
        while answered < count:
            answered += len(self.replies())
        sender.join()

    def close(self) -> None:
        self._answers.close()
        self.socket.close()


def quantiles(latencies_s: list[float]) -> dict[str, float]:
    ordered = sorted(latencies_s)
    return {
        "p50_ms": statistics.median(ordered) * 1000,
        "p99_ms": ordered[int(len(ordered) * 0.99)] * 1000,
        "count": len(ordered),
    }


def one_case(world: ClusterWorld, name: str, op: Op, requests: int, value: bytes) -> dict[str, Any]:
    address = world.address_of(name)
    node = name.startswith("node")
    flood, other = Wire(address, node=node), Wire(address, node=node)
    numbers = range(1, requests + 1)
    asked = [flood.request(number, op, b"%016d" % (number * 7919 % 10_000), value) for number in numbers]
    frames = [frame(asked[at : at + CHUNK]) for at in range(0, requests, CHUNK)]
    key = b"%016d" % 1
    alone: list[float] = []
    ends_at = time.perf_counter() + ALONE_S
    while time.perf_counter() < ends_at:
        alone.append(other.ask(key))
    beside: list[float] = []
    flooding = multiprocessing.get_context("fork").Process(target=flood.flood, args=(frames, requests))
    began = time.perf_counter()
    flooding.start()
    while flooding.is_alive():
        beside.append(other.ask(key))
    flood_s = time.perf_counter() - began
    assert flooding.exitcode == 0
    flood.close()
    other.close()
    return {
        "asked": name,
        "flood": op.name.lower(),
        "alone": quantiles(alone),
        "beside": quantiles(beside),
        "flood_per_s": requests / flood_s,
        "flood_per_get": requests / len(beside),
    }


def run(directory: Path, *, requests: int, value_bytes: int) -> list[dict[str, Any]]:
    """One row for each of node and router, flood of gets and of puts."""
    value = os.urandom(value_bytes)
    options = ("--nodes", "1", "--shards", "1", "--partition", "range")
    with cluster_world(directory, *options, config='[engine]\ndurability = "interval"\n') as world:
        with world.client(timeout=30) as db:
            db.put_many({b"%016d" % number: value for number in range(10_000)})
        return [
            one_case(world, name, op, requests, value) for name in ("node-1", "router-1") for op in (Op.READ, Op.WRITE)
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--value-bytes", type=int, default=100)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="shardkv-fairness-") as name:
        rows = run(Path(name), requests=options.requests, value_bytes=options.value_bytes)
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{os.cpu_count()} cores, {platform.machine()}, CPython {platform.python_version()}; ms per single get")
    print(
        f"{'asked':10} {'flood of':8} {'alone p50':>10} {'p99':>7} {'beside p50':>11} {'p99':>7} "
        f"{'flood/s':>9} {'per get':>8}"
    )
    for row in rows:
        alone, beside = row["alone"], row["beside"]
        print(
            f"{row['asked']:10} {row['flood'] + 's':8} {alone['p50_ms']:10.2f} {alone['p99_ms']:7.2f} "
            f"{beside['p50_ms']:11.2f} {beside['p99_ms']:7.2f} {row['flood_per_s']:9,.0f} {row['flood_per_get']:8.0f}"
        )


if __name__ == "__main__":
    main()
