"""A load as it is asked for, and the figures that come of it: what goes between a benchmark and its generator."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Literal

import msgspec

from shardkv.loadgen.exchange import Dialect, Exchange
from shardkv.loadgen.frames import Frames
from shardkv.loadgen.resp import Resp
from shardkv.loadgen.workloads import key_of
from shardkv.topology.documents import ShardDocument

BUSY_MAX = 0.8
"""A generator busier than this measures itself."""
VALUE_VARIANTS = 64
ENCODED_BYTES_MAX = 64 * 1024 * 1024
"""About as much is encoded beforehand; with large values there are fewer records."""
REQUEST_BYTES = 100
"""What a request takes beside its value, about."""


class Server(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Who is loaded. Either a redis, or a router of ours, or with `shards` a node that owns them."""

    protocol: Literal["redis", "shardkv"]
    host: str
    port: int
    user: str | None = None
    password: str | None = None
    database: int = 0
    keyspace: str = "default"
    shards: list[ShardDocument] | None = None

    def dialect(self) -> Dialect:
        """How to speak to it."""
        if self.protocol == "redis":
            return Resp(self.user, self.password, self.database)
        return Frames(self.keyspace, self.shards)


class Load(msgspec.Struct, kw_only=True):
    """So many connections, each with `depth` requests under way: all are answered, then the next ones leave."""

    server: Server
    operation: Literal["set", "get"]
    connections: int = 50
    depth: int = 1
    keys: int = 100_000
    value_bytes: int = 100
    seconds: float | None = 3.0
    """None: until every record was written or read once."""
    warm_up_s: float = 0.2
    seed: int = 1
    cores: list[int] | None = None
    """The generator's own; None: any."""
    watch: dict[str, int] = {}
    """Processes, by name, whose CPU time is measured meanwhile, with that of their children."""

    @property
    def records(self) -> int:
        """How many keys there are: those asked for, fewer when their values are large."""
        room = ENCODED_BYTES_MAX // (self.value_bytes + REQUEST_BYTES)
        return max(1, min(self.keys, room))

    def exchanges(self) -> Iterator[Exchange]:
        """All records in random order, `depth` at a time, the first ones again to fill up the last exchange.

        A record's value depends on its number alone.
        """
        dialect = self.server.dialect()
        encode = dialect.set_keys if self.operation == "set" else dialect.get_keys
        random = Random(self.seed)
        numbers = random.sample(range(self.records), self.records)
        numbers += [numbers[index % self.records] for index in range(-self.records % self.depth)]
        values = [value_of(variant, self.value_bytes) for variant in range(VALUE_VARIANTS)]
        for start in range(0, len(numbers), self.depth):
            part = numbers[start : start + self.depth]
            keys = [key_of(number).encode() for number in part]
            yield encode(keys, [values[number % VALUE_VARIANTS] for number in part])


class Figures(msgspec.Struct, kw_only=True):
    """What came of a load."""

    operations: int = 0
    seconds: float = 0.0
    busy: float = 0.0
    """The share of the time in which the generator used a processor."""
    p50_us: float = 0.0
    p99_us: float = 0.0
    p999_us: float = 0.0
    """Until the last of `depth` requests was answered."""
    cpu_us: dict[str, float] = {}
    """Of each watched process, for an operation."""
    problem: str | None = None
    """Why these figures are void: a wrong reply, a broken connection."""

    @property
    def per_s(self) -> float:
        return self.operations / self.seconds if self.seconds else 0.0

    @property
    def void(self) -> str | None:
        """Why these figures must not be used; None when they may be."""
        if self.problem is None and self.busy >= BUSY_MAX:
            return f"The generator was {self.busy:.0%} busy: it measures itself."
        return self.problem


def value_of(variant: int, value_bytes: int) -> bytes:
    """A value of which about half compresses away; the same for every server, run and seed."""
    half = value_bytes // 2
    return Random(variant).randbytes(half) + b"x" * (value_bytes - half)
