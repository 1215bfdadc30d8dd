"""Counting and deleting ranges over shards whose nodes stop, refuse, or talk nonsense."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from shardkv.errors import OutcomeUnknown, RemoteProtocolError, ShardUnavailable, WrongShard
from shardkv.topology.documents import Partition
from shardkv.transport.server import Connection
from shardkv.wire.messages import (
    Count,
    CountReply,
    DeleteRange,
    DeleteRangeReply,
    Op,
    Request,
    decode_count,
    decode_delete_range,
)
from tests.router.world import Node, RouterWorld, hold, refuse, router_world, run, until

STEP = 2
"""Keys that the nodes here look at in one step."""
PARTITIONS: list[Partition] = ["hash", "range"]


class Shards:
    """What several nodes hold, by shard; `answer` is what they say."""

    def __init__(self, **keys: str) -> None:
        self.keys = {int(name[1:]): [letter.encode() for letter in text] for name, text in keys.items()}
        self.asked: list[Any] = []

    def answer(self, node: Node, connection: Connection, request: Request) -> None:
        counting = request.op == Op.COUNT
        asked = decode_count(request.payload) if counting else decode_delete_range(request.payload)
        self.asked.append(asked)
        assert counting or asked.limit is None or asked.limit > 0
        keys = self.keys[request.shard or 0]
        found = [key for key in keys if key >= asked.start and (asked.stop is None or key < asked.stop)]
        most = STEP if counting or asked.limit is None else min(STEP, asked.limit)
        frontier = found[most - 1] + b"\0" if len(found) > most else None
        if counting:
            connection.reply(request.id, CountReply(len(found[:most]), frontier))
        else:
            self.keys[request.shard or 0] = [key for key in keys if key not in found[:most]]
            connection.reply(request.id, DeleteRangeReply(len(found[:most]), frontier))


def two_nodes(shards: Shards) -> tuple[Node, Node]:
    nodes = Node("node-1"), Node("node-2")
    for node in nodes:
        node.answers = shards.answer
    return nodes


async def count(world: RouterWorld, start: bytes = b"", stop: bytes | None = None, timeout_s: float = 5) -> int:
    deadline = world.loop.time() + timeout_s
    reply = await world.ranges.count(world.view, Count(start, stop), deadline, lambda: False)
    assert reply.frontier is None
    return reply.count


async def delete(
    world: RouterWorld,
    start: bytes = b"",
    stop: bytes | None = None,
    *,
    limit: int | None = None,
    timeout_s: float = 5,
) -> DeleteRangeReply:
    return await world.ranges.delete(world.view, DeleteRange(start, stop, limit), world.loop.time() + timeout_s)


async def delete_all(world: RouterWorld, limit: int | None = None) -> list[int]:
    """What each step deleted; each begins where the one before said."""
    told: list[int] = []
    start: bytes | None = b""
    while start is not None and sum(told) != limit:
        reply = await delete(world, start, limit=None if limit is None else limit - sum(told))
        told.append(reply.deleted)
        assert reply.frontier is None or reply.frontier > start or sum(told) == limit
        start = reply.frontier
    return told


@pytest.mark.parametrize("partition", PARTITIONS)
def test_every_shard_is_counted_to_its_end(partition: Partition) -> None:
    async def story() -> None:
        shards = Shards(s1="ABC", s2="b", s3="", s4="d", s5="efghijkl")
        async with router_world(*two_nodes(shards), partition=partition, shards=5) as world:
            assert await count(world) == 13
            assert await count(world, b"d", b"g") == 3
            asked = len(shards.asked)
            assert await count(world, b"g", b"g") == 0
            assert len(shards.asked) - asked == (5 if partition == "hash" else 1)

    run(story)


@pytest.mark.parametrize("partition", PARTITIONS)
def test_steps_delete_everything_once(partition: Partition) -> None:
    async def story() -> None:
        shards = Shards(s1="AB", s2="Cbdh" if partition == "hash" else "b", s3="", s4="d", s5="efghij")
        total = sum(map(len, shards.keys.values()))
        async with router_world(*two_nodes(shards), partition=partition, shards=5) as world:
            told = await delete_all(world)
            assert sum(told) == total
            assert len(told) == 3
            assert not any(shards.keys.values())

    run(story)


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("limit", [1, 3, 7, 8, 100])
def test_never_more_than_the_limit_is_deleted(partition: Partition, limit: int) -> None:
    async def story() -> None:
        shards = Shards(s1="AB", s2="b", s3="c", s4="d", s5="efg")
        async with router_world(*two_nodes(shards), partition=partition, shards=5) as world:
            assert sum(await delete_all(world, limit)) == min(limit, 8)
            left = sorted(key for keys in shards.keys.values() for key in keys)
            assert left == [letter.encode() for letter in "ABbcdefg"][limit:]

    run(story)


def test_a_step_that_covers_nothing_ends_the_request() -> None:
    async def story() -> None:
        node = Node("node-1")
        async with router_world(node, partition="range", shards=1) as world:
            node.answers = lambda n, c, r: c.reply(r.id, CountReply(1, b"a"))
            with pytest.raises(RemoteProtocolError, match="A step over shard 1 covered nothing"):
                await count(world, b"a")
            node.answers = lambda n, c, r: c.reply(r.id, DeleteRangeReply(1, b"a"))
            with pytest.raises(RemoteProtocolError, match="covered nothing"):
                await delete(world, b"a")
            node.answers = lambda n, c, r: c.reply(r.id, "nonsense")
            with pytest.raises(RemoteProtocolError, match="answered with something else"):
                await count(world)

    run(story)


def test_a_node_that_restarts_is_waited_for() -> None:
    async def story() -> None:
        shards = Shards(s1="abcd", s2="efgh")
        one, two = two_nodes(shards)
        two.answers = hold
        async with router_world(one, two, partition="hash") as world:
            counting, deleting = asyncio.ensure_future(count(world)), asyncio.ensure_future(delete(world, b"", b"a"))
            await until(lambda: len(two.asked) == 2)
            await two.stop()
            two.answers = shards.answer
            await two.start()
            assert await counting == 8
            assert await deleting == DeleteRangeReply(0, None)

    run(story)


def test_a_delete_with_a_limit_is_not_repeated_and_tells_what_was_deleted() -> None:
    async def story() -> None:
        shards = Shards(s1="ab", s2="efgh")
        one, two = two_nodes(shards)
        two.answers = hold
        async with router_world(one, two, partition="hash") as world:
            deleting = asyncio.ensure_future(delete(world, limit=5))
            await until(lambda: two.asked)
            assert two.connection is not None
            two.connection.close()
            with pytest.raises(OutcomeUnknown) as caught:
                await deleting
            assert caught.value.detail == {"shard": 2, "deleted": 2}
            assert len(two.asked) == 1

    run(story)


@pytest.mark.parametrize("partition", PARTITIONS)
def test_what_was_deleted_before_an_error_is_told(partition: Partition) -> None:
    async def story() -> None:
        shards = Shards(s1="AB", s2="efgh")
        one, two = two_nodes(shards)
        async with router_world(one, two, partition=partition, park_ms=200) as world:
            two.answers = hold
            with pytest.raises(OutcomeUnknown, match="node-2 did not answer in time for shard 2") as caught:
                await delete(world, timeout_s=0.3)
            assert caught.value.detail["deleted"] == 2
            shards.keys[1] = [b"C"]
            await two.stop()
            await until(lambda: not world.links.usable("node-2"))
            with pytest.raises(ShardUnavailable) as away:
                await delete(world)
            assert away.value.detail == {"shard": 2, "node": "node-2", "deleted": 1}

    run(story)


def test_a_shard_that_is_refused_is_asked_again_until_it_is_taken() -> None:
    async def story() -> None:
        shards = Shards(s1="ab", s2="e")
        one, two = two_nodes(shards)
        two.answers = refuse(WrongShard("Not mine yet."))
        async with router_world(one, two, partition="hash") as world:
            counting = asyncio.ensure_future(count(world))
            await until(lambda: len(two.asked) >= 2)
            two.answers = shards.answer
            assert await counting == 3

    run(story)


def test_nobody_counts_on_for_someone_who_has_gone() -> None:
    async def story() -> None:
        shards = Shards(s1="abcdefgh")
        (one, _) = two_nodes(shards)
        async with router_world(one, partition="hash", shards=1) as world:
            gone = iter([False, False, True])
            with pytest.raises(ShardUnavailable):
                await world.ranges.count(world.view, Count(b"", None), world.loop.time() + 5, lambda: next(gone))
            assert len(shards.asked) == 2

    run(story)
