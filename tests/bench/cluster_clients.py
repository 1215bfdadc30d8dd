"""What Python clients do against a server: one work of one client in a process of its own. The figures are printed
as JSON.

Ours is `shardkv.Client` or `AsyncClient`, the other `redis.Redis` or `redis.asyncio.Redis`, all with the defaults
(the standard event loop, redis-py's own parser unless hiredis is there). What is read is compared with what was
written. Keys are those of the load generator, and so are their values.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from importlib import import_module
from itertools import cycle
from random import Random
from typing import Any

import msgspec

from shardkv import AsyncClient, Client
from shardkv.loadgen.cpu import cpu_s_of
from shardkv.loadgen.generator import SHARES
from shardkv.loadgen.histogram import STEP_BITS, Histogram
from shardkv.loadgen.load import VALUE_VARIANTS, Figures, Server, value_of
from shardkv.loadgen.workloads import KEY_PREFIX, key_of

BATCH = 100
LOAD_BATCH = 1000
TASKS = 64
WARM_UP_S = 0.2
TIMEOUT_S = 30.0

clock = time.perf_counter_ns
ANY = object()
"""What a write returns says nothing: failed ones raise."""


class ClientWork(msgspec.Struct, kw_only=True):
    """One work to be done."""

    work: str
    server: Server
    seconds: float
    keys: int
    value_bytes: int
    cores: list[int]
    watch: dict[str, int]


class Measured:
    """Counts calls and their times between `begin` and `figures`."""

    def __init__(self, work: ClientWork) -> None:
        self._work = work
        self.latencies = Histogram()
        self.operations = 0
        self._began = 0
        self._mine = 0.0
        self._used: dict[str, float] = {}

    def begin(self) -> None:
        self.latencies = Histogram()
        self.operations = 0
        self._used = cpu_s_of(self._work.watch)
        self._mine, self._began = time.process_time(), clock()

    def note(self, began: int, operations: int) -> None:
        """A call that began then was answered."""
        took = clock() - began
        try:
            self.latencies.counts[took >> STEP_BITS] += 1
        except IndexError:
            self.latencies.note_long(took)
        self.operations += operations

    def figures(self) -> Figures:
        seconds, mine = (clock() - self._began) / 1e9, time.process_time() - self._mine
        used = {name: after - self._used[name] for name, after in cpu_s_of(self._work.watch).items()} | {"client": mine}
        p50, p99, p999 = self.latencies.percentiles_us(SHARES)
        return Figures(
            operations=self.operations,
            seconds=seconds,
            busy=mine / seconds,
            p50_us=p50,
            p99_us=p99,
            p999_us=p999,
            cpu_us={name: one * 1e6 / max(1, self.operations) for name, one in used.items()},
        )


class Records:
    """Keys, as text, and values in random order, again and again."""

    def __init__(self, work: ClientWork) -> None:
        self._values = [value_of(variant, work.value_bytes) for variant in range(VALUE_VARIANTS)]
        self.numbers = Random(2).sample(range(work.keys), work.keys)

    def pair(self, number: int) -> tuple[str, bytes]:
        return key_of(number), self._values[number % VALUE_VARIANTS]

    def pairs(self) -> Iterator[tuple[str, bytes]]:
        """One after the other, for ever."""
        return cycle([self.pair(number) for number in self.numbers])

    def batches(self, size: int) -> Iterator[dict[str, bytes]]:
        """Once over all records."""
        for start in range(0, len(self.numbers), size):
            yield dict(map(self.pair, self.numbers[start : start + size]))


def sync_redis(server: Server) -> Any:
    """A client that says nothing twemproxy does not know."""
    redis: Any = import_module("redis")
    return redis.Redis(server.host, server.port, protocol=2, **_quiet(redis))


def async_redis(server: Server) -> Any:
    redis: Any = import_module("redis.asyncio")
    return redis.Redis(host=server.host, port=server.port, protocol=2, **_quiet(import_module("redis")))


def _quiet(redis: Any) -> dict[str, Any]:
    """Options by which the client does not introduce itself (CLIENT SETINFO); their names changed in redis-py 7."""
    known = inspect.signature(redis.Redis.__init__).parameters
    return {"driver_info": None} if "driver_info" in known else {"lib_name": None, "lib_version": None}


def address_of(server: Server) -> str:
    return f"{server.host}:{server.port}"


# Calls: each returns what is wrong, or None


def _sync_calls(work: ClientWork) -> Iterator[tuple[Callable[[], object], object, int]]:
    """(call, what it must return or ANY, operations in it), for ever."""
    ours = work.server.protocol == "shardkv"
    db: Any = Client(address_of(work.server), timeout=TIMEOUT_S) if ours else sync_redis(work.server)
    records = Records(work)
    if work.work in ("put", "get"):
        put = db.put if ours else db.set
        for key, value in records.pairs():
            if work.work == "put":
                yield (lambda key=key, value=value: put(key, value)), ANY, 1
            else:
                yield (lambda key=key: db.get(key)), value, 1
    put_many, get_many = (db.put_many, db.get_many) if ours else (db.mset, db.mget)
    for batch in cycle(list(records.batches(BATCH))):
        keys, values = list(batch), list(batch.values())
        if work.work == "put_many":
            yield (lambda batch=batch: put_many(batch)), ANY, len(batch)
        else:
            yield (lambda keys=keys: get_many(keys)), batch if ours else values, len(batch)


def run_sync(work: ClientWork) -> Figures:
    """One caller, one call after the other."""
    measured = Measured(work)
    calls = _sync_calls(work)
    end = clock() + int(WARM_UP_S * 1e9)
    for phase_s in (None, work.seconds):
        if phase_s is not None:
            measured.begin()
            end = clock() + int(phase_s * 1e9)
        while (began := clock()) < end:
            call, right, operations = next(calls)
            began = clock()
            got = call()
            measured.note(began, operations)
            if right is not ANY and got != right:
                return Figures(problem=f"{work.work} returned {str(got)[:80]}.")
    return measured.figures()


async def run_async(work: ClientWork) -> Figures:
    """TASKS tasks, each one call after the other."""
    ours = work.server.protocol == "shardkv"
    db: Any = AsyncClient(address_of(work.server), timeout=TIMEOUT_S) if ours else async_redis(work.server)
    put: Callable[[str, bytes], Awaitable[object]] = db.put if ours else db.set
    measured, pairs = Measured(work), Records(work).pairs()
    wrong: list[object] = []
    end = clock() + int(WARM_UP_S * 1e9)

    async def task() -> None:
        while (began := clock()) < end and not wrong:
            key, value = next(pairs)
            if work.work == "async_put":
                got = right = await put(key, value)
            else:
                got, right = await db.get(key), value
            measured.note(began, 1)
            if got != right:
                wrong.append(got)

    try:
        await asyncio.gather(*(task() for _ in range(TASKS)))
        measured.begin()
        end = clock() + int(work.seconds * 1e9)
        await asyncio.gather(*(task() for _ in range(TASKS)))
        return Figures(problem=f"{work.work} returned {str(wrong[0])[:80]}.") if wrong else measured.figures()
    finally:
        await (db.close() if ours else db.aclose())


def run_load(work: ClientWork) -> Figures:
    """Write all records, in batches."""
    ours = work.server.protocol == "shardkv"
    db: Any = Client(address_of(work.server), timeout=TIMEOUT_S) if ours else sync_redis(work.server)
    put_many = db.put_many if ours else db.mset
    measured = Measured(work)
    measured.begin()
    for batch in Records(work).batches(LOAD_BATCH):
        put_many(batch)
        measured.operations += len(batch)
    return measured.figures()


def run_scan(work: ClientWork) -> Figures:
    """Read all records once: ours in key order, the other in any."""
    ours = work.server.protocol == "shardkv"
    db: Any = Client(address_of(work.server), timeout=TIMEOUT_S) if ours else sync_redis(work.server)
    rows: Iterator[tuple[bytes, bytes]] = db.scan(prefix=KEY_PREFIX) if ours else _redis_rows(db)
    measured, count, size = Measured(work), 0, 0
    measured.begin()
    for key, value in rows:
        count += 1
        size += len(key) + len(value)
    measured.operations = count
    if (count, size) != (work.keys, work.keys * (16 + work.value_bytes)):
        return Figures(problem=f"The scan found {count:,} rows of {size:,} bytes.")
    return measured.figures()


def _redis_rows(db: Any) -> Iterator[tuple[bytes, bytes]]:
    """Every key once, unless a rehash meanwhile shows some twice, with its value."""
    keys: list[bytes] = []

    def values() -> Sequence[bytes]:
        found: Sequence[bytes] = db.mget(keys)
        return found

    for key in db.scan_iter(match=f"{KEY_PREFIX}*", count=LOAD_BATCH):
        keys.append(key)
        if len(keys) == LOAD_BATCH:
            yield from zip(keys, values(), strict=True)
            keys = []
    if keys:
        yield from zip(keys, values(), strict=True)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever started this tells of Ctrl-C
    work = msgspec.json.decode(sys.argv[1], type=ClientWork)
    if work.cores:
        os.sched_setaffinity(0, work.cores)
    gc.freeze()
    if work.work.startswith("async"):
        figures = asyncio.run(run_async(work))
    else:
        figures = {"load": run_load, "scan": run_scan}.get(work.work, run_sync)(work)
    print(msgspec.json.encode(figures).decode())


if __name__ == "__main__":
    main()
