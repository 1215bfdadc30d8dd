"""The exact contract of calls and scans while links delay, break, go silent one way or both, or become slow.

Every link of the cluster runs through a proxy. The tests run in hash and in range mode.
"""

from __future__ import annotations

import asyncio
import random
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from itertools import islice
from typing import Any

import psutil
import pytest

from shardkv import AsyncClient, Client, WriteBatch
from shardkv.errors import DeadlineExceeded, OutcomeUnknown, ShardKVError, UnavailableError
from shardkv.limits import Limits
from tests.worlds.cluster import until
from tests.worlds.proxy import Proxy, Way
from tests.worlds.wired_cluster import WiredCluster, wired_cluster

CONFIG = """
[engine]
durability = "os"
memtable_bytes_max = 2097152
block_cache_bytes = 1048576
[limits]
silence_timeout_ms = 1000
"""
IMPATIENT = Limits(silence_timeout_ms=1000)
TIMEOUT_S = 0.4
MARGIN = 1.5
"""A call may take its timeout times this; what is above 1 is for a busy machine, as is LAG_SHARES."""
LAG_SHARES = 3
"""A call may be later yet by so many times what this process, meanwhile, had to wait for its turn at most."""
NAMING_LAG_S = 0.03
"""Routers answer 0.1 s before the deadline: on a machine that is this late once they may be later more than thrice."""
KEYS = [b"%c-%d" % (byte, number) for byte in b"0agmsz" for number in range(3)]
"""In all shards of all nodes, in both modes."""
MIB = 1 << 20
ROWS, ROW_BYTES = 800, 64 * 1024
"""The keyspace to scan: 50 MiB."""


BOTH_MODES = pytest.mark.parametrize("world", ["hash", "range"], indirect=True)
MOSTLY_HASH = pytest.mark.parametrize("world", ["hash", pytest.param("range", marks=pytest.mark.long)], indirect=True)
"""For what hardly depends on the mode."""


@pytest.fixture(scope="module")
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WiredCluster]:
    directory = tmp_path_factory.mktemp(f"links-{request.param}")
    with wired_cluster(directory, partition=request.param, config=CONFIG) as found:
        yield found


@pytest.fixture(autouse=True)
def healthy(world: WiredCluster) -> Iterator[None]:
    """Every test begins and ends with a cluster that serves."""
    yield
    world.heal()
    for name in [*world.nodes, *world.routers]:
        world.signal(name, signal.SIGCONT)
        if not world.runs(name):
            world.restart(name)
    world.wait_serving()


# One deadline


def silent_client_links(world: WiredCluster) -> None:
    for name in world.routers:
        world.wires.do(world.proxies[name].mute)


def held_answers(world: WiredCluster) -> None:
    for name in world.routers:
        world.wires.do(partial(world.proxies[name].hold, Way.BACK))


def slow_client_links(world: WiredCluster) -> None:
    for name in world.routers:
        world.wires.do(partial(world.proxies[name].throttle, 2_000))


def refusing_routers(world: WiredCluster) -> None:
    for name in world.routers:
        world.wires.do(world.proxies[name].refuse)


def frozen_routers(world: WiredCluster) -> None:
    for name in world.routers:
        world.signal(name, signal.SIGSTOP)


def silent_node_link(world: WiredCluster) -> None:
    world.wires.do(world.proxies["node-2"].mute)


def late_node_links(world: WiredCluster) -> None:
    for name in world.nodes:
        world.wires.do(partial(world.proxies[name].delay, TIMEOUT_S))


def frozen_node(world: WiredCluster) -> None:
    world.signal("node-2", signal.SIGSTOP)


def dead_node(world: WiredCluster) -> None:
    world.kill("node-2")


CLIENT_FAULTS = [silent_client_links, held_answers, slow_client_links, refusing_routers, frozen_routers]
NODE_FAULTS = [silent_node_link, late_node_links, frozen_node, dead_node]


class Told:
    """How one call ended, and in what share of its timeout."""

    def __init__(self, what: str, timeout_s: float = TIMEOUT_S) -> None:
        self.what = what
        self._timeout_s = timeout_s
        self.error: BaseException | None = None
        self.share = 0.0
        self._began = time.monotonic()

    def end(self, error: BaseException | None = None) -> None:
        self.error = error
        self.share = (time.monotonic() - self._began) / self._timeout_s

    def __str__(self) -> str:
        return f"{self.what}: {self.error!r} after {self.share:.2f} of its timeout"


class Lag(threading.Thread):
    """By how much this process woke up too late at most, while this is entered."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most_s = 0.0
        self._ending = threading.Event()

    def run(self) -> None:
        while not self._ending.is_set():
            due = time.monotonic() + 0.01
            self._ending.wait(0.01)
            self.most_s = max(self.most_s, time.monotonic() - due)

    def __enter__(self) -> Lag:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self.join()


def one_put(value: bytes) -> WriteBatch:
    batch = WriteBatch()
    batch.put(b"{put}", value)
    return batch


def calls_of(db: Client[bytes], value: bytes) -> dict[str, Callable[[], object]]:
    return {
        "get": lambda: db.get(KEYS[0]),
        "put": lambda: db.put(b"put", value),
        "delete": lambda: db.delete(b"nothing"),
        "get_many": lambda: db.get_many(KEYS),
        "put_many": lambda: db.put_many(dict.fromkeys(KEYS, value)),
        "delete_many": lambda: db.delete_many([b"%c-nothing" % key[0] for key in KEYS]),
        "incr, a write": lambda: db.incr(b"number"),
        "write": lambda: db.write(one_put(value), if_versions={b"{put}none": 0}),
        "scan": lambda: list(db.scan(limit=50)),
        "scan in reverse": lambda: list(db.scan(limit=50, reverse=True, keys_only=True)),
        "partial scan": lambda: list(db.scan(limit=50, on_shard_error="partial")),
        "partial get_many": lambda: db.get_many(KEYS, on_shard_error="partial"),
        "count": lambda: db.count(),
        "partial count": lambda: db.count(on_shard_error="partial"),
        "delete_range": lambda: db.delete_range(b"nothing", b"nothing else"),
        "ping": lambda: db.ping(),
        "status": lambda: db.status(),
    }


def async_calls_of(db: AsyncClient[bytes], value: bytes) -> dict[str, Callable[[], Coroutine[Any, Any, object]]]:
    async def scan(**options: Any) -> object:
        return [row async for row in db.scan(limit=50, **options)]

    return {
        "async get": lambda: db.get(KEYS[0]),
        "async put": lambda: db.put(b"put", value),
        "async delete": lambda: db.delete(b"nothing"),
        "async get_many": lambda: db.get_many(KEYS),
        "async put_many": lambda: db.put_many(dict.fromkeys(KEYS, value)),
        "async delete_many": lambda: db.delete_many([b"%c-nothing" % key[0] for key in KEYS]),
        "async incr, a write": lambda: db.incr(b"number"),
        "async write": lambda: db.write(one_put(value), if_versions={b"{put}none": 0}),
        "async scan": scan,
        "async scan in reverse": lambda: scan(reverse=True, keys_only=True),
        "async partial scan": lambda: scan(on_shard_error="partial"),
        "async partial get_many": lambda: db.get_many(KEYS, on_shard_error="partial"),
        "async count": lambda: db.count(),
        "async partial count": lambda: db.count(on_shard_error="partial"),
        "async delete_range": lambda: db.delete_range(b"nothing", b"nothing else"),
        "async ping": lambda: db.ping(),
        "async status": lambda: db.status(),
    }


def all_at_once(db: Client[bytes], value: bytes, timeout_s: float = TIMEOUT_S) -> list[Told]:
    """Every kind of call, each in a thread of its own."""
    told = []

    def run(one: Told, call: Callable[[], object]) -> None:
        try:
            call()
        except ShardKVError as error:
            one.end(error)
        else:
            one.end()

    threads = []
    for what, call in calls_of(db, value).items():
        told.append(Told(what, timeout_s))
        threads.append(threading.Thread(target=run, args=(told[-1], call), daemon=True))
        threads[-1].start()
    for thread in threads:
        thread.join(20 * timeout_s)
        assert not thread.is_alive(), f"a call hangs: {', '.join(one.what for one in told if not one.share)}"
    return told


async def all_at_once_async(db: AsyncClient[bytes], value: bytes) -> list[Told]:
    async def run(what: str, call: Callable[[], Coroutine[Any, Any, object]]) -> Told:
        one = Told(what)
        try:
            await call()
        except ShardKVError as error:
            one.end(error)
        else:
            one.end()
        return one

    return await asyncio.gather(*[run(what, call) for what, call in async_calls_of(db, value).items()])


def check_in_time(told: list[Told], lag: Lag, timeout_s: float = TIMEOUT_S) -> None:
    for one in told:
        assert one.share < MARGIN + LAG_SHARES * lag.most_s / timeout_s, f"{one}; lag {lag.most_s:.3f} s"


def check_told(told: list[Told]) -> None:
    assert any(one.error for one in told), "the fault did not hit"
    for one in told:
        may_be_unknown = any(word in one.what for word in ("put", "delete", "write"))
        expected = (UnavailableError, DeadlineExceeded, *([OutcomeUnknown] if may_be_unknown else []))
        assert one.error is None or isinstance(one.error, expected), str(one)


@MOSTLY_HASH
@pytest.mark.parametrize("fault", CLIENT_FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("connected", [True, False], ids=["connected", "new"])
def test_one_deadline_covers_connecting_and_waiting_for_a_router(
    world: WiredCluster, fault: Callable[[WiredCluster], None], connected: bool
) -> None:
    check_told(told_during(world, fault, connected=connected)[0])


@BOTH_MODES
@pytest.mark.parametrize("fault", NODE_FAULTS, ids=lambda fault: fault.__name__)
def test_one_deadline_covers_waiting_in_the_router_retries_and_all_shards(
    world: WiredCluster, fault: Callable[[WiredCluster], None]
) -> None:
    told, lag = told_during(world, fault, connected=True)
    check_told(told)
    if lag.most_s > NAMING_LAG_S:
        return  # routers had no time to answer before the deadline, and nobody else knows whom to name
    slow = [one for one in told if isinstance(one.error, (DeadlineExceeded, OutcomeUnknown, UnavailableError))]
    blind = [str(one) for one in slow if "hard" not in str(one.error) and "node-" not in str(one.error)]
    assert len(blind) < len(slow) / 2, f"neither shard nor node is named: {blind}"


@MOSTLY_HASH
@pytest.mark.parametrize("fault", [silent_client_links, *NODE_FAULTS], ids=lambda fault: fault.__name__)
def test_one_deadline_covers_nodes_and_the_way_through_a_router_in_direct_mode(
    world: WiredCluster, fault: Callable[[WiredCluster], None]
) -> None:
    check_told(told_during(world, fault, connected=True, direct=True)[0])


@BOTH_MODES
def test_one_deadline_covers_connecting_the_queue_retries_and_all_shards_together(world: WiredCluster) -> None:
    """Each takes so long that two of them are more than the timeout."""
    timeout_s = 3 * TIMEOUT_S
    world.kill("node-2")
    for name in [*world.routers, "node-1"]:
        world.wires.do(partial(world.proxies[name].delay, timeout_s / 6))  # four times before a new connection is used
    with world.client(timeout=timeout_s, connections_max=1) as db, Lag() as lag:
        told = all_at_once(db, b"queued", timeout_s)
    check_in_time(told, lag, timeout_s)
    assert sum(one.share > 0.5 for one in told) > len(told) / 2, list(map(str, told))
    assert not [str(one) for one in told if one.error is None and one.what in ("get_many", "put_many", "scan", "count")]


@MOSTLY_HASH
@pytest.mark.parametrize("fault", ["frozen", "silent"])
def test_with_one_of_two_routers_silent_new_clients_are_served_within_their_timeout(
    world: WiredCluster, fault: str
) -> None:
    name = world.routers[0]
    if fault == "frozen":
        world.signal(name, signal.SIGSTOP)
    else:
        world.wires.do(world.proxies[name].mute)
    timeout_s = 5 * TIMEOUT_S

    async def ask() -> None:
        async with AsyncClient(world.addresses, timeout=timeout_s) as db:
            assert await db.get(b"nothing") is None

    async def main() -> None:
        await asyncio.gather(*[ask() for _ in range(8)])

    for _ in range(4):
        with world.client(timeout=timeout_s) as db:
            assert db.get(b"nothing") is None
    asyncio.run(main())


def told_during(
    world: WiredCluster, fault: Callable[[WiredCluster], None], *, connected: bool, direct: bool = False
) -> tuple[list[Told], Lag]:
    """What every kind of call of both clients is told, in time; `connected`: they were when the fault came."""

    async def main() -> list[Told]:
        with world.client(timeout=TIMEOUT_S, direct=direct) as db:
            async with AsyncClient(world.addresses, timeout=TIMEOUT_S, direct=direct) as adb:
                if connected:
                    db.put_many(dict.fromkeys([*KEYS, b"put"], b"before"), timeout=10)
                    await adb.get_many(KEYS, timeout=10)
                while direct and connected and not reaches_nodes(adb):
                    await asyncio.sleep(0.01)
                fault(world)
                sync = asyncio.get_running_loop().run_in_executor(None, all_at_once, db, b"sync")
                told = await all_at_once_async(adb, b"async")
                return told + await sync

    with Lag() as lag:
        told = asyncio.run(main())
    check_in_time(told, lag)
    return told, lag


def reaches_nodes(db: AsyncClient[bytes]) -> bool:
    """Whether it knows all nodes and is connected to them."""
    assert db._nodes is not None
    return db._nodes._known is not None and all(peer.writable for peer in db._nodes._known[1].values())


@BOTH_MODES
def test_a_write_that_was_refused_is_not_there_and_an_unknown_one_is_whole_or_not(world: WiredCluster) -> None:
    rng = random.Random(4)
    pairs = [(b"%c-pair {%d}:a" % (byte, byte), b"%c-pair {%d}:b" % (byte, byte)) for byte in b"0agmsz"]
    allowed: dict[bytes, set[bytes | None]] = {key: {None} for pair in pairs for key in pair}
    with world.client(timeout=TIMEOUT_S) as db:
        for number in range(60):
            proxy = world.proxies[rng.choice(world.nodes)]
            faults: list[Callable[[], None]] = [proxy.cut, proxy.hold, proxy.heal, partial(proxy.hold, Way.BACK)]
            world.wires.do(rng.choice(faults))
            pair, value = rng.choice(pairs), b"%d" % number + b"." * rng.choice([0, 200_000])
            try:
                db.put_many(dict.fromkeys(pair, value), timeout=rng.choice([0.01, 0.05, 0.1]))
            except OutcomeUnknown:
                for key in pair:
                    allowed[key].add(value)
            except (UnavailableError, DeadlineExceeded):
                pass
            else:
                for key in pair:
                    allowed[key] = {value}
    world.heal()
    with world.client(timeout=20) as db:
        found = db.get_many(list(allowed))
        for key, held in found.items():
            assert held in allowed[key], f"{key!r} holds {(held or b'')[:9]!r}, which was refused or overwritten"


# Late replies


def own_value(key: bytes) -> bytes:
    """What only this key holds."""
    return key + b"." * (len(key) * 37 % 400)


@MOSTLY_HASH
def test_64_tasks_that_cancel_and_time_out_never_get_what_was_meant_for_another(world: WiredCluster) -> None:
    keys = [b"%c-late-%d" % (b"0agmsz"[number % 6], number) for number in range(64)]
    cancelled = timed_out = answered = 0

    async def task(db: AsyncClient[bytes], number: int) -> None:
        nonlocal cancelled, timed_out, answered
        rng = random.Random(number)
        for _ in range(25):
            key = rng.choice(keys)
            many = rng.sample(keys, 5)
            call: Coroutine[Any, Any, Any]
            call = db.get(key, timeout=rng.uniform(0.005, 0.2)) if rng.random() < 0.5 else db.get_many(many)
            running = asyncio.ensure_future(call)
            if rng.random() < 0.5:
                asyncio.get_running_loop().call_later(rng.uniform(0, 0.06), running.cancel)
            await asyncio.wait([running])
            if running.cancelled():
                cancelled += 1
            elif isinstance(running.exception(), (DeadlineExceeded, UnavailableError)):
                timed_out += 1
            else:
                found = running.result()
                assert found == ({one: own_value(one) for one in many} if isinstance(found, dict) else own_value(key))
                answered += 1

    async def main() -> None:
        async with AsyncClient(world.addresses, timeout=10) as db:
            await db.put_many({key: own_value(key) for key in keys})
            for name, seconds in zip([*world.nodes, world.routers[0]], [0.01, 0.03, 0.05, 0.01], strict=True):
                world.wires.do(partial(world.proxies[name].delay, seconds))
            async with asyncio.TaskGroup() as tasks:
                for number in range(64):
                    tasks.create_task(task(db, number))

    asyncio.run(main())
    assert min(cancelled, timed_out, answered) > 50, (cancelled, timed_out, answered)


@MOSTLY_HASH
def test_threads_that_time_out_never_get_what_was_meant_for_another(world: WiredCluster) -> None:
    keys = [b"%c-late-%d" % (b"0agmsz"[number % 6], number) for number in range(64)]
    counts = {"answered": 0, "timed out": 0}
    surprises: list[BaseException] = []

    def work(db: Client[bytes], number: int) -> None:
        rng = random.Random(number)
        try:
            for turn in range(200):
                if turn >= 20 and min(counts.values()) > 40:
                    return
                many = rng.sample(keys, 5)
                timeout_s = rng.uniform(0.01, 0.3 + 0.02 * turn)  # so that a busy machine answers some, too
                try:
                    assert db.get_many(many, timeout=timeout_s) == {key: own_value(key) for key in many}
                    counts["answered"] += 1
                except (DeadlineExceeded, UnavailableError):
                    counts["timed out"] += 1
        except BaseException as error:
            surprises.append(error)
            raise

    with world.client(timeout=10, connections_max=6) as db:
        db.put_many({key: own_value(key) for key in keys})
        for name, seconds in zip(world.nodes, [0.003, 0.01, 0.03], strict=True):
            world.wires.do(partial(world.proxies[name].delay, seconds))
        threads = [threading.Thread(target=work, args=(db, number), daemon=True) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
    assert not surprises, surprises
    assert min(counts.values()) > 40, counts


# Pools


@MOSTLY_HASH
def test_a_pool_waits_within_the_deadline_and_no_longer(world: WiredCluster) -> None:
    with world.client(timeout=20, connections_max=2) as db:
        db.get(KEYS[0])
        for name in world.routers:
            world.wires.do(partial(world.proxies[name].hold, Way.BACK))
        results: list[bytes | None] = []
        holders = [threading.Thread(target=lambda: results.append(db.get(b"nothing")), daemon=True) for _ in range(2)]
        for holder in holders:
            holder.start()
        until(lambda: db._pool._lent == 2)
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded, match="All 2 connections"):
            db.get(KEYS[0], timeout=TIMEOUT_S)
        assert 1 <= (time.monotonic() - began) / TIMEOUT_S < MARGIN
        waiting = threading.Thread(target=lambda: results.append(db.get(b"nothing")), daemon=True)
        waiting.start()
        world.heal()
        for thread in [*holders, waiting]:
            thread.join(20)
            assert not thread.is_alive()
        assert results == [None] * 3


# Scans


@pytest.fixture(scope="module")
def rows(world: WiredCluster) -> dict[bytes, bytes]:
    """50 MiB of rows in all shards, also in memory here."""
    rng = random.Random(7)
    found = {b"%c-row-%04d" % (b"0agmsz"[number % 6], number): rng.randbytes(ROW_BYTES) for number in range(ROWS)}
    keys = list(found)
    with world.client(timeout=30) as db:
        db.delete_many(list(db.scan(keys_only=True)))
        for first in range(0, ROWS, 32):
            db.put_many({key: found[key] for key in keys[first : first + 32]})
    return found


def memory_bytes(world: WiredCluster) -> dict[str, int]:
    return {name: psutil.Process(world.pid(name)).memory_info().rss for name in [*world.nodes, *world.routers]}


@BOTH_MODES
def test_a_slow_reader_of_scans_holds_back_routers_and_nodes(world: WiredCluster, rows: dict[bytes, bytes]) -> None:
    """Six scans of 50 MiB over slow links: what nodes send stays near what clients got, and nobody's memory grows."""
    scans, seconds = 6, 2.0
    router, proxies = world.proxies[world.routers[0]], [world.proxies[name] for name in world.nodes]

    async def read(db: AsyncClient[bytes]) -> None:
        async for _ in db.scan():
            pass

    async def main() -> None:
        clients = [AsyncClient(router.address, timeout=60) for _ in range(scans)]
        for db in clients:
            assert len([key async for key in db.scan(keys_only=True)]) == len(rows)
        before, passed = memory_bytes(world), passed_bytes(router, proxies)
        world.wires.do(lambda: router.throttle(MIB))
        tasks = [asyncio.create_task(read(db)) for db in clients]
        await asyncio.sleep(seconds)
        grown = {name: size - before[name] for name, size in memory_bytes(world).items()}
        got, sent = (now - then for now, then in zip(passed_bytes(router, proxies), passed, strict=True))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for db in clients:
            await db.close()
        assert got > scans * MIB / 4, "the scans did not run"
        assert sent < got + scans * 4 * MIB, f"nodes sent {sent} bytes, clients got {got}"
        assert max(grown.values()) < scans * 4 * MIB, grown

    asyncio.run(main())


@BOTH_MODES
def test_a_program_that_stops_reading_its_scan_stops_the_cluster(world: WiredCluster, rows: dict[bytes, bytes]) -> None:
    """Only the page that is read and the one after it are fetched."""
    scans = 6
    router, proxies = world.proxies[world.routers[0]], [world.proxies[name] for name in world.nodes]

    async def main() -> None:
        async with AsyncClient(router.address, timeout=60) as db:
            (_, before), readers = passed_bytes(router, proxies), [db.scan() for _ in range(scans)]
            for reader in readers:
                for _ in range(3):
                    await anext(reader)
            sent = -1
            while sent != passed_bytes(router, proxies)[1]:
                sent = passed_bytes(router, proxies)[1]
                await asyncio.sleep(0.3)
            assert sent - before < scans * 4 * MIB

    asyncio.run(main())


@BOTH_MODES
def test_what_a_scan_leaves_out_does_not_travel(world: WiredCluster) -> None:
    """Limit, prefix, bounds, direction and keys alone are the nodes' work: each sends little more than is wanted."""
    router, proxies = world.proxies[world.routers[0]], [world.proxies[name] for name in world.nodes]
    small = {b"%c-small-%04d" % (b"0agmsz"[number % 6], number): bytes(100) for number in range(6_000)}
    large = {b"%c-large-%d" % (byte, number): bytes(100_000) for byte in b"0agmsz" for number in range(3)}
    kib = 1024
    with Client(router.address, timeout=30) as db:
        db.put_many(small | large)
        for scan, rows, most_bytes in [
            (partial(db.scan, "g-small", limit=4), 4, 8 * kib),
            (partial(db.scan, stop="g-small-9", limit=4, reverse=True), 4, 8 * kib),
            (partial(db.scan, prefix="g-small-0002"), 1, 2 * kib),
            (partial(db.scan, prefix="g-large", keys_only=True), 3, 2 * kib),
            (partial(db.scan, prefix="g-large", keys_only=True, reverse=True), 3, 2 * kib),
            (partial(db.count, prefix="g-small"), 1000, 2 * kib),
        ]:
            before = passed_bytes(router, proxies)
            found = scan()
            assert (found if isinstance(found, int) else len(list(found))) == rows, str(scan)
            client, nodes = (now - then for now, then in zip(passed_bytes(router, proxies), before, strict=True))
            assert max(client, nodes / len(proxies)) < most_bytes, (client, nodes, str(scan))
        db.delete_many([*small, *large])


def passed_bytes(router: Proxy, nodes: list[Proxy]) -> tuple[int, int]:
    """What came to clients, and from nodes."""
    return router.bytes_passed, sum(proxy.bytes_passed for proxy in nodes)


@pytest.mark.parametrize(
    ("world", "face"),
    [
        ("hash", "sync"),
        ("range", "async"),
        pytest.param("hash", "async", marks=pytest.mark.long),
        pytest.param("range", "sync", marks=pytest.mark.long),
    ],
    indirect=["world"],
)
def test_scans_are_whole_and_exact_over_restarts_in_the_middle(
    world: WiredCluster, rows: dict[bytes, bytes], face: str
) -> None:
    rng = random.Random(face)
    reverse = face == "async"
    found: list[tuple[bytes, bytes]] = []

    def take(row: tuple[bytes, bytes]) -> None:
        """Something is killed or cut again and again while the scan goes on."""
        found.append(row)
        if len(found) % 400 == 100:
            name = rng.choice([*world.routers, *world.nodes])
            world.kill(name)
            world.restart(name)
        elif len(found) % 100 == 50:
            world.wires.do(world.proxies[rng.choice([*world.routers, *world.nodes])].cut)

    async def scan_async() -> None:
        async with AsyncClient(world.addresses, timeout=20, limits=IMPATIENT) as db:
            async for row in db.scan(reverse=reverse):
                take(row)

    if face == "async":
        asyncio.run(scan_async())
    else:
        with world.client(timeout=20) as db:
            for row in db.scan(reverse=reverse):
                take(row)
    assert found == sorted(rows.items(), reverse=reverse)


@pytest.mark.parametrize(
    ("world", "reverse"),
    [
        ("hash", False),
        ("range", True),
        pytest.param("hash", True, marks=pytest.mark.long),
        pytest.param("range", False, marks=pytest.mark.long),
    ],
    indirect=["world"],
)
def test_a_cursor_goes_on_at_the_other_router_each_time_while_one_is_gone(
    world: WiredCluster, rows: dict[bytes, bytes], reverse: bool
) -> None:
    """Each stretch has a client of its own, at a router that is the only one; nodes restart between stretches."""
    found: list[bytes] = []
    cursor: str | None = None
    for turn in range(4):
        here, gone = world.routers if turn % 2 else reversed(world.routers)
        node = world.nodes[turn % len(world.nodes)]
        world.kill(gone)
        world.kill(node)
        world.restart(node)
        begin: dict[str, Any] = {"cursor": cursor} if cursor else {"reverse": reverse}
        with Client(world.proxies[here].address, timeout=20) as db:
            scan = db.scan(keys_only=True, **begin)
            found += islice(scan, 270)
            cursor = scan.cursor
        world.restart(gone)
        if cursor is None:
            break
    assert found == sorted(rows, reverse=reverse)
