"""One client in many hands: threads, forks, cancelled calls, pickles, after its end; and many clients at once."""

from __future__ import annotations

import asyncio
import copy
import os
import pickle
import random
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator

import pytest

from shardkv import AsyncClient, Client, WriteBatch
from shardkv.errors import ClientClosed, DeadlineExceeded, OutcomeUnknown, ShardKVError, UnavailableError
from tests.cluster.test_hostile_peers import unharmed
from tests.worlds.cluster import ClusterWorld, cluster_world

THREADS = 16


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterWorld]:
    with cluster_world(tmp_path_factory.mktemp("callers"), "--nodes", "2", "--shards", "4") as found:
        yield found


@pytest.fixture(autouse=True)
def nobody_suffers(world: ClusterWorld) -> Iterator[None]:
    with unharmed(world):
        yield


@pytest.mark.parametrize("connections_max", [1, 16])
def test_sixteen_threads_share_a_client(world: ClusterWorld, connections_max: int) -> None:
    surprises: list[BaseException] = []

    def work(db: Client[bytes], number: int) -> None:
        rng = random.Random(number)
        try:
            for turn in range(20):
                key, value = f"thread-{number}-{turn % 7}", rng.randbytes(rng.randrange(1, 20_000))
                db.put(key, value)
                assert db.get(key) == value
                assert db.get_many([key, "nobody's"]) == {key: value, "nobody's": None}
                if turn % 10 == 0:
                    assert [found for found, _ in db.scan(key, key + "\0")] == [key.encode()]
        except BaseException as error:
            surprises.append(error)
            raise

    with world.client(timeout=20, connections_max=connections_max) as db:
        threads = [threading.Thread(target=work, args=(db, number), daemon=True) for number in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(40)
            assert not thread.is_alive()
    assert not surprises


def test_closing_under_the_feet_of_other_threads_ends_their_calls(world: ClusterWorld) -> None:
    ends: list[Exception] = []

    def work(db: Client[bytes]) -> None:
        try:
            while True:
                db.get("before")
        except (ShardKVError, OSError, RuntimeError) as error:
            ends.append(error)

    db = world.client(timeout=5)
    threads = [threading.Thread(target=work, args=(db,), daemon=True) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    db.get("before")
    db.close()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert {type(end) for end in ends} == {ClientClosed}, ends


def test_a_closed_client_says_so(world: ClusterWorld) -> None:
    db = world.client(timeout=5)
    db.put("key", "value")
    rows = db.scan()
    next(rows)
    db.close()
    db.close()
    batch = WriteBatch()
    batch.put("key", "value")
    for call in (
        lambda: db.get("key"),
        lambda: db.put("key", "other"),
        lambda: db.delete("key"),
        lambda: db.get_many([]),
        lambda: db.put_many({}),
        lambda: db.delete_many(["key"]),
        lambda: db.write(batch),
        lambda: db.incr("number"),
        lambda: db.count(),
        lambda: db.delete_range("a", "a"),
        lambda: list(db.scan()),
        lambda: db.ping(),
        lambda: db.__enter__(),
    ):
        with pytest.raises(ClientClosed, match="closed"):
            call()


def test_a_client_is_not_pickled_or_copied(world: ClusterWorld) -> None:
    with world.client(timeout=5) as db:
        for call in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match=r"cannot be pickled\. Create one in each process"):
                call(db)


FORKING = """
    import os, sys, threading
    from shardkv import Client

    db = Client(sys.argv[1], timeout=10)
    db.put("fork-parent", "1")
    busy = threading.Thread(target=lambda: [db.get("fork-parent") for _ in range(3000)], daemon=True)
    busy.start()
    children = []
    for number in range(6):
        pid = os.fork()
        if pid == 0:
            ok = all(db.get("fork-parent") == b"1" for _ in range(200))
            db.put(f"fork-child-{number}", str(number))
            ok = ok and db.get(f"fork-child-{number}") == str(number).encode()
            ok = ok and len(list(db.scan("fork-child-0"))) > 0
            if number % 2:
                db.close()
            os._exit(0 if ok else 9)
        children.append(pid)
    for turn in range(300):
        assert db.get("fork-parent") == b"1"
    busy.join(30)
    assert all(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 for pid in children)
    assert db.get_many([f"fork-child-{n}" for n in range(6)]) == {f"fork-child-{n}": b"%d" % n for n in range(6)}
    print("all well")
"""


def test_a_client_survives_forks_in_parent_and_children(world: ClusterWorld) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FORKING), world.address],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "all well\n", done.stderr


def test_cancelled_calls_disturb_no_other(world: ClusterWorld) -> None:
    async def main() -> None:
        rng = random.Random(5)
        async with AsyncClient(world.address, timeout=10) as db:
            await db.put_many({f"cancel-{number}": f"{number}" for number in range(50)})

            async def one(number: int) -> None:
                assert await db.get(f"cancel-{number}") == str(number).encode()

            for _ in range(20):
                tasks = [asyncio.create_task(one(number)) for number in range(50)]
                await asyncio.sleep(rng.uniform(0, 0.004))
                doomed = rng.sample(tasks, 25)
                for task in doomed:
                    task.cancel()
                results = await asyncio.gather(*tasks, return_exceptions=True)
                for task, result in zip(tasks, results, strict=True):
                    assert result is None or (task in doomed and isinstance(result, asyncio.CancelledError))
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0):
                    await db.get("cancel-1")
            rows = db.scan(prefix="cancel-")
            await anext(rows)
            del rows
            assert await db.get("cancel-7") == b"7"

    asyncio.run(main())


def test_cancelled_writes_are_whole_or_not_there(world: ClusterWorld) -> None:
    async def main() -> None:
        async with AsyncClient(world.address, timeout=10) as db:
            for turn in range(60):
                pairs = {f"{{whole-{turn}}}:{side}": os.urandom(8) for side in "abc"}
                task = asyncio.create_task(db.put_many(pairs))
                await asyncio.sleep(random.Random(turn).uniform(0, 0.003))
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            await db.put("settled", "1")
            for turn in range(60):
                found = await db.get_many([f"{{whole-{turn}}}:{side}" for side in "abc"])
                assert len({value is None for value in found.values()}) == 1

    asyncio.run(main())


def test_an_async_client_after_its_end_says_so(world: ClusterWorld) -> None:
    async def main() -> None:
        db = AsyncClient(world.address, timeout=5)
        assert await db.get("nothing") is None
        await db.close()
        await db.close()
        with pytest.raises(ClientClosed):
            await db.get("nothing")
        with pytest.raises(TypeError):
            pickle.dumps(db)

    asyncio.run(main())


def test_five_hundred_clients_at_once(world: ClusterWorld) -> None:
    async def one(number: int) -> None:
        async with AsyncClient(world.address, timeout=30) as db:
            await db.put(f"crowd-{number}", f"{number}")
            assert await db.get(f"crowd-{number}") == str(number).encode()

    async def main() -> None:
        async with asyncio.timeout(60):
            await asyncio.gather(*[one(number) for number in range(500)])

    asyncio.run(main())


def test_a_call_that_ran_out_of_time_never_applies_what_it_said_it_did_not(world: ClusterWorld) -> None:
    rng = random.Random(6)
    refused = []
    with world.client(timeout=10) as db:
        for number in range(400):
            key = f"late-{number}"
            try:
                db.put(key, "x", timeout=rng.choice([2e-5, 1e-4, 3e-4, 5e-4, 1e-3, 2e-3]))
            except OutcomeUnknown:
                pass
            except (DeadlineExceeded, UnavailableError):
                refused.append(key)
        assert refused
        assert set(db.get_many(refused).values()) == {None}
