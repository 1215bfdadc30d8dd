"""The etcd back end where it differs: members that fall, answers that get lost, history that is compacted, and several
metadata processes on one etcd."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from shardkv.errors import ClusterMismatch, InvalidArgument, MetadataUnavailable, OutcomeUnknown
from shardkv.metadata.client import MetaClient
from shardkv.metadata.etcd import EtcdStore
from shardkv.metadata.store import MetaStore
from shardkv.metadata.stores import StoreChoice, parse_store
from shardkv.topology.documents import RouterDocument, encode_document
from shardkv.topology.view import Topology
from shardkv.wire.hello import Identity
from shardkv.wire.messages import MetaCompare, MetaPut
from tests.shardkv.metadata.test_service import wait_for
from tests.shardkv.metadata.test_stores import Followed, content, put
from tests.shardkv.metadata.world import Follower, MetaWorld
from tests.worlds.etcd import EtcdWorld, etcd_world
from tests.worlds.proxy import fault_proxy


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdWorld]:
    with etcd_world(tmp_path_factory.mktemp("one")) as world:
        yield world


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdWorld]:
    with etcd_world(tmp_path_factory.mktemp("three"), members=3) as world:
        yield world


def run(story: Coroutine[Any, Any, None], timeout_s: float = 60) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(timeout_s):
            await story

    asyncio.run(bounded())


@asynccontextmanager
async def open_at(endpoints: str, name: str) -> AsyncIterator[EtcdStore]:
    choice = parse_store(f"etcd://{endpoints}/{name}")
    store = EtcdStore(choice.endpoints, choice.name)
    try:
        yield store
    finally:
        await store.aclose()


async def stopped(task: asyncio.Future[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


# How a store is named


def test_a_store_is_named_as_people_write_it() -> None:
    assert parse_store("embedded") == StoreChoice()
    assert parse_store("etcd://a:1,b:2/shop") == StoreChoice((("a", 1), ("b", 2)), "shop")
    assert parse_store("etcd://[::1]:2379") == StoreChoice((("::1", 2379),), "default")


@pytest.mark.parametrize("text", ["sqlite", "etcd://", "etcd://host", "etcd://a:1/b/c", "http://a:1"])
def test_what_is_no_store_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_store(text)


# One etcd


def test_two_clusters_share_one_etcd_and_see_nothing_of_each_other(one: EtcdWorld) -> None:
    async def story() -> None:
        async with open_at(one.endpoints, "shop") as shop, open_at(one.endpoints, "shop2") as other:
            followed = Followed(shop)
            await put(shop, "a", b"shop")
            await put(other, "a", b"other")
            last = await put(shop, "last", b"1")
            await followed.until(lambda view: view.revision >= last.revision)
            assert await content(shop) == {"a": b"shop", "last": b"1"}
            assert {entry.key for changes in followed.told for entry in changes.entries} == {"a", "last"}
            await followed.stop()

    run(story())


def test_a_follower_of_compacted_history_is_told_everything_anew(one: EtcdWorld) -> None:
    async def story() -> None:
        async with open_at(one.endpoints, "compacted") as store:
            await put(store, "gone", b"1")
            followed = Followed(store)
            await followed.until(lambda view: view.get("gone"))
            seen = followed.view.revision
            await followed.stop()
            await put(store, "gone", None)
            await put(store, "kept", b"1")
            await asyncio.to_thread(one.compact)
            again = asyncio.ensure_future(store.follow(seen, followed._take))
            while followed.view.get("kept") is None:
                await followed.view.moved()
            assert followed.told[-1].whole
            assert {entry.key for entry in followed.view.entries()} == {"kept"}
            assert [e.key for e in followed.view.since(seen).entries if e.value is None] == ["gone"]
            await stopped(again)

    run(story())


def test_an_answer_that_got_lost_leaves_the_outcome_unknown_until_a_transaction_settles_it(one: EtcdWorld) -> None:
    async def story() -> None:
        async with (
            fault_proxy("127.0.0.1", one.clients[0]) as proxy,
            open_at(proxy.address, "lost") as store,
        ):
            known = (await put(store, "a", b"1")).revision
            proxy.lose_answers(0.0)
            losing = asyncio.ensure_future(put(store, "a", b"2", known=known))
            async with open_at(one.endpoints, "lost") as direct:
                while await content(direct) != {"a": b"2"}:
                    await asyncio.sleep(0.01)
            proxy.cut()
            with pytest.raises(OutcomeUnknown):
                await losing
            proxy.heal()
            assert not (await put(store, "a", b"3", known=known)).applied
            assert await content(store) == {"a": b"2"}

    run(story())


def test_what_was_never_sent_was_not_applied(tmp_path: Path) -> None:
    async def story() -> None:
        async with open_at("127.0.0.1:9,127.0.0.1:10", "x") as store:
            for attempt in (put(store, "a", b"1"), store.read(""), store.grant(5)):
                with pytest.raises(MetadataUnavailable, match="cannot be reached"):
                    await attempt

    run(story())


def test_another_etcd_behind_the_same_address_is_noticed(one: EtcdWorld, three: EtcdWorld) -> None:
    async def story() -> None:
        async with (
            fault_proxy("127.0.0.1", one.clients[0]) as proxy,
            open_at(proxy.address, "x") as store,
        ):
            followed = asyncio.ensure_future(store.follow(0, lambda changes: None))
            await put(store, "a", b"1")
            proxy.target = ("127.0.0.1", three.clients[0])
            proxy.cut()
            with pytest.raises(ClusterMismatch):
                while True:
                    await _not_cut(store)
            await stopped(followed)

    run(story())


async def _not_cut(store: EtcdStore) -> None:
    try:
        await store.get("a")
    except MetadataUnavailable:
        await asyncio.sleep(0.01)


# Three members


async def keep_following(store: MetaStore, followed: Followed) -> None:
    while True:
        try:
            await store.follow(max(followed.view.revision, 0), followed._take)
        except MetadataUnavailable:
            await asyncio.sleep(0.02)


async def put_until_applied(store: MetaStore, key: str, value: bytes) -> int:
    """Whatever it takes; an unknown outcome is settled by the next attempt."""
    while True:
        try:
            return (await put(store, key, value)).revision
        except (MetadataUnavailable, OutcomeUnknown):
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_one_member_of_three_may_go_whichever_it_is(three: EtcdWorld, how: str) -> None:
    async def story() -> None:
        async with open_at(three.endpoints, how) as store:
            followed = Followed(store)
            await followed.until(lambda view: view.revision >= 0)
            await followed.stop()
            keeping = asyncio.ensure_future(keep_following(store, followed))
            for member in range(3):
                if how == "killed":
                    three.kill(member)
                else:
                    three.signal(member, signal.SIGSTOP)
                try:
                    for number in range(3):
                        revision = await put_until_applied(store, f"k{member}-{number}", b"1")
                    assert await followed.view.reached(revision, timeout_s=15)
                finally:
                    if how == "killed":
                        await asyncio.to_thread(three.start, member)
                    else:
                        three.signal(member, signal.SIGCONT)
            assert {e.key for e in followed.view.entries()} == set(await content(store))
            assert len(await content(store)) == 9
            await stopped(keeping)

    run(story(), 100)


def test_a_follower_leaves_a_member_that_lost_the_majority(tmp_path: Path) -> None:
    async def story(world: EtcdWorld) -> None:
        async with open_at(world.endpoints, "x") as store:
            followed = asyncio.ensure_future(store.follow(0, lambda changes: None))
            await put(store, "a", b"1")
            world.kill(1, 2)
            with pytest.raises(MetadataUnavailable):
                await followed
            with pytest.raises((MetadataUnavailable, OutcomeUnknown)):
                await put(store, "a", b"2")

    with etcd_world(tmp_path / "etcd", members=3) as world:
        run(story(world))


# Several metadata processes


class EtcdMetaWorld(MetaWorld):
    def __init__(self, endpoints: str, name: str) -> None:
        super().__init__(Path())
        self._choice = parse_store(f"etcd://{endpoints}/{name}")

    def open_store(self) -> MetaStore:
        return EtcdStore(self._choice.endpoints, self._choice.name)


@asynccontextmanager
async def metas(endpoints: str, name: str, count: int) -> AsyncIterator[list[MetaWorld]]:
    """So many metadata services on one etcd; those that were stopped meanwhile stay so."""
    worlds: list[MetaWorld] = [EtcdMetaWorld(endpoints, name) for _ in range(count)]
    try:
        for world in worlds:
            await world.start()
        yield worlds
    finally:
        for world in worlds:
            if world.running:
                await world.stop()


def client_of(*worlds: MetaWorld) -> MetaClient:
    client = MetaClient([world.address for world in worlds], me=lambda: Identity("node", "node-1"))
    client.start()
    return client


def router(number: int) -> MetaPut:
    document = RouterDocument("router-1", f"127.0.0.1:{number}", number)
    return MetaPut("routers/router-1", encode_document(document))


def pid(view: Topology) -> int:
    return view.routers["router-1"].pid if view.routers else 0


def test_a_follower_goes_on_at_another_process_and_never_back(one: EtcdWorld) -> None:
    async def story() -> None:
        async with metas(one.endpoints, "failover", 2) as worlds:
            writer, reader = client_of(worlds[0]), client_of(*worlds)
            follower = Follower(reader)
            for number in range(1, 7):
                await writer.txn([], [router(number)])
                await follower.until(lambda view, number=number: pid(view) == number)  # type: ignore[misc]
                if number == 3:
                    await worlds[1].stop()
                if number == 4:
                    await worlds[1].start()
                    await reader._leave(reader._peer)
            revisions = [view.revision for view in follower.views]
            assert revisions == sorted(revisions)
            assert [pid(view) for view in follower.views] == sorted(pid(view) for view in follower.views)
            await follower.stop()
            await reader.close()
            await writer.close()

    run(story())


def test_a_process_whose_view_lags_catches_up_before_it_tells_who_knows_more(
    one: EtcdWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        async with metas(one.endpoints, "lagging", 2) as (ahead, behind), fault_proxy("127.0.0.1", behind.port) as link:
            link.refuse()
            view = behind.service.view
            real = view.take
            client = MetaClient([ahead.address, link.address], me=lambda: Identity("node", "node-1"))
            client.start()
            follower = Follower(client)
            monkeypatch.setattr(view, "take", lambda changes: real(changes) if changes.whole else None)
            await client.txn([], [router(1)])
            await follower.until(lambda view: pid(view) == 1)
            assert not view.topology.routers
            link.heal()
            await ahead.stop()
            await wait_for(lambda: view.topology.routers)
            monkeypatch.setattr(view, "take", real)
            later = client_of(behind)
            await later.txn([], [router(2)])
            await follower.until(lambda view: pid(view) == 2)
            told = [pid(view) for view in follower.views]
            assert told == sorted(told)
            for each in (follower.stop(), client.close(), later.close()):
                await each

    run(story())


def test_a_client_leaves_a_process_that_lost_the_store(one: EtcdWorld) -> None:
    async def story() -> None:
        async with (
            fault_proxy("127.0.0.1", one.clients[0]) as proxy,
            metas(proxy.address, "cut-off", 1) as (cut_off,),
            metas(one.endpoints, "cut-off", 1) as (well,),
        ):
            client = client_of(cut_off)
            follower = Follower(client)
            await follower.until(lambda view: view.cluster)
            client._addresses = [cut_off.address, well.address]
            proxy.refuse()
            proxy.cut()
            writer = client_of(well)
            await writer.txn([], [router(1)])
            await follower.until(lambda view: pid(view) == 1)
            proxy.heal()
            await follower.stop()
            await client.close()
            await writer.close()

    run(story())


def test_without_etcd_nothing_is_told_to_be_gone_and_all_goes_on_when_it_is_back(tmp_path: Path) -> None:
    async def story(world: EtcdWorld) -> None:
        async with metas(world.endpoints, "x", 1) as (meta,):
            client = client_of(meta)
            follower = Follower(client)
            await client.txn([], [router(1)])
            await follower.until(lambda view: pid(view) == 1)
            seen = len(follower.views)
            world.kill()
            with pytest.raises((MetadataUnavailable, OutcomeUnknown)):
                await client.txn([], [router(2)])
            while meta.service.status()["store_reached"]:
                await asyncio.sleep(0.01)
            await asyncio.to_thread(world.start)
            revision = await put_through(client, router(3))
            view = await follower.until(lambda view: pid(view) == 3)
            assert view.revision >= revision
            assert all(pid(view) for view in follower.views[seen:])
            await follower.stop()
            await client.close()

    with etcd_world(tmp_path / "etcd") as world:
        run(story(world))


async def put_through(client: MetaClient, put: MetaPut) -> int:
    while True:
        try:
            return (await client.txn([MetaCompare("nobody", 0)], [put])).revision
        except (MetadataUnavailable, OutcomeUnknown):
            await asyncio.sleep(0.05)
