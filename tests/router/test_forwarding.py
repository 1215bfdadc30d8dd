"""Parts of requests on their way to nodes that restart, move, refuse, stop and drain: each ends once, truthfully."""

from __future__ import annotations

import asyncio
import sys
import time

import pytest

from shardkv.errors import (
    ConditionFailed,
    DeadlineExceeded,
    DiskFull,
    Draining,
    InvalidKey,
    OutcomeUnknown,
    Overloaded,
    ShardKVError,
    ShardUnavailable,
    StaleEpoch,
    WrongShard,
)
from shardkv.transport.server import Connection
from shardkv.wire.messages import (
    Op,
    Read,
    Request,
    Token,
    Write,
    decode_any,
    decode_requests,
    decode_write,
    encode_batch,
    raw,
)
from tests.router.world import Node, hold, refuse, reply_ok, router_world, run, until
from tests.worlds.proxy import fault_proxy


def test_a_part_goes_to_the_owner_with_shard_and_epoch() -> None:
    async def story() -> None:
        one, two = Node("node-1"), Node("node-2")
        async with router_world(one, two) as world:
            world.follow(epoch=7)
            assert decode_any(await world.send(Op.READ, shard=2).answer()) == "node-2"  # type: ignore[arg-type]
            assert [(r.shard, r.epoch) for r in two.asked] == [(2, 7)]
            assert not one.asked

    run(story)


def test_a_write_that_never_left_is_sent_when_the_node_is_back() -> None:
    async def story() -> None:
        node = Node("node-1")
        async with router_world(node) as world:
            sent = world.send(Op.WRITE)
            peer = world.links.usable("node-1")
            assert peer is not None
            assert peer._wire is not None
            peer._wire.abort()
            assert not isinstance(await sent.answer(), Exception)
            assert len(node.asked) == 1

    run(story)


WITH_TOKEN = raw(Write(Token(b"lane".ljust(16), 3), None, 1, [b"k"], [b"v"], False))


def test_a_write_with_a_token_that_was_sent_is_sent_again_and_says_so() -> None:
    async def story() -> None:
        node = Node("node-1")
        node.answers = hold
        async with router_world(node) as world:
            sent = world.send(Op.WRITE, payload=WITH_TOKEN)
            await until(lambda: node.asked)
            assert node.connection is not None
            node.connection.close()
            node.answers = refuse(Draining("Going."))
            await until(lambda: len(node.asked) > 1)
            node.answers = reply_ok
            world.follow(epoch=2)
            assert not isinstance(await sent.answer(), Exception)
            tokens = [decode_write(request.payload).token for request in node.asked]
            assert [token.number for token in tokens] == [3] * len(tokens)
            assert [token.again for token in tokens] == [False] + [True] * (len(tokens) - 1)

    run(story)


@pytest.mark.parametrize(
    ("refusal", "told"),
    [(DiskFull("Full."), OutcomeUnknown), (Overloaded("Busy."), OutcomeUnknown), (ConditionFailed("No."), None)],
)
def test_a_write_that_may_have_been_made_is_in_doubt_until_it_is_answered_or_refused_for_good(
    refusal: ShardKVError, told: type | None
) -> None:
    async def story() -> None:
        node = Node("node-1")
        node.answers = hold
        async with router_world(node) as world:
            sent = world.send(Op.WRITE, payload=WITH_TOKEN)
            await until(lambda: node.asked)
            assert node.connection is not None
            node.answers = refuse(refusal)
            node.connection.close()
            assert isinstance(await sent.answer(), told or type(refusal))

    run(story)


def test_a_write_in_doubt_whose_node_stays_away_is_unknown_and_not_just_unavailable() -> None:
    async def story() -> None:
        node = Node("node-1")
        node.answers = hold
        async with router_world(node) as world:
            sent = world.send(Op.WRITE, timeout_s=0.5, payload=WITH_TOKEN)
            await until(lambda: node.asked)
            await node.stop()
            assert isinstance(await sent.answer(), OutcomeUnknown)

    run(story)


def test_a_write_that_was_sent_is_never_sent_again() -> None:
    async def story() -> None:
        node = Node("node-1")
        node.answers = hold
        async with router_world(node) as world:
            sent = world.send(Op.WRITE)
            await until(lambda: node.asked)
            assert node.connection is not None
            node.connection.close()
            error = await sent.answer()
            assert isinstance(error, OutcomeUnknown)
            assert error.detail == {"shard": 1}
            await world.connected()
            assert len(node.asked) == 1

    run(story)


def test_a_read_whose_node_restarts_is_asked_again() -> None:
    async def story() -> None:
        node = Node("node-1")
        node.answers = hold
        async with router_world(node) as world:
            sent = world.send(Op.READ)
            await until(lambda: node.asked)
            await node.stop()
            node.answers = reply_ok
            await asyncio.sleep(0.05)
            assert not sent.answers
            await node.start()
            assert not isinstance(await sent.answer(), Exception)

    run(story)


@pytest.mark.parametrize("error", [WrongShard("Not mine."), StaleEpoch("Old."), Draining("Going.")])
def test_a_refused_write_is_sent_again_until_it_is_taken(error: Exception) -> None:
    async def story() -> None:
        def answers(node: Node, connection: Connection, request: Request) -> None:
            (reply_ok if request.epoch == 2 else refuse(error))(node, connection, request)  # type: ignore[arg-type]

        node = Node("node-1")
        node.answers = answers
        async with router_world(node) as world:
            sent = world.send(Op.WRITE)
            await until(lambda: node.asked)
            await asyncio.sleep(0.01)
            assert not sent.answers
            world.follow(epoch=2)
            assert not isinstance(await sent.answer(), Exception)
            assert node.asked[-1].epoch == 2

    run(story)


def test_a_node_that_keeps_refusing_is_not_stormed_and_the_part_ends() -> None:
    async def story() -> None:
        node = Node("node-1")
        node.answers = refuse(WrongShard("Not mine."))
        async with router_world(node, park_ms=600) as world:
            start = time.monotonic()
            error = await world.send(Op.WRITE).answer()
            assert isinstance(error, ShardUnavailable)
            assert 0.4 < time.monotonic() - start < 1.5
            assert len(node.asked) < 12

    run(story)


def test_a_part_waits_for_its_node_and_no_longer_than_park_ms() -> None:
    async def story() -> None:
        node = Node("node-1")
        async with router_world(node, park_ms=200) as world:
            await node.stop()
            await until(lambda: not world.links.usable("node-1"))
            start = time.monotonic()
            error = await world.send(Op.WRITE).answer()
            assert isinstance(error, ShardUnavailable)
            assert error.detail == {"shard": 1, "node": "node-1"}
            assert 0.15 < time.monotonic() - start < 0.6

    run(story)


def test_a_parked_part_follows_its_shard_to_another_node() -> None:
    async def story() -> None:
        one, two = Node("node-1"), Node("node-2")
        async with router_world(one, two) as world:
            await one.stop()
            await until(lambda: not world.links.usable("node-1"))
            sent = world.send(Op.WRITE)
            await asyncio.sleep(0.01)
            world.follow(epoch=2, owners={1: "node-2"})
            assert not isinstance(await sent.answer(), Exception)
            assert [(r.shard, r.epoch) for r in two.asked] == [(1, 2)]

    run(story)


def test_what_waits_is_bounded_in_bytes_however_small_the_parts() -> None:
    async def story() -> None:
        node = Node("node-1")
        async with router_world(node, parked_bytes_max=100_000) as world:
            await node.stop()
            await until(lambda: not world.links.usable("node-1"))
            sent = [world.send(Op.READ) for _ in range(1000)]
            refused = [one for one in sent if one.answers]
            assert 500 < len(refused) < 1000
            assert all(isinstance(one.answers[0], Overloaded) for one in refused)
            world.forwarder.retry_parked()
            assert world.forwarder.parked == 1000 - len(refused)

    run(story)


def test_a_parked_part_does_not_keep_the_frame_it_came_in() -> None:
    async def story() -> None:
        node = Node("node-1")
        async with router_world(node) as world:
            await node.stop()
            await until(lambda: not world.links.usable("node-1"))
            body = encode_batch(0, [Request(1, Op.READ, 0, None, None, None, raw(Read([b"k"])))])
            _, requests = decode_requests(body)
            held = sys.getrefcount(body)
            world.send(Op.READ, payload=requests.pop().payload)
            assert sys.getrefcount(body) < held

    run(story)


@pytest.mark.parametrize(("op", "error"), [(Op.WRITE, OutcomeUnknown), (Op.READ, DeadlineExceeded)])
def test_a_node_that_does_not_answer_is_named_before_the_deadline(op: Op, error: type) -> None:
    async def story() -> None:
        node = Node("node-1")
        node.answers = hold
        async with router_world(node) as world:
            start = time.monotonic()
            told = await world.send(op, timeout_s=0.4).answer()
            assert isinstance(told, error)
            assert told.detail == {"shard": 1, "node": "node-1"}
            assert 0.3 < time.monotonic() - start < 0.43
            peer = world.links.usable("node-1")
            assert peer is not None
            assert peer._wire is not None
            assert not peer._wire.pending, "nobody waits for the answer any more"

    run(story)


def test_a_part_whose_time_is_over_is_not_sent() -> None:
    async def story() -> None:
        node = Node("node-1")
        async with router_world(node) as world:
            error = await world.send(Op.WRITE, timeout_s=-0.001).answer()
            assert isinstance(error, DeadlineExceeded)
            assert not node.asked

    run(story)


def test_a_drain_refuses_what_waits_instead_of_leaving_it_unknown() -> None:
    async def story() -> None:
        one, two = Node("node-1"), Node("node-2")
        two.answers = refuse(WrongShard("Not mine."))
        async with router_world(one, two) as world:
            await one.stop()
            await until(lambda: not world.links.usable("node-1"))
            waiting, refused = world.send(Op.WRITE), world.send(Op.WRITE, shard=2)
            await until(lambda: two.asked)
            world.forwarder.drain()
            late = world.send(Op.WRITE)
            for sent in (waiting, refused, late):
                assert isinstance(await sent.answer(1), Draining)

    run(story)


def test_parts_wait_while_a_node_reads_nothing_and_go_when_it_does() -> None:
    async def story() -> None:
        node = Node("node-1")
        await node.start()
        async with fault_proxy("127.0.0.1", node.port) as proxy, router_world(node, through=proxy.port) as world:
            proxy.hold()
            payload = raw(Read([b"k" * 60_000] * 100))
            sent = []
            for _ in range(9):
                sent.append(world.send(Op.READ, payload=payload, timeout_s=10))
                await asyncio.sleep(0)
            await until(lambda: world.forwarder.parked)
            assert not any(one.answers for one in sent)
            proxy.heal()
            for one in sent:
                assert not isinstance(await one.answer(10), Exception)

    run(story)


@pytest.mark.parametrize("error", [Overloaded("Too much."), DiskFull("No room."), InvalidKey("Empty.")])
def test_an_answer_that_is_not_about_the_shard_goes_to_the_caller_at_once(error: ShardKVError) -> None:
    async def story() -> None:
        node = Node("node-1")
        node.answers = refuse(error)
        async with router_world(node) as world:
            told = await world.send(Op.WRITE).answer(0.5)
            assert isinstance(told, type(error))
            assert len(node.asked) == 1

    run(story)


def test_a_node_that_comes_back_elsewhere_is_found_there() -> None:
    async def story() -> None:
        node = Node("node-1")
        async with router_world(node) as world:
            await node.stop()
            before, node.port = node.port, 0
            await node.start()
            assert node.port != before
            sent = world.send(Op.WRITE)
            world.follow()
            assert not isinstance(await sent.answer(), Exception)

    run(story)


def test_another_node_at_a_known_address_is_sent_nothing() -> None:
    async def story() -> None:
        node = Node("node-1")
        async with router_world(node, park_ms=200) as world:
            await node.stop()
            stranger = Node("node-2")
            stranger.port = node.port
            await stranger.start()
            error = await world.send(Op.WRITE).answer()
            assert isinstance(error, ShardUnavailable)
            assert "node-2" in error.message
            assert not stranger.asked
            await stranger.stop()

    run(story)
