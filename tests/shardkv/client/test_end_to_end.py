"""Both clients and the command line against a real cluster: hash, and range with two routers."""

from __future__ import annotations

import random
import signal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardkv import DeadlineExceeded, OutcomeUnknown, ShardUnavailable, UnknownKeyspace
from tests.shardkv.client.faces import DIRECT_FACES, FACES, open_face
from tests.worlds.cluster import SMALL_ENGINE, ClusterWorld, cluster_world

SHAPES = {
    "hash": ["--shards", "6"],
    "range": [
        "--partition",
        "range",
        "--routers",
        "2",
        "--split-at",
        "city:F",
        "--split-at",
        "city:S",
        "--split-at",
        "k",
    ],
}


@pytest.fixture(scope="module", params=SHAPES)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    directory = tmp_path_factory.mktemp(request.param)
    with cluster_world(directory, *SHAPES[request.param], config=SMALL_ENGINE) as running:
        yield running


@pytest.fixture(params=[*FACES, *DIRECT_FACES])
def db(request: pytest.FixtureRequest, world: ClusterWorld):
    with open_face(request.param, world.address) as client:
        yield client


def empty(db) -> None:
    db.delete_many(list(db.scan(keys_only=True)), timeout=30)


def test_every_operation(db):
    empty(db)
    db.put("user:1000", b"John")
    assert db.get("user:1000") == b"John"
    assert db.delete("user:1000") is True
    assert db.delete("user:1000") is False
    assert db.get("user:1000") is None
    db.put_many({"user:1001": "Alice", "user:1002": "Bob", "a": "1", "z": "2"})
    assert db.get_many(["user:1001", "nope", "a"]) == {"user:1001": b"Alice", "nope": None, "a": b"1"}
    db.batch_put(["user:1003", "user:1004"], ["Carol", "Dave"])
    db.write_in_batch(lambda batch: (batch.put("b", "1"), batch.delete("a"), batch.put("z", "3")))
    assert dict(db.scan("a", "c")) == {b"b": b"1"}
    assert [key for key, _ in db.get_range("user:1001", "user:1003")] == [b"user:1001", b"user:1002", b"user:1003"]
    assert db.delete_many(["b", "z", "nope"]) == 2
    assert [key for key, _ in db.scan(reverse=True)] == [b"user:100%d" % number for number in (4, 3, 2, 1)]
    assert db.ping() > 0
    assert db.status()["keyspaces"]


def test_scans_equal_a_sorted_dict_across_flushes(db):
    """Random data, overwritten and deleted, several times the memtable; any range, either way, any limit."""
    empty(db)
    rng = random.Random(3)
    model: dict[bytes, bytes] = {}
    for _ in range(4):
        heads = [b"", b"a", b"city:", b"k\xff", b"z", b"\xff"]
        pairs = {rng.choice(heads) + b"%d" % rng.randrange(4000): rng.randbytes(60) for _ in range(1500)}
        db.put_many(pairs)
        model |= pairs
        gone = rng.sample(sorted(model), len(model) // 4)
        assert db.delete_many(gone) == len(gone)
        for key in gone:
            del model[key]
    assert list(db.scan()) == sorted(model.items())
    assert list(db.scan(reverse=True)) == sorted(model.items(), reverse=True)
    assert db.get_many([*model, *gone]) == model | dict.fromkeys(gone)

    bounds = st.one_of(st.sampled_from(sorted(model)), st.binary(max_size=3))

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(one=bounds, other=bounds, limit=st.one_of(st.none(), st.integers(0, 50)), reverse=st.booleans())
    def check(one, other, limit, reverse):
        low, high = sorted((one, other))
        wanted = sorted((row for row in model.items() if low <= row[0] < high), reverse=reverse)
        assert list(db.scan(low, high, limit=limit, reverse=reverse)) == wanted[:limit]
        both_ends = sorted((key for key in model if low <= key <= high), reverse=reverse)
        assert [key for key, _ in db.get_range(low, high, limit=limit, reverse=reverse)] == both_ends[:limit]

    check()


def test_values_larger_than_a_reply_may_be_together(db):
    empty(db)
    value = bytes(23 * 1024 * 1024 // 2)
    keys = [f"big:{number}" for number in range(3)]
    for key in keys:
        db.put(key, value, timeout=30)
    assert {key: len(found) for key, found in db.get_many(keys, timeout=30).items()} == dict.fromkeys(keys, len(value))
    assert sum(1 for _ in db.scan(prefix="big:", timeout=30)) == 3
    empty(db)


@pytest.mark.parametrize("face", FACES)
def test_an_unknown_keyspace(face, world):
    with open_face(face, world.address, keyspace="nope") as db, pytest.raises(UnknownKeyspace, match="nope"):
        db.get("k")


def test_two_routers_take_clients_of_one_port(world: ClusterWorld):
    routers = [name for name in world.records() if name.startswith("router")]
    clients = [open_face("sync", world.address) for _ in range(16)]
    seen = {client.status()["router"]["name"] for client in clients}
    for client in clients:
        client.close()
    assert seen == set(routers)


PROBES = [f"{head}:{number}" for head in ("a", "city:G", "city:T", "x") for number in range(4)]


def test_a_node_that_hangs_holds_up_only_its_own_shards(world: ClusterWorld):
    with open_face("sync", world.address) as db:
        db.put_many(dict.fromkeys(PROBES, "v"))
        world.kill("node-2", number=signal.SIGSTOP)
        try:
            served, hung = 0, []
            for key in PROBES:
                try:
                    assert db.get(key, timeout=0.25) == b"v"
                    served += 1
                except (DeadlineExceeded, ShardUnavailable):
                    hung.append(key)
            assert served >= 4
            assert hung
            with pytest.raises(OutcomeUnknown):
                db.put(hung[0], "w", timeout=0.25)
        finally:
            world.kill("node-2", number=signal.SIGCONT)
        assert set(db.get_many(PROBES, timeout=10).values()) <= {b"v", b"w"}


def test_a_node_that_is_down_is_named_and_the_others_serve(world: ClusterWorld):
    """Last in this file: a node dies."""
    with open_face("sync", world.address) as db:
        db.put_many(dict.fromkeys(PROBES, "v"))
        shards = db.status()["keyspaces"]["default"]["shards"]
        lost = {shard["id"] for shard in shards if shard["node"] == "node-2"}
        world.kill("launcher", number=signal.SIGSTOP)
        try:
            world.kill("node-2")
            with pytest.raises(ShardUnavailable) as caught:
                db.get_many(PROBES, timeout=0.6)
            assert caught.value.detail["shard"] in lost
            assert f"Shard {caught.value.detail['shard']} is not served" in str(caught.value)
            with pytest.raises(ShardUnavailable, match="operations") as caught:
                db.put_many(dict.fromkeys(PROBES, "w"), timeout=0.6)
            assert set(caught.value.detail["shards"]) <= lost
            assert caught.value.detail["applied"] >= 4
            assert caught.value.detail["refused"] == len(PROBES) - caught.value.detail["applied"]
        finally:
            world.kill("launcher", number=signal.SIGCONT)
        db.put_many(dict.fromkeys(PROBES, "x"), timeout=20)
        assert db.get_many(PROBES) == dict.fromkeys(PROBES, b"x")
