"""Requests of one key each that come together: each is answered once, truthfully, whatever becomes of the others."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import msgspec
import pytest

from shardkv.errors import (
    DeadlineExceeded,
    Draining,
    InvalidArgument,
    InvalidKey,
    OutcomeUnknown,
    ShardKVError,
    ShardUnavailable,
    StaleEpoch,
)
from shardkv.limits import DEFAULT_LIMITS
from shardkv.transport.server import Connection
from shardkv.wire.messages import NOTHING, Conditions, Op, Read, Request, Write, raw
from shardkv_router.bundles import Bundle
from tests.router.clients import all_told, asked_for, client_of, echo, key_of, read, told, write
from tests.router.world import Node, hold, run, until


def test_each_request_of_a_bundle_gets_the_reply_to_it() -> None:
    async def story() -> None:
        one, two = Node("node-1"), Node("node-2")
        async with client_of(one, two) as client:
            keys = [b"%c%d" % (97 + number % 2, number) for number in range(40)]
            came = client.send(*map(read, keys), *map(write, keys))
            answers = await all_told(came)
            assert [answer[0] for answer in answers[:40]] == [[key] for key in keys]
            assert all(answer[0] == b"\0" for answer in answers[40:])
            assert {key[:1] for key in asked_for(one)} == {b"a"}
            assert {key[:1] for key in asked_for(two)} == {b"b"}
            assert [(request.shard, request.epoch) for request in two.asked] == [(2, 1)] * 40

    run(story)


def test_requests_that_come_together_go_to_their_node_together() -> None:
    async def story() -> None:
        node = Node("node-1")
        async with client_of(node) as client:
            node.answers = hold
            for turn in range(1, 21):  # a machine that is busy takes requests one by one
                client.send(*(write(b"a%d" % number) for number in range(12)))
                await until(lambda: len(node.asked) == 12 * turn)  # noqa: B023
                if any(isinstance(one, Bundle) for one in client.world.forwarder._sent):
                    return
            raise AssertionError("no two requests of 20 frames went together")

    run(story)


def test_only_the_refused_members_are_sent_again() -> None:
    async def story() -> None:
        node = Node("node-1")
        async with client_of(node) as client:

            def answers(node: Node, connection: Connection, request: Request) -> None:
                key = key_of(request)
                if request.epoch == 1 and key.startswith(b"b"):
                    connection.fail(request.id, StaleEpoch("Shard 2 is at epoch 2."))
                elif key == b"a1":
                    connection.fail(request.id, InvalidKey("Never."))
                elif key == b"a3" and asked_for(node).count(key) == 1:
                    connection.fail(request.id, Draining("Going."))
                else:
                    echo(node, connection, request)

            node.answers = answers
            keys = [b"a0", b"a1", b"b2", b"a3", b"b4", b"a5"]
            came = client.send(*map(write, keys))
            await until(lambda: came[5])
            assert [bool(one) for one in came] == [True, True, False, False, False, True]
            client.world.follow(epoch=2)
            told = await all_told(came)
            assert [isinstance(answer, InvalidKey) for answer in told] == [False, True] + [False] * 4
            assert [asked_for(node).count(key) for key in keys] == [1, 1, 2, 2, 2, 1]
            assert not client.world.forwarder._sent

    run(story)


def test_a_node_that_dies_in_the_middle_leaves_nobody_without_the_truth() -> None:
    async def story() -> None:
        node = Node("node-1")
        async with client_of(node) as client:

            def answers(node: Node, connection: Connection, request: Request) -> None:
                if len(node.asked) <= 4:
                    echo(node, connection, request)

            node.answers = answers
            keys = [b"a%d" % number for number in range(4)]
            came = client.send(*(one for key in keys for one in (write(key), read(key))))
            await until(lambda: len(node.asked) == 8 and sum(map(bool, came)) == 4)
            assert node.connection is not None
            node.answers = echo
            node.connection.close()
            told = await all_told(came)
            assert all(not isinstance(answer, ShardKVError) for answer in told[:4])
            assert all(isinstance(answer, OutcomeUnknown) for answer in told[4::2])
            assert [answer.detail for answer in told[4::2]] == [{"shard": 1}] * 2
            assert [answer[0] for answer in told[5::2]] == [[b"a2"], [b"a3"]]
            assert len(node.asked) == 10, "only the reads that were not answered are asked again"

    run(story)


def test_what_a_lost_connection_had_not_sent_is_sent_once_by_the_next() -> None:
    async def story() -> None:
        node = Node("node-1")
        async with client_of(node) as client:
            peer = client.world.links.usable("node-1")
            assert peer is not None
            send_run = peer.send_run

            def and_break(requests: Any, taker: Any) -> int:
                peer.send_run = send_run  # type: ignore[method-assign]
                first = send_run(requests, taker)
                assert peer._wire is not None
                peer._wire.abort()
                return first

            peer.send_run = and_break  # type: ignore[method-assign]
            keys = [b"a%d" % number for number in range(5)]
            told = await all_told(client.send(*map(write, keys)))
            assert not any(isinstance(answer, ShardKVError) for answer in told)
            assert sorted(asked_for(node)) == keys

    run(story)


def test_each_member_has_its_own_deadline() -> None:
    async def story() -> None:
        node = Node("node-1")
        async with client_of(node) as client:
            node.answers = hold
            came = client.send(read(b"a1"), write(b"a2"), read(b"a3"), read(b"a4"), timeouts_s=[0.3, 0.3, 5, 5])
            await until(lambda: came[0] and came[1], 2)
            assert isinstance(told(came[0]), DeadlineExceeded)
            assert isinstance(told(came[1]), OutcomeUnknown)
            assert told(came[1]).detail == {"shard": 1, "node": "node-1"}
            assert not came[2]
            assert not came[3]
            peer = client.world.links.usable("node-1")
            assert peer is not None
            assert peer._wire is not None
            assert len(peer._wire.pending) == 2, "nobody waits for the other answers any more"
            assert node.connection is not None
            for request in node.asked:
                echo(node, node.connection, request)
            assert [answer[0] for answer in (await all_told(came))[2:]] == [[b"a3"], [b"a4"]]

    run(story)


def test_what_was_answered_is_done_with_when_the_others_are_given_up() -> None:
    async def story() -> None:
        node = Node("node-1")
        async with client_of(node) as client:

            def answers(node: Node, connection: Connection, request: Request) -> None:
                if len(node.asked) == 1:
                    echo(node, connection, request)

            node.answers = answers
            client.peer.ids = itertools.chain([7, 8, 7, 9])  # type: ignore[assignment]
            first = client.send(read(b"a1"), read(b"a2"), timeouts_s=[0.4, 0.4])
            await until(lambda: first[0])
            again = client.send(read(b"a3"), read(b"a4"))
            await until(lambda: first[1])
            await asyncio.sleep(0.05)
            assert not any(again), "an id that was used again is another request"

    run(story)


def test_a_bundle_for_a_node_that_is_away_waits_for_it() -> None:
    async def story() -> None:
        one, two = Node("node-1"), Node("node-2")
        async with client_of(one, two) as client:
            await one.stop()
            await until(lambda: not client.world.links.usable("node-1"))
            came = client.send(write(b"a1"), write(b"b1"), read(b"a2"))
            await until(lambda: came[1])
            assert client.world.forwarder.parked == 2
            await one.start()
            assert (await all_told(came))[2][0] == [b"a2"]

    run(story)


def test_a_node_that_stays_away_is_named_for_every_member() -> None:
    async def story() -> None:
        node = Node("node-1")
        async with client_of(node, park_ms=100) as client:
            await node.stop()
            await until(lambda: not client.world.links.usable("node-1"))
            told = await all_told(client.send(write(b"a1"), read(b"b2")))
            assert all(isinstance(answer, ShardUnavailable) for answer in told)
            assert [answer.detail["shard"] for answer in told] == [1, 2]

    run(story)


def test_a_client_that_is_gone_disturbs_nobody_in_its_bundle() -> None:
    async def story() -> None:
        node = Node("node-1")
        async with client_of(node) as client:
            node.answers = hold
            client.send(*(read(b"a%d" % number) for number in range(5)))
            await until(lambda: len(node.asked) == 5)
            assert client.peer._wire is not None
            client.peer._wire.abort()
            await until(lambda: not client.peer.connected)
            await client.peer.wait_connected(5)
            assert node.connection is not None
            for request in node.asked[:]:
                echo(node, node.connection, request)
            await until(lambda: not client.world.forwarder._sent)
            node.answers = echo
            assert [answer[0] for answer in await all_told(client.send(read(b"a8"), read(b"a9")))] == [[b"a8"], [b"a9"]]

    run(story)


@pytest.mark.parametrize(
    "odd",
    [
        (Op.READ, raw(Read([]))),
        (Op.READ, raw(Read([b""]))),
        (Op.READ, raw(Read([b"k" * (DEFAULT_LIMITS.key_bytes_max + 1)]))),
        (Op.WRITE, NOTHING),
        (Op.WRITE, raw(Write(None, Conditions([b"b"], [0]), 1, [b"a"], [b""], False))),
    ],
)
def test_one_that_is_not_in_order_does_not_harm_the_others(odd: tuple[Op, msgspec.Raw]) -> None:
    async def story() -> None:
        node = Node("node-1")
        async with client_of(node) as client:
            told = await all_told(client.send(read(b"a1"), odd, write(b"a2"), read(b"b3")))
            assert isinstance(told[1], InvalidArgument | ShardKVError)
            assert (told[0][0], told[2][0], told[3][0]) == ([b"a1"], b"\0", [b"b3"])

    run(story)
