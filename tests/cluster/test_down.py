"""A process is down and stays down for a while: what still works, what is refused, in how long and in which words."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest

from shardkv.errors import DeadlineExceeded, OutcomeUnknown, RouterUnavailable, ShardUnavailable, UnavailableError
from tests.worlds.cluster import ClusterWorld, cluster_world, until

DOWN_MS = 1600
"""How long the launcher waits before it starts a dead process again; it may choose down to half of it."""
CONFIG = f"""
[router]
park_ms = 200
[launcher]
restart_first_ms = {DOWN_MS}
"""
KEYS = [b"0", b"b", b"k", b"t", b"z"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterWorld]:
    directory = tmp_path_factory.mktemp("down")
    with cluster_world(directory, "--partition", "range", "--nodes", "2", "--shards", "4", config=CONFIG) as found:
        with found.client(timeout=10) as db:
            db.put_many({key: b"kept " + key for key in KEYS})
        yield found


def owners(world: ClusterWorld) -> dict[bytes, tuple[int, str]]:
    """Shard and node of each of KEYS, from what the router says."""
    with world.client(timeout=10) as db:
        shards = db.status()["keyspaces"]["default"]["shards"]
    return {key: next((s["id"], s["node"]) for s in reversed(shards) if s["start"].encode() <= key) for key in KEYS}


def all_is_back(world: ClusterWorld) -> bool:
    world.wait_serving()
    with world.client(timeout=10) as db:
        return db.get_many(KEYS) == {key: b"kept " + key for key in KEYS} == dict(db.scan())


def test_a_dead_node_takes_only_its_shards_with_it(world: ClusterWorld) -> None:
    owned = owners(world)
    lost = [key for key in KEYS if owned[key][1] == "node-1"]
    kept = [key for key in KEYS if owned[key][1] != "node-1"]
    assert lost
    assert kept
    with world.client(timeout=0.35) as db:
        world.kill("node-1")
        start = time.monotonic()
        for call in (lambda: db.get(lost[0]), lambda: db.put(lost[0], b"kept " + lost[0]), lambda: list(db.scan())):
            with pytest.raises((ShardUnavailable, DeadlineExceeded)) as caught:
                call()
            assert f"hard {owned[lost[0]][0]}" in str(caught.value), str(caught.value)
            assert caught.value.detail["shard"] == owned[lost[0]][0]
            assert db.get_many(kept) == {key: b"kept " + key for key in kept}
            for key in kept:
                db.put(key, b"kept " + key)
            if time.monotonic() - start > DOWN_MS / 2000 - 0.5:
                break
    assert all_is_back(world)


def test_a_write_to_both_says_which_shard_took_nothing(world: ClusterWorld) -> None:
    owned = owners(world)
    with world.client(timeout=0.8) as db:
        world.kill("node-2")
        with pytest.raises((UnavailableError, DeadlineExceeded, OutcomeUnknown)) as caught:
            db.put_many({key: b"kept " + key for key in KEYS})
        detail = caught.value.detail
        blamed = {shard for shard, node in owned.values() if node == "node-2"}
        assert set(detail["shards"]) <= blamed
        assert detail["applied"] == sum(node == "node-1" for _, node in owned.values())
        assert detail["applied"] + detail["refused"] + detail["unknown"] == len(KEYS)
    assert all_is_back(world)


def test_a_frozen_node_takes_only_its_shards_with_it(world: ClusterWorld) -> None:
    owned = owners(world)
    lost = next(key for key in KEYS if owned[key][1] == "node-1")
    kept = [key for key in KEYS if owned[key][1] != "node-1"]
    world.kill("node-1", number=signal.SIGSTOP)
    try:
        with world.client(timeout=0.5) as db:
            start = time.monotonic()
            with pytest.raises((UnavailableError, DeadlineExceeded)):
                db.get(lost)
            with pytest.raises((OutcomeUnknown, UnavailableError, DeadlineExceeded)):
                db.put(lost, b"kept " + lost)
            assert time.monotonic() - start < 3
            assert db.get_many(kept) == {key: b"kept " + key for key in kept}
    finally:
        world.kill("node-1", number=signal.SIGCONT)
    assert all_is_back(world)


def test_without_a_router_calls_end_in_time_and_name_it(world: ClusterWorld) -> None:
    with world.client(timeout=0.4) as db:
        db.get(KEYS[0])
        world.kill("router-1")
        for call in (
            lambda: db.get(KEYS[0]),
            lambda: db.put(KEYS[0], b"kept " + KEYS[0]),
            lambda: list(db.scan()),
            lambda: db.get_many(KEYS),
            lambda: db.ping(),
        ):
            start = time.monotonic()
            try:
                call()
            except RouterUnavailable as error:
                assert world.address in str(error)
                assert error.retriable
            except DeadlineExceeded:
                pass  # the router is back, and the rest of the time was too short
            assert time.monotonic() - start < 1
    assert all_is_back(world)


def test_without_the_metadata_process_reads_and_writes_go_on(world: ClusterWorld) -> None:
    restarts = world.records()["meta"]["restarts"]
    with world.client(timeout=1) as db:
        world.kill("meta")
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            db.put_many({key: b"kept " + key for key in KEYS})
            assert len(db.get_many(KEYS)) == len(list(db.scan()))
    until(lambda: world.records()["meta"]["restarts"] > restarts)
    assert all_is_back(world)
