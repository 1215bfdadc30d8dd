"""A cluster whose metadata is in etcd, with real processes: what goes on while etcd or metadata processes are gone."""

from __future__ import annotations

import asyncio
import signal
import time
from functools import partial
from pathlib import Path

from shardkv import Client
from shardkv.errors import ShardKVError
from shardkv.metadata.client import MetaClient
from shardkv.topology.documents import RouterDocument, encode_document
from shardkv.topology.view import Topology
from shardkv.wire.hello import Identity
from shardkv.wire.messages import MetaPut
from tests.shardkv.metadata.world import Follower
from tests.worlds.cluster import until
from tests.worlds.etcd_cluster import LEASE_MS, EtcdCluster, etcd_cluster

KEYS = [b"key-%d" % number for number in range(64)]


def put_and_get(db: Client[bytes], value: bytes) -> None:
    db.put_many(dict.fromkeys(KEYS, value))
    assert db.get_many(KEYS) == dict.fromkeys(KEYS, value)
    assert len(list(db.scan())) == len(KEYS)


def works(world: EtcdCluster, value: bytes) -> bool:
    try:
        with world.client(timeout=2) as db:
            put_and_get(db, value)
    except ShardKVError:
        return False
    return True


def test_reads_and_writes_go_on_without_etcd_and_a_node_that_starts_meanwhile_waits_for_it(tmp_path: Path) -> None:
    with etcd_cluster(tmp_path) as world:
        world.start()
        with world.client(timeout=5) as db:
            put_and_get(db, b"before")
            world.etcd.kill()
            end = time.monotonic() + 1.5 * LEASE_MS / 1000
            while time.monotonic() < end:
                put_and_get(db, b"meanwhile")
            until(lambda: (world.status_of("meta-1") or {}).get("store_reached") is False)
        world.kill("node-1")
        world.restart("node-1")
        with world.client(timeout=0.3) as db:
            kept = [key for key in KEYS if served(db, key)]
        assert 0 < len(kept) < len(KEYS)
        assert world.runs("node-1")
        world.etcd.start()
        until(lambda: works(world, b"after"), timeout_s=30, what=world.logs())
        until(lambda: world.leader() is not None)
        assert all(world.runs(name) for name in [*world.metas, *world.nodes, *world.routers])


def served(db: Client[bytes], key: bytes) -> bool:
    try:
        return db.get(key) == b"meanwhile"
    except ShardKVError:
        return False


def test_reads_and_writes_go_on_without_any_metadata_process(tmp_path: Path) -> None:
    with etcd_cluster(tmp_path) as world:
        world.start()
        with world.client(timeout=5) as db:
            for name in world.metas:
                world.kill(name)
            for number in range(20):
                put_and_get(db, b"%d" % number)
            world.restart("meta-2")
            until(lambda: world.leader() == "meta-2", what=world.logs())
            put_and_get(db, b"after")
        world.kill("node-1")
        world.restart("node-1")
        until(lambda: works(world, b"again"), what=world.logs())


def test_when_the_leader_dies_another_one_places_the_shards(tmp_path: Path) -> None:
    with etcd_cluster(tmp_path, metas=3) as world:
        for name in world.metas:
            world.restart(name)
        until(lambda: world.leader() is not None, what=world.logs())
        leader = world.leader()
        assert leader is not None
        world.kill(leader)
        world.metas.remove(leader)
        died = time.monotonic()
        for name in [*world.nodes, *world.routers]:
            world.restart(name)
        until(lambda: works(world, b"placed"), what=world.logs())
        assert time.monotonic() - died < LEASE_MS / 1000 + 10
        assert world.leader() in world.metas


def test_a_leader_that_was_stopped_for_longer_than_its_lease_is_one_of_many_when_it_goes_on(tmp_path: Path) -> None:
    with etcd_cluster(tmp_path) as world:
        world.start()
        until(lambda: world.leader() is not None)
        old = world.leader()
        assert old is not None
        (other,) = {*world.metas} - {old}
        world.signal(old, signal.SIGSTOP)
        try:
            until(lambda: leads(world, other), what=world.logs())
        finally:
            world.signal(old, signal.SIGCONT)
        until(lambda: knows_leader(world, old, other), what=world.logs())
        assert works(world, b"after")
        assert leads(world, other)
        assert world.runs(old)


def test_a_change_reaches_who_follows_another_metadata_process_in_time(tmp_path: Path) -> None:
    async def story(world: EtcdCluster) -> list[float]:
        writer, reader = (
            MetaClient([world.proxies[name].address], me=lambda: Identity("launcher", "test")) for name in world.metas
        )
        writer.start()
        reader.start()
        follower = Follower(reader)
        took_s = []
        for number in range(50):
            put = MetaPut("routers/far", encode_document(RouterDocument("far", "127.0.0.1:1", number)))
            await writer.txn([], [put])
            answered = time.monotonic()
            await follower.until(partial(is_known, number))
            took_s.append(time.monotonic() - answered)
        for each in (follower.stop(), writer.close(), reader.close()):
            await each
        return took_s

    with etcd_cluster(tmp_path, nodes=1) as world:
        world.start()
        took_s = sorted(asyncio.run(story(world)))
        assert took_s[len(took_s) // 2] < 0.05, took_s


def is_known(number: int, view: Topology) -> bool:
    return "far" in view.routers and view.routers["far"].pid == number


def leads(world: EtcdCluster, name: str) -> bool:
    return knows_leader(world, name, name)


def knows_leader(world: EtcdCluster, asked: str, leader: str) -> bool:
    told = (world.status_of(asked) or {}).get("leader")
    return bool(told and told["name"] == leader)
