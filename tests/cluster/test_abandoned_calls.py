"""Thousands of calls that are cancelled or run out of time leave nothing behind, at no process they reached.

In each round all calls are given up while they are under way. Before that, in rounds to warm up, as many of each kind
are made to their end, which fills what is kept for good: allocators, caches, a lane for each write ever under way at
once. From then on memory must stay as it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import sys
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from shardkv import AsyncClient, Client
from shardkv.errors import DeadlineExceeded, OutcomeUnknown, UnavailableError
from tests.worlds.cluster import ClusterWorld, cluster_world, until
from tests.worlds.memory import status_bytes

ROUNDS, WARM_UP = 20, 4
TASKS, THREADS, CALLS = 250, 8, 30
VALUE = bytes(2_000)
GROWTH_BYTES_MAX = 12 << 20
"""What is given up in the rounds that count is about three times as much, in requests alone."""
GROWTH_PIECES_MAX = 1_000
"""A call has dozens, and more calls than that are given up."""
KEYS = [b"%c-%d" % (byte, number) for byte in b"0agmsz" for number in range(5)]
GIVEN_UP = (DeadlineExceeded, OutcomeUnknown, UnavailableError)


@pytest.fixture(scope="module", params=["hash", pytest.param("range", marks=pytest.mark.long)])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterWorld]:
    config = '[engine]\ndurability = "os"\nmemtable_bytes_max = 262144\nblock_cache_bytes = 262144\n'
    options = ("--partition", request.param, "--nodes", "2", "--shards", "4")
    with cluster_world(tmp_path_factory.mktemp(request.param), *options, config=config) as found:
        with found.client(timeout=20) as db:
            db.put_many(dict.fromkeys(KEYS, VALUE))
        yield found


def sizes(world: ClusterWorld) -> dict[str, int]:
    """Bytes of the cluster's processes, and how many small pieces of memory there are in this one."""
    gc.collect()
    found = {name: status_bytes(world.pid(name), "VmRSS") for name in ("router-1", "node-1", "node-2")}
    return found | {"pieces": sys.getallocatedblocks()}


def check_flat(world: ClusterWorld, one_round: Callable[[int], None]) -> None:
    """After the rounds there is no more than after those to warm up."""
    before: dict[str, int] = {}
    for number in range(ROUNDS):
        if number == WARM_UP:
            before = sizes(world)
        one_round(number)

    def flat() -> bool:
        grown.update({name: size - before[name] for name, size in sizes(world).items()})
        return all(size < (GROWTH_PIECES_MAX if name == "pieces" else GROWTH_BYTES_MAX) for name, size in grown.items())

    grown: dict[str, int] = {}
    with contextlib.suppress(AssertionError):
        until(flat, timeout_s=5)
    assert flat(), f"{grown} more"


@pytest.mark.parametrize("direct", [False, True], ids=["router", "direct"])
def test_cancelled_calls_leave_nothing(world: ClusterWorld, direct: bool) -> None:
    cancelled = 0

    async def main() -> None:
        async with AsyncClient(world.address, timeout=20, direct=direct) as db:
            await db.get_many(KEYS)

            async def scan() -> None:
                async for _ in db.scan():
                    pass

            calls: list[Callable[[], Coroutine[Any, Any, Any]]] = [
                lambda: db.put_many(dict.fromkeys(KEYS, VALUE)),
                lambda: db.get_many(KEYS),
                scan,
                lambda: db.put(b"own", VALUE),
                lambda: db.get(KEYS[0]),
                lambda: db.incr(b"number"),
                lambda: db.count(),
            ]

            async def one_round(number: int) -> None:
                rng = random.Random(number)
                some = [calls[number]] if number < WARM_UP else calls
                tasks = [asyncio.create_task(rng.choice(some)()) for _ in range(TASKS)]
                if number >= WARM_UP:
                    await asyncio.sleep(rng.uniform(0, 0.01))
                    for task in tasks:
                        task.cancel()
                ends = await asyncio.gather(*tasks, return_exceptions=True)
                nonlocal cancelled
                cancelled += sum(isinstance(end, asyncio.CancelledError) for end in ends)
                await db.get(KEYS[0])

            loop = asyncio.get_running_loop()
            await asyncio.to_thread(
                check_flat, world, lambda number: asyncio.run_coroutine_threadsafe(one_round(number), loop).result(60)
            )
            assert await db.get_many(KEYS) == dict.fromkeys(KEYS, VALUE)

    asyncio.run(main())
    assert cancelled > (ROUNDS - WARM_UP) * TASKS / 2


@pytest.mark.parametrize("direct", [False, True], ids=["router", "direct"])
def test_calls_of_threads_that_run_out_of_time_leave_nothing(world: ClusterWorld, direct: bool) -> None:
    counts = {"given up": 0, "answered": 0}

    def work(db: Client[bytes], number: int, thread: int) -> None:
        rng = random.Random(number * THREADS + thread)
        calls: list[Callable[[float], object]] = [
            lambda timeout: db.put_many(dict.fromkeys(KEYS, VALUE), timeout=timeout),
            lambda timeout: db.get_many(KEYS, timeout=timeout),
            lambda timeout: list(db.scan(timeout=timeout)),
            lambda timeout: db.put(b"own", VALUE, timeout=timeout),
            lambda timeout: db.get(KEYS[0], timeout=timeout),
            lambda timeout: db.incr(b"number", timeout=timeout),
            lambda timeout: db.count(timeout=timeout),
        ]
        for _ in range(CALLS):
            try:
                if number < WARM_UP:
                    calls[number](20)
                else:
                    rng.choice(calls)(rng.uniform(0.0002, 0.006))
                counts["answered"] += 1
            except GIVEN_UP:
                counts["given up"] += 1

    with world.client(timeout=20, direct=direct) as db:
        db.get_many(KEYS)

        def one_round(number: int) -> None:
            with ThreadPoolExecutor(THREADS) as threads:
                list(threads.map(partial(work, db, number), range(THREADS)))

        check_flat(world, one_round)
        assert db.get_many(KEYS) == dict.fromkeys(KEYS, VALUE)
    assert counts["given up"] > (ROUNDS - WARM_UP) * THREADS * CALLS / 3, counts
