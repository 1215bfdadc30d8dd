"""Direct mode at a real cluster: calls go to the nodes, through a router when that fails, and never to the wrong shard.

Which way a call took is read from the router's own count of its requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shardkv import OutcomeUnknown, RouterUnavailable, ShardKVError, WriteBatch
from shardkv.metadata.client import MetaClient
from shardkv.topology.documents import SHARDS, ShardDocument, decode_document, encode_document
from shardkv.wire.hello import Identity
from shardkv.wire.messages import MetaCompare, MetaPut
from tests.shardkv.client.faces import DIRECT_FACES, open_face
from tests.shardkv.client.test_interrupted import everywhere
from tests.worlds.cluster import SMALL_ENGINE, ClusterWorld, cluster_world, until

THREADS = 16
KEYS = [b"%c-%d" % (byte, number) for byte in b"0aeimquy" for number in range(12)]


@pytest.fixture(scope="module", params=["hash", "range"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterWorld]:
    directory = tmp_path_factory.mktemp(request.param)
    with cluster_world(directory, "--partition", request.param, "--shards", "9", config=SMALL_ENGINE) as found:
        yield found


@pytest.fixture(params=DIRECT_FACES)
def db(request: pytest.FixtureRequest, world: ClusterWorld) -> Iterator[Any]:
    with open_face(request.param, world.address, timeout=10) as client:
        yield client


def through_router(db: Any) -> int:
    """How many reads and writes the router was asked for."""
    requests = db.status()["router"]["requests"]
    return requests["read"] + requests["write"]


def goes_direct(db: Any, call: Callable[[], object]) -> bool:
    """Whether what `call` does reaches no router."""
    before = through_router(db)
    call()
    return through_router(db) == before


def wait_direct(db: Any) -> None:
    """Until every shard is read directly."""
    until(lambda: goes_direct(db, lambda: [db.get(key) for key in KEYS]), timeout_s=20, what="reading directly")


def test_reads_and_writes_of_keys_reach_no_router(db: Any) -> None:
    wait_direct(db)

    def use() -> None:
        db.put_many({key: b"1" + key for key in KEYS})
        first = db.put("one", "1")
        assert db.get("one", with_version=True) == (b"1", first)
        assert db.put("one", "2", if_version=first) > first
        assert db.incr("{n}", 5, ttl=60) == 5
        assert db.delete("{n}") is True
        assert db.get_many([*KEYS, b"none"]) == {key: b"1" + key for key in KEYS} | {b"none": None}
        assert {found[1] > 0 for found in db.get_many(KEYS, with_version=True).values()} == {True}
        db.write_in_batch(lambda batch: [batch.put(key, b"2" + key) for key in KEYS])
        assert db.get_many(KEYS) == {key: b"2" + key for key in KEYS}
        assert db.delete_many([*KEYS, b"none", b"one"]) == len(KEYS) + 1

    assert goes_direct(db, use)


def test_everything_else_goes_through_a_router(db: Any) -> None:
    wait_direct(db)
    db.put_many(dict.fromkeys(KEYS, b"v"))
    assert [key for key, _ in db.scan("0", "z") if key in KEYS] == sorted(KEYS)
    assert db.count("a", "b") >= 12
    assert db.get_many(KEYS, on_shard_error="partial") == dict.fromkeys(KEYS, b"v")
    assert db.delete_range() >= len(KEYS)
    assert db.get_many(KEYS) == dict.fromkeys(KEYS)
    assert db.ping() > 0


def test_conditions_over_several_shards_are_refused_as_ever(db: Any) -> None:
    wait_direct(db)
    batch = WriteBatch()
    for key in KEYS:
        batch.put(key, "x")
    with pytest.raises(ShardKVError, match="keeps to one shard"):
        db.write(batch, if_versions={KEYS[0]: 0})
    assert db.get_many(KEYS) == dict.fromkeys(KEYS)


class Model:
    """A dict beside the store. After OutcomeUnknown a key may hold either value until it is read."""

    def __init__(self, db: Any, seed: int) -> None:
        self._db = db
        self._rng = random.Random(seed)
        self._may: dict[bytes, set[bytes | None]] = {key: {None} for key in KEYS}
        self._counter = 0

    def clear(self) -> None:
        self._db.delete_many(KEYS)

    def step(self) -> None:
        self._counter += 1
        keys = self._rng.sample(KEYS, self._rng.choice([1, 1, 1, 5, 40]))
        value = b"%d" % self._counter
        match self._rng.randrange(5):
            case 0:
                self._write(lambda: self._db.put(keys[0], value), keys[:1], value)
            case 1:
                self._write(lambda: self._db.put_many(dict.fromkeys(keys, value)), keys, value)
            case 2:
                self._write(lambda: self._db.delete_many(keys), keys, None)
            case 3:
                self._saw(keys[0], self._db.get(keys[0]))
            case _:
                for key, found in self._db.get_many(keys).items():
                    self._saw(key, found)

    def _write(self, call: Callable[[], object], keys: list[bytes], value: bytes | None) -> None:
        try:
            call()
        except OutcomeUnknown:
            for key in keys:
                self._may[key].add(value)
        else:
            for key in keys:
                self._may[key] = {value}

    def _saw(self, key: bytes, found: bytes | None) -> None:
        assert found in self._may[key], f"{key!r} holds {found!r}, not one of {self._may[key]!r}"
        self._may[key] = {found}


VICTIMS = [["node-1"], ["router-1"], ["node-2", "router-1"], ["node-1", "node-2", "node-3"], ["node-3"]]


def test_random_operations_equal_a_dict_while_processes_die(db: Any, world: ClusterWorld) -> None:
    model = Model(db, 5)
    model.clear()
    for victims in VICTIMS:
        for _ in range(30):
            model.step()
        threading.Timer(0.02, world.kill, victims).start()
        for _ in range(60):
            model.step()
        wait_direct(db)


def change(world: ClusterWorld, alter: Callable[[ShardDocument], ShardDocument]) -> None:
    """Change shards in the metadata store, as a move would."""
    host, port = world.address_of("meta")

    async def run() -> None:
        client = MetaClient([f"{host}:{port}"], me=lambda: Identity("launcher", "test"))
        client.start()
        try:
            compares, puts = [], []
            for entry in (await client.read(SHARDS)).entries:
                shard = decode_document(entry.key, entry.value or b"")
                assert isinstance(shard, ShardDocument)
                compares.append(MetaCompare(entry.key, entry.revision))
                puts.append(MetaPut(entry.key, encode_document(alter(shard))))
            assert (await client.txn(compares, puts)).applied
        finally:
            await client.close()

    asyncio.run(run())


def test_raised_epochs_are_followed(db: Any, world: ClusterWorld) -> None:
    wait_direct(db)
    db.put_many({key: b"kept" + key for key in KEYS})
    before = db.put("counted", "0")
    for _ in range(3):
        change(world, lambda shard: msgspec.structs.replace(shard, epoch=shard.epoch + 1))
        assert db.get_many(KEYS) == {key: b"kept" + key for key in KEYS}
        assert db.incr("counted") > 0
        wait_direct(db)
    assert db.get("counted", with_version=True)[0] == b"3"
    assert db.get("counted", with_version=True)[1] > before


def test_a_shard_that_moved_is_never_read_or_written_where_it_was(db: Any, world: ClusterWorld) -> None:
    """The new owners begin with nothing here, so an old value that is read is one from an old owner."""
    db.delete_range()
    wait_direct(db)
    db.put_many(dict.fromkeys(KEYS, b"old"))
    nodes = sorted({shard["node"] for shard in db.status()["keyspaces"]["default"]["shards"]})
    following = dict(zip(nodes, [*nodes[1:], nodes[0]], strict=True))
    moved = lambda shard: msgspec.structs.replace(shard, epoch=shard.epoch + 1, node=following[shard.node])  # noqa: E731
    change(world, moved)
    with world.client(timeout=10) as other:
        until(lambda: set(other.get_many(KEYS).values()) == {None})
        assert [db.get(key) for key in KEYS[::2]] == [None] * len(KEYS[::2])
        assert db.get_many(KEYS) == dict.fromkeys(KEYS)
        db.put_many(dict.fromkeys(KEYS, b"new"))
        assert other.get_many(KEYS) == dict.fromkeys(KEYS, b"new")
        wait_direct(db)
        assert db.get_many(KEYS) == dict.fromkeys(KEYS, b"new")
        db.delete_range()


def test_sixteen_threads_share_a_direct_client(world: ClusterWorld) -> None:
    surprises: list[BaseException] = []

    def work(number: int) -> None:
        rng = random.Random(number)
        try:
            for _ in range(15):
                mine = {b"%s/%d" % (key, number): rng.randbytes(rng.randrange(1, 200)) for key in KEYS[::5]}
                db.put_many(mine)
                assert db.get_many(list(mine)) == mine
                key, value = rng.choice(list(mine.items()))
                assert db.get(key) == value
        except BaseException as error:
            surprises.append(error)
            raise

    with open_face("sync direct", world.address, timeout=20, connections_max=4) as db:
        threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
    assert not surprises


def test_a_direct_call_that_is_interrupted_anywhere_disturbs_no_other(world: ClusterWorld) -> None:
    """By what a signal's handler raises: also while the client learns where keys are."""
    with open_face("sync direct", world.address, timeout=5, connections_max=1) as db:
        rows = {key: b"kept " + key for key in KEYS}
        db.put_many(rows)
        wait_direct(db)

        def ask_after_a_change() -> None:
            db._nodes._known, db._nodes._stale = None, True
            db.get(KEYS[0])

        for call in (lambda: db.get(KEYS[0]), lambda: db.put("own", "1"), ask_after_a_change):
            steps = 0
            for steps in everywhere(call):
                key = KEYS[steps % len(KEYS)]
                assert db.get(key) == rows[key]
            assert steps > 30
            wait_direct(db)
        assert db.get_many(KEYS) == rows


def sockets_of(pid: int) -> set[str]:
    """The sockets a process has open."""
    return set(filter(None, map(_socket, Path(f"/proc/{pid}/fd").iterdir())))


def _socket(link: Path) -> str | None:
    with contextlib.suppress(FileNotFoundError):  # that of listing the directory itself
        name = os.readlink(link)
        return name if name.startswith("socket:") else None
    return None


def test_a_forked_child_uses_none_of_its_parents_sockets(world: ClusterWorld) -> None:
    with open_face("sync direct", world.address, timeout=10) as db:
        wait_direct(db)
        inherited = sockets_of(os.getpid())
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                wait_direct(db)
                db.put_many(dict.fromkeys(KEYS, b"child"))
                status = 0 if db.get_many(KEYS) == dict.fromkeys(KEYS, b"child") else 2
                os.write(writing, b"\n".join(name.encode() for name in sockets_of(os.getpid())))
            finally:
                os._exit(status)
        os.close(writing)
        for _ in range(50):
            assert db.get("parent") is None
        with os.fdopen(reading, "rb") as told:
            childs = {name.decode() for name in told.read().split()}
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert len(childs - inherited) >= 3
        assert goes_direct(db, lambda: db.get_many(KEYS))
        assert set(db.get_many(KEYS).values()) == {b"child"}


def test_with_the_routers_gone_keys_are_read_and_written_on(db: Any, world: ClusterWorld) -> None:
    wait_direct(db)
    world.kill("launcher", number=signal.SIGSTOP)
    try:
        world.kill("router-1")
        for number, key in enumerate(KEYS):
            db.put(key, b"%d" % number)
            assert db.get(key) == b"%d" % number
        assert db.get_many(KEYS) == {key: b"%d" % number for number, key in enumerate(KEYS)}
        with pytest.raises(RouterUnavailable):
            db.count(timeout=0.3)
    finally:
        world.kill("launcher", number=signal.SIGCONT)
    until(lambda: db.count(timeout=10) >= len(KEYS))
    wait_direct(db)
