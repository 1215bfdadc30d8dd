"""The metadata store over a socket: transactions, long polls, following through restarts, registering."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shardkv.errors import (
    ClusterMismatch,
    DiskFull,
    InvalidArgument,
    OutcomeUnknown,
    StoreMismatch,
    StorePoisoned,
    UnavailableError,
)
from shardkv.metadata import register
from shardkv.metadata.client import MetaClient
from shardkv.metadata.leading import LEADER_KEY
from shardkv.metadata.listing import Listing, listed
from shardkv.metadata.register import register_node, register_router, sign_off_router
from shardkv.topology.documents import KeyspaceDocument, RouterDocument, encode_document
from shardkv.wire.hello import Identity
from shardkv.wire.messages import MetaCompare, MetaPut, MetaTxn, MetaTxnReply, MetaWatch, Op, decode_meta_entries
from tests.shardkv.metadata.world import Follower, meta_client, meta_world, node_document
from tests.worlds.proxy import fault_proxy

Story = Callable[[Path], Coroutine[Any, Any, None]]


def run(story: Story, tmp_path: Path) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await story(tmp_path / "meta")

    asyncio.run(bounded())


def test_the_default_keyspace_is_placed_once_all_wanted_nodes_registered(tmp_path: Path) -> None:
    async def story(directory: Path) -> None:
        async with meta_world(directory) as world, meta_client(world.address) as client:
            follower = Follower(client)
            await register_node(client, node_document("node-10"))
            await register_node(client, node_document("node-2"))
            view = await follower.until(lambda view: len(view.nodes) == 2)
            assert view.keyspaces == {}
            await register_node(client, node_document("node-1"))
            view = await follower.until(lambda view: "default" in view.keyspaces)
            assert [shard.node for shard in view.keyspace("default").shards] == [
                "node-1",
                "node-2",
                "node-10",
                "node-1",
            ]
            assert [shard.id for shard in view.keyspace("default").shards] == [1, 2, 3, 4]
            view.keyspace("default").check()
            await follower.stop()

    run(story, tmp_path)


def test_a_restart_keeps_the_placement_and_the_follower_goes_on(tmp_path: Path) -> None:
    async def story(directory: Path) -> None:
        async with meta_world(directory, nodes=1) as world, meta_client(world.address) as client:
            follower = Follower(client)
            await register_node(client, node_document("node-1"))
            before = await follower.until(lambda view: "default" in view.keyspaces)
            await world.stop()
            await world.start(nodes=1)
            await register_node(client, node_document("node-1", incarnation=2))
            after = await follower.until(lambda view: view.nodes["node-1"].incarnation == 2)
            assert after.shards == before.shards
            assert after.revision > before.revision
            await follower.stop()

    run(story, tmp_path)


def test_a_watch_with_nothing_new_is_answered_when_its_time_is_up(tmp_path: Path) -> None:
    async def story(directory: Path) -> None:
        async with meta_world(directory) as world, meta_client(world.address) as client:
            revision = (await client.read("")).revision
            payload = await client._peer.call(Op.META_WATCH, MetaWatch(revision, 50), timeout_s=5)
            delta = decode_meta_entries(payload)
            assert (delta.revision, delta.entries) == (revision, [])
            assert world.service.status()["watches"] == 0

    run(story, tmp_path)


def test_a_watch_from_beyond_the_store_is_answered_at_once(tmp_path: Path) -> None:
    async def story(directory: Path) -> None:
        async with meta_world(directory) as world, meta_client(world.address) as client:
            payload = await client._peer.call(Op.META_WATCH, MetaWatch(999, 60_000), timeout_s=5)
            assert decode_meta_entries(payload).revision == world.service.view.revision

    run(story, tmp_path)


def test_a_broken_connection_leaves_no_watch_behind(tmp_path: Path) -> None:
    async def story(directory: Path) -> None:
        async with meta_world(directory) as world:
            async with meta_client(world.address) as client:
                follower = Follower(client)
                await follower.until(lambda view: view.cluster)
                await wait_for(lambda: world.service.status()["watches"] == 1)
                await follower.stop()
            await wait_for(lambda: world.service.status()["watches"] == 0)

    run(story, tmp_path)


def test_a_store_whose_revision_went_back_is_read_from_the_start(tmp_path: Path) -> None:
    async def story(directory: Path) -> None:
        async with meta_world(directory) as world, meta_client(world.address) as client:
            follower = Follower(client)
            for name in ("node-1", "node-2"):
                await register_node(client, node_document(name))
            await follower.until(lambda view: len(view.nodes) == 2)
            await world.stop()
            shutil.rmtree(directory)
            await world.start()
            await register_node(client, node_document("node-9"))
            view = await follower.until(lambda view: "node-9" in view.nodes)
            assert set(view.nodes) == {"node-9"}
            await follower.stop()

    run(story, tmp_path)


def test_a_store_of_another_cluster_is_refused(tmp_path: Path) -> None:
    async def story(directory: Path) -> None:
        async with meta_world(directory) as world, meta_client(world.address, cluster_id="other") as client:
            with pytest.raises(ClusterMismatch, match="belongs to cluster"):
                await client.read("")
            with pytest.raises(ClusterMismatch):
                await client.follow(lambda view: None)
            with pytest.raises(ClusterMismatch):
                await register_node(client, node_document("node-1"))

    run(story, tmp_path)


def test_registering_waits_for_the_store_to_come_up(tmp_path: Path) -> None:
    async def story(directory: Path) -> None:
        async with meta_world(directory) as world:
            await world.stop()
            async with meta_client(world.address) as client:
                registering = asyncio.ensure_future(register_node(client, node_document("node-1")))
                routing = asyncio.ensure_future(register_router(client, RouterDocument("router-1", "127.0.0.1:2", 7)))
                await asyncio.sleep(0.05)
                assert not registering.done()
                await world.start()
                await registering
                await routing
                assert await keys(client) == [
                    "cluster",
                    "nodes/node-1",
                    "routers/router-1",
                ]

    run(story, tmp_path)


def test_another_directory_under_a_known_name_is_refused(tmp_path: Path) -> None:
    async def story(directory: Path) -> None:
        async with meta_world(directory) as world, meta_client(world.address) as client:
            await register_node(client, node_document("node-1"))
            with pytest.raises(StoreMismatch, match="this directory is store emptied-node-1"):
                await register_node(client, node_document("node-1", store="emptied", incarnation=9))

    run(story, tmp_path)


@pytest.mark.parametrize("incarnation", [4, 5])
def test_an_old_copy_of_a_directory_is_refused(tmp_path: Path, incarnation: int) -> None:
    async def story(directory: Path) -> None:
        async with meta_world(directory) as world, meta_client(world.address) as client:
            await register_node(client, node_document("node-1", incarnation=5, pid=1))
            with pytest.raises(StoreMismatch, match="old copy"):
                await register_node(client, node_document("node-1", incarnation=incarnation, pid=2))

    run(story, tmp_path)


def test_an_old_copy_that_counted_its_starts_past_the_store_is_refused(tmp_path: Path) -> None:
    async def story(directory: Path) -> None:
        async with meta_world(directory) as world, meta_client(world.address) as client:
            for start, before in (("one", []), ("two", ["one"])):
                document = msgspec.structs.replace(node_document("node-1", incarnation=len(before) + 1), start_id=start)
                await register_node(client, document, [*before, start])
            copy = msgspec.structs.replace(node_document("node-1", incarnation=7), start_id="seven")
            with pytest.raises(StoreMismatch, match="old copy"):
                await register_node(client, copy, ["one", "two of the copy", "seven"])
            await register_node(client, copy, ["two", "three, not registered", "seven"])

    run(story, tmp_path)


def test_registering_the_same_start_twice_is_settled_without_a_refusal(tmp_path: Path) -> None:
    async def story(directory: Path) -> None:
        async with meta_world(directory) as world, meta_client(world.address) as client:
            await register_node(client, node_document("node-1"))
            revision = (await client.read("")).revision
            await register_node(client, node_document("node-1"))
            assert (await client.read("")).revision == revision

    run(story, tmp_path)


def test_a_document_nobody_could_read_is_refused_and_not_stored(tmp_path: Path) -> None:
    async def story(directory: Path) -> None:
        async with meta_world(directory) as world, meta_client(world.address) as client:
            for bad in (MetaPut("nodes/x", b"\xc1"), MetaPut("shards/first", encode_document(node_document("x")))):
                with pytest.raises(InvalidArgument):
                    await client.txn([], [bad])
            assert await keys(client) == ["cluster"]

    run(story, tmp_path)


def test_a_transaction_that_loses_its_compare_says_so(tmp_path: Path) -> None:
    async def story(directory: Path) -> None:
        async with meta_world(directory) as world, meta_client(world.address) as client:
            reply = await client.txn([MetaCompare("cluster", 0)], [MetaPut("other", b"1")])
            assert not reply.applied
            assert await keys(client) == ["cluster"]

    run(story, tmp_path)


def test_a_poisoned_store_is_reported_to_the_process(tmp_path: Path) -> None:
    async def story(directory: Path) -> None:
        async with meta_world(directory) as world, meta_client(world.address) as client:
            world.store._db.execute("PRAGMA query_only = ON")
            with pytest.raises(StorePoisoned):
                await client.txn([], [MetaPut("a", b"1")])
            assert world.poisoned.is_set()

    run(story, tmp_path)


async def keys(client: MetaClient, prefix: str = "") -> list[str]:
    """The keys there are, but for the leader's."""
    return [entry.key for entry in (await client.read(prefix)).entries if entry.key != LEADER_KEY]


async def wait_for(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not holds():
            await asyncio.sleep(0.005)


def test_a_registration_whose_answer_was_lost_is_settled_by_asking_again(tmp_path: Path) -> None:
    async def story(directory: Path) -> None:
        async with meta_world(directory) as world, meta_client(world.address) as client:
            answered = world.service.apply
            lost: list[int] = []

            async def apply_and_hang_up(txn: MetaTxn) -> MetaTxnReply:
                reply = await answered(txn)
                if not lost:
                    lost.append(reply.revision)
                    for connection in world.server.connections:
                        connection._transport.abort()  # type: ignore[union-attr]
                return reply

            world.service.apply = apply_and_hang_up  # type: ignore[method-assign]
            await register_node(client, node_document("node-1"))
            assert (await client.read("")).revision == lost[0]

    run(story, tmp_path)


def test_a_full_disk_behind_an_applied_transaction_does_not_deny_it(tmp_path: Path) -> None:
    async def story(directory: Path) -> None:
        async with meta_world(directory, nodes=1) as world, meta_client(world.address) as client:
            follower = Follower(client)
            await follower.until(lambda view: view.cluster)
            real, full = world.store.txn, [True]

            async def txn(compares: Any, puts: Any) -> MetaTxnReply:
                if full[0] and any(put.key.startswith("shards/") for put in puts):
                    raise DiskFull("The disk is full.")
                return await real(compares, puts)

            world.store.txn = txn  # type: ignore[method-assign]
            reply = await client.txn([], [MetaPut("nodes/node-1", encode_document(node_document("node-1")))])
            assert reply.applied
            await follower.until(lambda view: "node-1" in view.nodes)
            full[0] = False
            await follower.until(lambda view: "default" in view.keyspaces)
            await follower.stop()

    run(story, tmp_path)


def test_signing_off_leaves_a_later_start_of_the_router_listed(tmp_path: Path) -> None:
    async def story(directory: Path) -> None:
        async with meta_world(directory) as world, meta_client(world.address) as client:
            first = await register_router(client, RouterDocument("router-1", "127.0.0.1:1", 1))
            second = await register_router(client, RouterDocument("router-1", "127.0.0.1:2", 2))
            await sign_off_router(client, "router-1", first, timeout_s=1)
            assert await keys(client, "routers/") == ["routers/router-1"]
            await sign_off_router(client, "router-1", second, timeout_s=1)
            assert (await client.read("routers/")).entries == []

    run(story, tmp_path)


def test_a_plan_that_cannot_be_carried_out_holds_up_nobody(tmp_path: Path) -> None:
    async def story(directory: Path) -> None:
        async with meta_world(directory, nodes=1) as world, meta_client(world.address) as client:
            left = encode_document(KeyspaceDocument("default", "hash"))
            await client.txn([], [MetaPut("keyspaces/default", left)])
            await register_node(client, node_document("node-1"))
            assert await keys(client, "nodes/") == ["nodes/node-1"]
            assert world.service.topology.keyspaces == {}

    run(story, tmp_path)


def test_a_transaction_nobody_answered_is_unknown_and_one_that_was_not_sent_is_not(tmp_path: Path) -> None:
    async def story(directory: Path) -> None:
        async with meta_world(directory) as world, meta_client(world.address) as client:
            world.service.on_request = lambda *_: None  # type: ignore[method-assign]
            with pytest.raises(OutcomeUnknown, match="may or may not have been applied"):
                await client.txn([], [MetaPut("a", b"1")], timeout_s=0.1)
            await world.stop()
            await wait_for(lambda: not client.connected)
            with pytest.raises(UnavailableError):
                await client.txn([], [MetaPut("a", b"1")], timeout_s=0.1)
            await world.start()

    run(story, tmp_path)


def test_a_follower_that_learns_its_cluster_later_shows_no_other(tmp_path: Path) -> None:
    async def story(directory: Path) -> None:
        async with meta_world(directory) as world:
            mine: list[str | None] = [None]
            client = MetaClient([world.address], me=lambda: Identity("node", "node-1", mine[0]))
            client.start()
            await client.read("")
            mine[0] = "other"
            views: list[object] = []
            with pytest.raises(ClusterMismatch):
                await client.follow(views.append)
            assert views == []
            await client.close()

    run(story, tmp_path)


def test_of_two_starts_at_once_the_second_to_arrive_sees_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(directory: Path) -> None:
        async with meta_world(directory) as world, meta_client(world.address) as client:
            real, stale = register._known, [True]

            async def known(client: MetaClient, key: str) -> tuple[object, int]:
                found = await real(client, key)
                if stale.pop() if stale else False:
                    await register_node(client, node_document("node-1", incarnation=7))
                return found

            monkeypatch.setattr(register, "_known", known)
            with pytest.raises(StoreMismatch, match="old copy"):
                await register_node(client, node_document("node-1", incarnation=6))

    run(story, tmp_path)


def test_of_several_addresses_one_that_falls_silent_is_left(tmp_path: Path) -> None:
    async def story(directory: Path) -> None:
        async with (
            meta_world(directory) as world,
            fault_proxy("127.0.0.1", world.port) as silent,
            fault_proxy("127.0.0.1", world.port) as other,
            meta_client(world.address) as writer,
        ):
            other.refuse()
            client = MetaClient([silent.address, other.address], me=lambda: Identity("node", "node-1"))
            client.start()
            follower = Follower(client)
            await follower.until(lambda view: view.cluster is not None)
            other.heal()
            silent.mute()
            await register_node(writer, node_document("node-2"))
            async with asyncio.timeout(8):
                await follower.until(lambda view: "node-2" in view.nodes)
            await follower.stop()
            await client.close()

    run(story, tmp_path)


def test_metadata_processes_are_listed_while_they_are_wanted(tmp_path: Path) -> None:
    async def story(directory: Path) -> None:
        async with meta_world(directory) as world:
            first, second, again = (Listing(world.store, name) for name in ("meta-1", "meta-2", "meta-1"))
            await second.begin("10.0.0.2:7401")
            await first.begin("10.0.0.1:7401")
            await world.service.view.reached((await world.store.read("")).revision)
            assert listed(world.service.view) == ["10.0.0.1:7401", "10.0.0.2:7401"]
            await again.begin("10.0.0.9:7401")
            await first.end()
            await second.end()
            await world.service.view.reached((await world.store.read("")).revision)
            assert listed(world.service.view) == ["10.0.0.9:7401"]

    run(story, tmp_path)
