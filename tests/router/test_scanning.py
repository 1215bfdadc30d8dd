"""Pages of a scan while nodes are away, refuse, or stop: what is told, in how long, and at what cost for the others."""

from __future__ import annotations

import asyncio
import time

import pytest

from shardkv.errors import DeadlineExceeded, RemoteProtocolError, ShardUnavailable, WrongShard
from shardkv.transport.server import Connection
from shardkv.wire.messages import Page, Request, decode_scan
from tests.router.world import Node, hold, refuse, reply_ok, router_world, run, until


@pytest.mark.parametrize("partition", ["hash", "range"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_page_has_the_rows_of_all_shards_in_order(partition: str, reverse: bool) -> None:
    async def story() -> None:
        one, two = Node("node-1"), Node("node-2")
        async with router_world(one, two, partition=partition, shards=5) as world:  # type: ignore[arg-type]
            page = await world.page(reverse=reverse)
            assert page.keys == sorted([b"a", b"b", b"c", b"d", b"e"], reverse=reverse)
            assert page.frontier is None
            asked = 1 if partition == "hash" else 3
            assert len(one.asked) == asked, "a hash scan asks each node once"

    run(story)


def test_healthy_nodes_make_no_pages_while_one_is_away() -> None:
    async def story() -> None:
        one, two = Node("node-1"), Node("node-2")
        async with router_world(one, two, partition="hash") as world:
            await two.stop()
            await until(lambda: not world.links.usable("node-2"))
            asking = asyncio.ensure_future(world.page())
            await asyncio.sleep(0.2)
            assert not one.asked
            await two.start()
            assert (await asking).keys == [b"a", b"b"]
            assert len(one.asked) == 1

    run(story)


def test_a_node_that_refuses_is_asked_less_and_less_often() -> None:
    async def story() -> None:
        one, two = Node("node-1"), Node("node-2")
        two.answers = refuse(WrongShard("Not mine."))
        async with router_world(one, two, partition="hash", park_ms=600) as world:
            with pytest.raises(WrongShard):
                await world.page()
            assert 3 <= len(one.asked) <= 10

    run(story)


@pytest.mark.parametrize(
    ("reverse", "away", "keys", "frontier"), [(False, "node-2", b"a", b"b"), (True, "node-1", b"b", b"b")]
)
def test_a_range_scan_ends_its_page_before_a_shard_that_is_away(
    reverse: bool, away: str, keys: bytes, frontier: bytes
) -> None:
    async def story() -> None:
        nodes = {"node-1": Node("node-1"), "node-2": Node("node-2")}
        async with router_world(*nodes.values(), park_ms=100) as world:
            await nodes[away].stop()
            await until(lambda: not world.links.usable(away))
            page = await world.page(reverse=reverse)
            assert (page.keys, page.values, page.frontier) == ([keys], [keys], frontier)
            with pytest.raises(ShardUnavailable, match="is not served now"):
                await world.page(
                    reverse=reverse, start=b"" if reverse else frontier, stop=frontier if reverse else None
                )

    run(story)


@pytest.mark.parametrize("partition", ["hash", "range"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_partial_page_does_without_shards_that_are_away_and_names_them(partition: str, reverse: bool) -> None:
    async def story() -> None:
        one, two = Node("node-1"), Node("node-2")
        async with router_world(one, two, partition=partition, shards=5) as world:  # type: ignore[arg-type]
            await two.stop()
            await until(lambda: not world.links.usable("node-2"))
            start = time.monotonic()
            page = await world.page(reverse=reverse, partial=True)
            assert time.monotonic() - start < 2, "it does not wait for what is away"
            assert page.keys == sorted([b"a", b"c", b"e"], reverse=reverse)
            assert page.frontier is None
            assert sorted(problem.shard for problem in page.problems) == [2, 4]
            for problem in page.problems:
                shard = world.topology.shards[problem.shard]
                assert (problem.detail["start"], problem.detail["stop"]) == (shard.start, shard.stop)
                assert problem.code == ShardUnavailable.code

    run(story)


def test_a_partial_page_waits_for_a_shard_that_is_moving() -> None:
    async def story() -> None:
        one, two = Node("node-1"), Node("node-2")
        two.answers = refuse(WrongShard("Not mine."))
        async with router_world(one, two, partition="hash") as world:
            asking = asyncio.ensure_future(world.page(partial=True))
            await until(lambda: two.asked)
            two.answers = reply_ok
            page = await asking
            assert (page.keys, page.problems) == ([b"a", b"b"], [])

    run(story)


@pytest.mark.parametrize("partition", ["hash", "range"])
def test_when_no_shard_can_be_read_a_partial_page_lacks_everything(partition: str) -> None:
    async def story() -> None:
        node = Node("node-1")
        node.answers = hold
        async with router_world(node, partition=partition) as world:  # type: ignore[arg-type]
            page = await world.page(timeout_s=0.4, partial=True)
            assert (page.keys, page.frontier) == ([], None)
            assert [problem.shard for problem in page.problems] == [1, 2]

    run(story)


@pytest.mark.parametrize("partition", ["hash", "range"])
def test_a_stopped_node_is_named_before_the_deadline(partition: str) -> None:
    async def story() -> None:
        node = Node("node-1")
        node.answers = hold
        async with router_world(node, partition=partition) as world:  # type: ignore[arg-type]
            start = time.monotonic()
            with pytest.raises(DeadlineExceeded, match="Node node-1"):
                await world.page(timeout_s=0.4)
            assert time.monotonic() - start < 0.39
            peer = world.links.usable("node-1")
            assert peer is not None
            assert peer._wire is not None
            assert not peer._wire.pending

    run(story)


def test_a_slow_node_is_waited_for_until_the_callers_deadline() -> None:
    async def story() -> None:
        node = Node("node-1")
        node.answers = hold
        async with router_world(node, park_ms=50) as world:
            asking = asyncio.ensure_future(world.page(timeout_s=5))
            await until(lambda: node.asked)
            await asyncio.sleep(0.2)
            assert node.connection is not None
            reply_ok(node, node.connection, node.asked[0])
            await until(lambda: len(node.asked) == 2)
            reply_ok(node, node.connection, node.asked[1])
            assert (await asking).keys == [b"a", b"b"]

    run(story)


def test_when_one_node_fails_nobody_waits_for_the_others() -> None:
    async def story() -> None:
        one, two = Node("node-1"), Node("node-2")
        one.answers, two.answers = hold, speaks_for_another
        async with router_world(one, two, partition="hash") as world:
            with pytest.raises(RemoteProtocolError, match="spoke for"):
                await world.page()
            peer = world.links.usable("node-1")
            assert peer is not None
            assert peer._wire is not None
            await until(lambda: not peer._wire.pending)

    run(story)


def speaks_for_another(node: Node, connection: Connection, request: Request) -> None:
    connection.reply(request.id, Page([], [], None, [77]))


def test_a_scan_cut_before_it_left_or_answered_is_asked_again() -> None:
    async def story() -> None:
        node = Node("node-1")
        async with router_world(node, partition="hash") as world:
            for _ in range(3):
                asking = asyncio.ensure_future(world.page())
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                peer = world.links.usable("node-1")
                assert peer is not None
                assert peer._wire is not None
                peer._wire.abort()
                assert (await asking).keys == [b"a", b"b"]

    run(story)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_range_scan_stops_where_a_shards_page_stopped(reverse: bool) -> None:
    async def story() -> None:
        node = Node("node-1")
        near = b"b\x80" if reverse else b"a\x01"

        def part_of_it(node: Node, connection: Connection, request: Request) -> None:
            ((shard, _),) = decode_scan(request.payload).shards or []
            connection.reply(request.id, Page([near], [b"v"], near, [shard]))

        node.answers = part_of_it
        async with router_world(node) as world:
            page = await world.page(reverse=reverse)
            assert (page.keys, page.frontier) == ([near], near)
            assert len(node.asked) == 1

    run(story)


@pytest.mark.parametrize(("reverse", "keys", "frontier"), [(False, b"a", b"b"), (True, b"c", b"c")])
def test_a_range_scan_with_rows_enough_ends_at_the_shards_end(reverse: bool, keys: bytes, frontier: bytes) -> None:
    async def story() -> None:
        node = Node("node-1")
        async with router_world(node, shards=3) as world:
            page = await world.page(reverse=reverse, limit=1)
            assert (page.keys, page.frontier) == ([keys], frontier)
            assert len(node.asked) == 1

    run(story)
