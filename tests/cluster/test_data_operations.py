"""Compare-and-set, incr, ttl, count and delete_range on a real cluster, in hash and range mode, on stores so small that
they flush and compact all the time, while processes are killed."""

from __future__ import annotations

import asyncio
import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shardkv import AsyncClient, Client, WriteBatch
from shardkv.errors import (
    ConditionFailed,
    InvalidArgument,
    InvalidNumber,
    OutcomeUnknown,
    ShardKVError,
    UnavailableError,
)
from tests.worlds.cluster import SMALL_ENGINE, ClusterWorld, cluster_world, until

THREADS = 8


@pytest.fixture(scope="module", params=["hash", "range"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterWorld]:
    directory: Path = tmp_path_factory.mktemp(request.param)
    options = ["--partition", request.param, "--durability", "os", "--nodes", "3", "--shards", "6"]
    with cluster_world(directory, *options, config=SMALL_ENGINE) as found:
        yield found


def in_threads(*works: Callable[[], None]) -> None:
    """Run them at the same time; the first surprise is raised."""
    surprises: list[BaseException] = []

    def carefully(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - told by the test's own thread
            surprises.append(error)

    threads = [threading.Thread(target=carefully, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a call did not end"
    if surprises:
        raise surprises[0]


def churn(db: Client[bytes], name: str) -> None:
    """Writes that make every store flush and compact."""
    for turn in range(4):
        db.put_many({f"{first}{name}-{number}": "x" * 400 for first in "5aMz" for number in range(turn, 200)})


def test_counting_by_compare_and_set_loses_no_step(world: ClusterWorld) -> None:
    steps = 25
    with world.client(timeout=30) as db:
        db.delete("counter")

        def count() -> None:
            done = 0
            while done < steps:
                found = db.get("counter", with_version=True)
                try:
                    if found is None:
                        db.put("counter", "1", if_absent=True)
                    else:
                        db.put("counter", str(int(found[0]) + 1), if_version=found[1])
                    done += 1
                except ConditionFailed as error:
                    assert error.detail["found"] != error.detail["expected"]

        in_threads(*[count] * THREADS, lambda: churn(db, "cas"))
        assert db.get("counter") == b"%d" % (THREADS * steps)


def test_only_one_of_many_gets_what_must_be_absent(world: ClusterWorld) -> None:
    with world.client(timeout=30) as db:
        for turn in range(10):
            won: list[int] = []

            def take(turn: int = turn, won: list[int] = won) -> None:
                try:
                    won.append(db.put(f"lock-{turn}", "mine", if_absent=True))
                except ConditionFailed as error:
                    assert error.detail["expected"] == 0 < error.detail["found"]

            in_threads(*[take] * THREADS)
            assert len(won) == 1
            assert db.get(f"lock-{turn}", with_version=True) == (b"mine", won[0])


def test_incr_from_many_clients_sums_exactly(world: ClusterWorld) -> None:
    sums: list[int] = []

    def blocking() -> None:
        with world.client(timeout=30) as db:
            sums.extend([db.incr("sum") for _ in range(50)])

    async def many() -> None:
        async with AsyncClient(world.address, timeout=30) as db:
            for _ in range(5):
                sums.extend(await asyncio.gather(*[db.incr("sum") for _ in range(40)]))

    with world.client(timeout=30) as db:
        db.delete("sum")
        in_threads(*[blocking] * 4, lambda: asyncio.run(many()), lambda: churn(db, "incr"))
        assert sorted(sums) == list(range(1, 401))
        assert db.get("sum") == b"400"
        assert db.incr("sum", -401) == -1
        db.put("sum", "many")
        with pytest.raises(InvalidNumber, match=r"'many'.*Nothing was written"):
            db.incr("sum")


def test_incr_over_kills_sums_to_what_was_acknowledged_and_at_most_what_was_not(tmp_path: Path) -> None:
    keys = [f"n-{number}" for number in range(6)]
    told: dict[str, list[int]] = {key: [] for key in keys}
    unknown = dict.fromkeys(keys, 0)
    stop = threading.Event()

    def count(key: str) -> None:
        with world.client(timeout=2) as db:
            while not stop.is_set():
                try:
                    told[key].append(db.incr(key))
                except OutcomeUnknown:
                    unknown[key] += 1
                except UnavailableError:
                    continue

    def kill() -> None:
        with world.client(timeout=20) as db:
            for dying in ("node-1", "router-1", "node-2"):
                seen = sum(map(len, told.values()))
                until(lambda seen=seen: sum(map(len, told.values())) > seen + 50, what="writers get on")
                world.kill(dying)
                db.get_many(keys)
        stop.set()

    with cluster_world(tmp_path, "--nodes", "2", "--shards", "4", config=SMALL_ENGINE) as world:
        try:
            in_threads(*[lambda key=key: count(key) for key in keys], kill)  # type: ignore[misc]
        finally:
            stop.set()
        with world.client(timeout=20) as db:
            for key in keys:
                found = int(db.get(key) or 0)
                assert len(told[key]) <= found <= len(told[key]) + unknown[key]
                assert told[key] == sorted(set(told[key])), "a sum that was told was lost or told twice"
                assert not told[key] or found >= told[key][-1]


def test_what_has_a_time_to_live_is_gone_everywhere_when_it_ends(world: ClusterWorld) -> None:
    with world.client(timeout=30) as db:
        db.delete_range(prefix="ttl-")
        db.put("ttl-stays", "v", ttl=3600)
        db.put_many({f"ttl-{number}": "v" for number in range(20)}, ttl=1)
        assert db.incr("ttl-n", 5, ttl=3600) == 5
        seen = db.put("ttl-seen", "v", ttl=1)
        churn(db, "ttl")
        until(lambda: db.get("ttl-0") is None and db.get("ttl-seen") is None, what="they end")
        assert [key for key, _ in db.scan(prefix="ttl-")] == [b"ttl-n", b"ttl-stays"]
        assert db.count(prefix="ttl-") == 2
        assert set(db.get_many([f"ttl-{number}" for number in range(20)]).values()) == {None}
        with pytest.raises(ConditionFailed) as caught:
            db.put("ttl-seen", "w", if_version=seen)
        assert caught.value.detail["found"] == 0
        db.put("ttl-seen", "w", if_absent=True)
        assert db.delete("ttl-0") is False
        db.put("ttl-stays", "v")
        assert db.delete_range(prefix="ttl-") == 3


def test_a_batch_under_conditions_is_made_whole_or_not_at_all(world: ClusterWorld) -> None:
    with world.client(timeout=30) as db:
        db.delete_many(["{o7}state", "{o7}total", "{o7}log"])
        seen = db.put("{o7}state", "new")
        batch = WriteBatch()
        batch.put("{o7}total", "5")
        batch.put("{o7}log", "x")
        with pytest.raises(ConditionFailed):
            db.write(batch, if_versions={"{o7}state": seen + 1})
        assert db.get_many(["{o7}total", "{o7}log"]) == {"{o7}total": None, "{o7}log": None}
        version = db.write(batch, if_versions={"{o7}state": seen, "{o7}total": 0})
        assert db.get_many(["{o7}total", "{o7}log"], with_version=True) == {
            "{o7}total": (b"5", version),
            "{o7}log": (b"x", version),
        }
        scattered = WriteBatch()
        for first in "5aMz\u00ff":
            for number in range(5):
                scattered.put(f"{first}scattered-{number}", "v")
        with pytest.raises(
            InvalidArgument, match=r"keeps to one shard, and its keys are of \d: .* is of shard"
        ) as caught:
            db.write(scattered, if_versions={"{o7}state": seen})
        assert len(caught.value.detail["shards"]) > 1
        assert db.count("5scattered", "5scattered~") == 0
        assert db.write(scattered) is None


def random_key(rng: random.Random) -> bytes:
    return rng.choice([b"", b"5", b"a", b"M", b"mm", b"z", b"\xff"]) + b"model%04d" % rng.randrange(3000)


@pytest.mark.parametrize("seed", [1, 2])
def test_count_and_delete_range_equal_a_model(world: ClusterWorld, seed: int) -> None:
    rng = random.Random(seed)
    with world.client(timeout=30) as db:
        db.delete_range()
        rows: dict[bytes, int] = {}

        def inside(low: bytes, high: bytes | None) -> list[bytes]:
            return sorted(key for key in rows if low <= key and (high is None or key < high))

        for _ in range(12):
            puts = [random_key(rng) for _ in range(400)]
            db.put_many(dict.fromkeys(puts, b"x" * 200))
            rows.update(dict.fromkeys(puts, 0))
            low, high = sorted((random_key(rng), random_key(rng)))
            assert db.count() == len(rows)
            assert db.count(low, high) == len(inside(low, high))
            assert db.count(prefix=low[:2]) == sum(key.startswith(low[:2]) for key in rows)
            if rng.random() < 0.5:
                gone = inside(low, high)
                assert db.delete_range(low, high) == len(gone)
            else:
                limit = rng.randrange(1, 300)
                before = inside(low, None)
                assert db.delete_range(low, limit=limit) == min(limit, len(before))
                left = set(db.scan(low, keys_only=True))
                gone = [key for key in before if key not in left]
                assert len(gone) == min(limit, len(before))
            for key in gone:
                del rows[key]
            assert list(db.scan(keys_only=True)) == sorted(rows)


def test_ranges_are_covered_whole_while_processes_are_killed(tmp_path: Path) -> None:
    with cluster_world(tmp_path, "--partition", "range", "--nodes", "2", config=SMALL_ENGINE) as world:
        stay = {f"stay-{number}".encode(): b"v" for number in range(500)}
        rows = {f"go-{number:05}": "x" * 50 for number in range(10_000)}

        def while_killing(dying: str, call: Callable[[], int]) -> int:
            told: list[int] = []
            in_threads(lambda: told.append(call()), lambda: world.kill(dying))
            world.wait_serving()
            return told[0]

        with world.client(timeout=30) as db:
            db.put_many(stay)
            db.put_many(rows)
            for dying in ("node-1", "router-1"):
                assert while_killing(dying, lambda: db.count(prefix="go-")) == len(rows)
            assert while_killing("node-1", lambda: db.delete_range(prefix="go-")) <= len(rows)
            assert db.count(prefix="go-") == 0
            assert list(db.scan(prefix="go-")) == []
            assert dict(db.scan(prefix="stay-")) == stay


def test_what_could_not_be_deleted_is_told_with_what_was(world: ClusterWorld) -> None:
    with world.client(timeout=30) as db:
        db.put_many({f"{first}{number}": "v" for number in range(100) for first in "5aMz"})
        before = db.count()
        world.kill("node-2", number=signal.SIGSTOP)
        try:
            with pytest.raises(ShardKVError) as caught:
                db.delete_range(timeout=1)
        finally:
            world.kill("node-2", number=signal.SIGCONT)
        deleted = caught.value.detail["deleted"]
        assert deleted < before
        assert not deleted or f"{deleted} keys of the range were deleted" in str(caught.value)
        assert db.count() <= before - deleted
        assert db.delete_range() <= before - deleted
        assert db.count() == 0
