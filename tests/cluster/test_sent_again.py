"""Writes that are sent again are made once: counters count exactly, whatever dies or breaks while they do.

Every caller's time is generous, so no outcome may stay unknown: each call ends in success, and the sums that the calls
of one counter return are 1, 2, 3... without a gap or a double, which only writes that are made once, all of them, give.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from shardkv import AsyncClient, Client
from tests.worlds.cluster import SMALL_ENGINE, until
from tests.worlds.hot_keys import IMPATIENT
from tests.worlds.nemesis import Nemesis
from tests.worlds.wired_cluster import WiredCluster, wired_cluster

CONFIG = SMALL_ENGINE + "[limits]\nsilence_timeout_ms = 1000\n"
COUNTERS = [b"0", b"counter", b"m", b"~"]
"""Spread over the shards in both modes."""
TIMEOUT_S = 60
THREADS = 6
TASKS = 12
MANY = 40


class Callers:
    """Threads and tasks that count, compare and set, and write many, until they are told to stop."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = list(addresses)
        self._ending = threading.Event()
        self._client = Client(self._addresses, timeout=TIMEOUT_S)
        self._lock = threading.Lock()
        self.sums: dict[bytes, list[int]] = defaultdict(list)
        self.surprises: list[BaseException] = []
        work = [lambda number=number: self._count(number) for number in range(THREADS)]  # type: ignore[misc]
        work += [self._compare_and_set, self._write_many, lambda: asyncio.run(self._count_async())]
        self._threads = [threading.Thread(target=self._guarded, args=(one,), daemon=True) for one in work]

    @property
    def counted(self) -> int:
        return sum(map(len, list(self.sums.values())))

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join(TIMEOUT_S)
            assert not thread.is_alive(), "a call did not end within its timeout"
        self._client.close()

    def check(self, db: Client[bytes]) -> None:
        """What is there is what was acknowledged, to the last one."""
        assert not self.surprises, self.surprises
        for key, sums in self.sums.items():
            assert sorted(sums) == list(range(1, len(sums) + 1)), f"of {key!r}: {Counter(sums).most_common(3)}"
            assert db.get(key) == b"%d" % len(sums)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self.surprises.append(error)
            raise

    def _note(self, key: bytes, total: int) -> None:
        with self._lock:
            self.sums[key].append(total)

    def _count(self, number: int) -> None:
        rng = random.Random(number)
        while not self._ending.is_set():
            key = rng.choice(COUNTERS)
            self._note(key, self._client.incr(key))

    async def _count_async(self) -> None:
        async with (
            AsyncClient(self._addresses, timeout=TIMEOUT_S, limits=IMPATIENT) as db,
            asyncio.TaskGroup() as tasks,
        ):
            for number in range(TASKS):
                tasks.create_task(self._count_in_task(db, random.Random(100 + number)))

    async def _count_in_task(self, db: AsyncClient[bytes], rng: random.Random) -> None:
        while not self._ending.is_set():
            key = rng.choice(COUNTERS)
            self._note(key, await db.incr(key))

    def _compare_and_set(self) -> None:
        """Nobody else writes the key, so no condition may fail."""
        version, steps = 0, 0
        while not self._ending.is_set():
            steps += 1
            version = self._client.put(b"chain", str(steps), if_version=version)
        assert self._client.get(b"chain", with_version=True) == (b"%d" % steps, version)

    def _write_many(self) -> None:
        """Nobody else has the keys, so all that were put are found by the delete, each once."""
        keys = [b"%c many %d" % (b"0:Zaf~"[number % 6], number) for number in range(MANY)]
        while not self._ending.is_set():
            self._client.put_many(dict.fromkeys(keys, b"v"))
            assert self._client.delete_many(keys) == MANY


def strike_all(world: WiredCluster, strikes: Sequence[tuple[str, str]], callers: Callers) -> None:
    """These faults, (kind, victim), one after the other; between two of them somebody gets through."""
    nemesis = Nemesis(world, [], rng=random.Random(5), rounds=0)
    for kind, name in strikes:
        before = callers.counted
        nemesis.strike(kind, name)
        until(lambda before=before: callers.counted > before or callers.surprises, timeout_s=TIMEOUT_S)  # type: ignore[misc]


KILLS = [("kill", "node-1"), ("kill", "router-1"), ("kill", "node-2"), ("kill", "router-2"), ("kill", "node-1")]
CUTS = [
    *[("cut", "node-1"), ("lose answers", "node-1"), ("cut", "router-1"), ("lose answers", "node-2")],
    *[("refuse", "node-2"), ("cut", "node-2"), ("cut", "router-2"), ("freeze", "node-1"), ("mute", "node-1")],
]


@pytest.mark.parametrize(("partition", "strikes"), [("hash", KILLS), ("range", CUTS)], ids=["kills", "links"])
def test_counters_are_exact(tmp_path: Path, partition: str, strikes: list[tuple[str, str]]) -> None:
    count(tmp_path, partition, strikes)


def count(directory: Path, partition: str, strikes: list[tuple[str, str]]) -> None:
    with wired_cluster(directory, partition=partition, nodes=2, config=CONFIG) as world:
        callers = Callers(world.addresses)
        callers.start()
        try:
            strike_all(world, strikes, callers)
        finally:
            callers.stop()
        with world.client(timeout=TIMEOUT_S) as db:
            callers.check(db)
        print(f"{callers.counted} counted")


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("partition", ["hash", "range"])
def test_counters_are_exact_for_long(tmp_path: Path, partition: str) -> None:
    strikes = [*KILLS, *CUTS] * 6
    random.Random(partition).shuffle(strikes)
    count(tmp_path, partition, strikes)
