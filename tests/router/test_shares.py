"""Requests over several shards: every shard is asked through its node's share, and ends once, truthfully."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from shardkv.errors import (
    DeadlineExceeded,
    DiskFull,
    Draining,
    RemoteProtocolError,
    ShardUnavailable,
    StaleEpoch,
)
from shardkv.transport.server import Connection
from shardkv.wire.messages import (
    Op,
    PartialRead,
    Read,
    Request,
    Write,
    WriteReply,
    WriteResult,
    decode_shared_read,
    decode_shared_write,
    raw,
)
from tests.router.clients import Client, all_told, client_of, echo, of_all
from tests.router.world import Node, hold, run, until

KEYS = [b"d1", b"a1", b"c1", b"b1", b"a2", b"c2"]
"""Of shards 4, 1, 3, 2, 1, 3 when there are four; shards 1 and 3 are on the first node."""
APPLIED, REFUSED, UNKNOWN = WriteResult.APPLIED, WriteResult.REFUSED, WriteResult.UNKNOWN

read_all = Op.READ, raw(Read(KEYS))
read_versions = Op.READ, raw(Read(KEYS, True))
write_all = Op.WRITE, raw(Write(None, None, b"\1\2\1\1\1\2", KEYS, [b"0", b"", b"2", b"3", b"4", b""], False))


async def ask(client: Client, *asked: tuple[Op, msgspec.Raw], **timeouts: Any) -> list[Any]:
    return await all_told(client.send(*asked, **timeouts))


def fates(told: Any) -> tuple[list[int], dict[int, str]]:
    """The result of each operation, and the code of the problem of each shard."""
    results, _, problems = told[:3]
    return list(results), {problem[0]: problem[1] for problem in problems}


def test_each_node_is_asked_once_for_all_of_its_shards() -> None:
    async def story() -> None:
        one, two = Node("node-1"), Node("node-2")
        async with client_of(one, two, shards=4) as client:
            told = await ask(client, read_all, read_versions, write_all)
            assert [told[0][0], told[1][:2], fates(told[2])] == [KEYS, [KEYS, [2] * 6], ([APPLIED] * 6, {})]
            for node in (one, two):
                assert [(request.op, request.shard) for request in node.asked] == [
                    (Op.READ, None),
                    (Op.READ, None),
                    (Op.WRITE, None),
                ]
            read, write = decode_shared_read(one.asked[0].payload), decode_shared_write(one.asked[2].payload)
            assert (read.keys, read.shards) == ([b"a1", b"a2", b"c1", b"c2"], [(1, 1, 2), (3, 1, 2)])
            assert (write.keys, write.kinds, write.values) == (read.keys, b"\2\1\1\2", [b"", b"4", b"2", b""])
            assert write.shards == read.shards

    run(story)


@pytest.mark.parametrize("asked", [read_all, read_versions, write_all])
def test_only_the_shards_with_a_stale_epoch_are_asked_again(asked: tuple[Op, msgspec.Raw]) -> None:
    async def story() -> None:
        node = Node("node-1")
        async with client_of(node, shards=4) as client:

            def answers(node: Node, connection: Connection, request: Request) -> None:
                stale = StaleEpoch("Shard 3 is at epoch 2.")
                if request.shard is None:
                    problem = of_all(node, request, lambda shard, epoch: stale if shard == 3 else None)
                    connection.reply(request.id, problem)
                elif request.epoch == 1:
                    connection.fail(request.id, stale)
                elif request.op == Op.WRITE:
                    connection.reply(request.id, WriteReply(b"\0\0", 1, []))
                else:
                    connection.reply(request.id, [[b"c1", b"c2"], [7, 7]])

            node.answers = answers
            came = client.send(asked)
            await until(lambda: len(node.asked) >= 2)
            assert not came[0]
            client.world.follow(epoch=2, shards=4)
            (told,) = await all_told(came)
            if asked is write_all:
                assert fates(told) == ([APPLIED] * 6, {})
            else:
                assert told[0] == KEYS
                assert told[1:2] == ([[2, 2, 7, 2, 2, 7]] if asked is read_versions else [None])
            assert {request.shard for request in node.asked[1:]} == {3}

    run(story)


def test_what_one_shard_refuses_for_good_is_its_problem() -> None:
    async def story() -> None:
        node = Node("node-1")
        async with client_of(node, shards=4) as client:

            def answers(node: Node, connection: Connection, request: Request) -> None:
                full = DiskFull("No room.")
                connection.reply(request.id, of_all(node, request, lambda shard, epoch: full if shard == 1 else None))

            node.answers = answers
            read, write = await ask(client, read_all, write_all)
            assert isinstance(read, DiskFull)
            assert fates(write) == (
                [APPLIED, REFUSED, APPLIED, APPLIED, REFUSED, APPLIED],
                {1: "disk_full"},
            )

    run(story)


def test_a_read_that_may_be_partial_does_without_what_is_away() -> None:
    async def story() -> None:
        one, two = Node("node-1"), Node("node-2")
        async with client_of(one, two, shards=4, park_ms=5000) as client:

            def answers(node: Node, connection: Connection, request: Request) -> None:
                away = ShardUnavailable("Not now.")
                connection.reply(request.id, of_all(node, request, lambda shard, epoch: away if shard == 4 else None))

            two.answers = answers
            (told,) = await ask(client, (Op.READ, raw(PartialRead(KEYS, partial=True))))
            values, _, missing, problems = told
            assert values == [None, *KEYS[1:]]
            assert (missing, [problem[0] for problem in problems]) == ([0], [4])
            await one.stop()
            await until(lambda: not client.world.links.usable("node-1"))
            (told,) = await ask(client, (Op.READ, raw(PartialRead(KEYS, partial=True))))
            assert (told[2], sorted(problem[0] for problem in told[3])) == ([0, 1, 2, 4, 5], [1, 3, 4])

    run(story)


def test_every_shard_of_a_share_may_be_refused_and_asked_again() -> None:
    async def story() -> None:
        node = Node("node-1")
        async with client_of(node) as client:
            stale = StaleEpoch("All are at epoch 2.")

            def answers(node: Node, connection: Connection, request: Request) -> None:
                if request.shard is None:
                    connection.reply(request.id, of_all(node, request, lambda shard, epoch: stale))
                else:
                    connection.reply(request.id, WriteReply(bytes(2 if request.shard == 1 else 4), 1, []))

            node.answers = answers
            assert fates((await ask(client, write_all))[0]) == ([APPLIED] * 6, {})

    run(story)


def test_a_node_that_dies_leaves_each_of_its_writes_unknown_and_reads_are_asked_again() -> None:
    async def story() -> None:
        one, two = Node("node-1"), Node("node-2")
        async with client_of(one, two, shards=4) as client:
            one.answers = hold
            came = client.send(read_all, write_all)
            await until(lambda: len(one.asked) == 2 and len(two.asked) == 2)
            assert one.connection is not None

            def answers(node: Node, connection: Connection, request: Request) -> None:
                connection.reply(request.id, [[b"a1", b"a2"] if request.shard == 1 else [b"c1", b"c2"]])

            one.answers = answers
            one.connection.close()
            read, write = await all_told(came)
            assert read[0] == KEYS
            unknown = {1: "outcome_unknown", 3: "outcome_unknown"}
            assert fates(write) == ([APPLIED, UNKNOWN, UNKNOWN, APPLIED, UNKNOWN, UNKNOWN], unknown)
            assert [problem[3] for problem in write[2]] == [{"shard": 1}, {"shard": 3}]
            assert all(request.op == Op.READ for request in one.asked[2:]), "a write that was sent is not sent again"

    run(story)


def test_a_share_that_never_left_is_sent_when_the_node_is_back() -> None:
    async def story() -> None:
        node = Node("node-1")
        async with client_of(node) as client:
            peer = client.world.links.usable("node-1")
            assert peer is not None
            send = peer.send

            def and_break(*arguments: Any, **more: Any) -> int:
                peer.send = send  # type: ignore[method-assign]
                request_id = send(*arguments, **more)
                assert peer._wire is not None
                peer._wire.abort()
                return request_id

            def answers(node: Node, connection: Connection, request: Request) -> None:
                connection.reply(request.id, WriteReply(bytes(2 if request.shard == 1 else 4), 1, []))

            node.answers = answers
            peer.send = and_break  # type: ignore[method-assign]
            assert fates((await ask(client, write_all))[0]) == ([APPLIED] * 6, {})
            assert sorted(request.shard or 0 for request in node.asked) == [1, 2]

    run(story)


def test_shards_of_a_node_that_does_not_answer_are_named_before_the_deadline() -> None:
    async def story() -> None:
        one, two = Node("node-1"), Node("node-2")
        async with client_of(one, two, shards=4) as client:
            two.answers = hold
            read, write = await ask(client, read_all, write_all, timeouts_s=[0.4, 0.4])
            assert isinstance(read, DeadlineExceeded)
            unknown = {2: "outcome_unknown", 4: "outcome_unknown"}
            assert fates(write) == ([UNKNOWN, APPLIED, APPLIED, UNKNOWN, APPLIED, APPLIED], unknown)
            peer = client.world.links.usable("node-2")
            assert peer is not None
            assert peer._wire is not None
            assert not peer._wire.pending, "nobody waits for the answers any more"
            assert not client.world.forwarder._sent

    run(story)


def test_a_share_for_a_node_that_is_away_waits_for_it_and_no_longer_than_park_ms() -> None:
    async def story() -> None:
        one, two = Node("node-1"), Node("node-2")
        async with client_of(one, two, shards=4, park_ms=200) as client:
            await one.stop()
            await until(lambda: not client.world.links.usable("node-1"))
            read, write = await ask(client, read_all, write_all)
            assert isinstance(read, ShardUnavailable)
            away = {1: "shard_unavailable", 3: "shard_unavailable"}
            assert fates(write) == ([APPLIED, REFUSED, REFUSED, APPLIED, REFUSED, REFUSED], away)

    run(story)


def test_a_node_that_drains_is_asked_again_when_it_has_started_anew() -> None:
    async def story() -> None:
        node = Node("node-1")
        async with client_of(node) as client:
            node.answers = lambda node, connection, request: connection.fail(request.id, Draining("Going."))
            came = client.send(write_all)
            await until(lambda: client.world.forwarder.parked == 2)
            assert not came[0]

            def answers(node: Node, connection: Connection, request: Request) -> None:
                connection.reply(request.id, WriteReply(bytes(2 if request.shard == 1 else 4), 1, []))

            node.answers = answers
            client.world.follow(epoch=2)
            assert fates((await all_told(came))[0]) == ([APPLIED] * 6, {})

    run(story)


@pytest.mark.parametrize("nonsense", [b"nonsense", [b"\0", None, []], [[b"v"], None, [], []], None])
def test_an_answer_that_is_none_leaves_nobody_with_a_wrong_one(nonsense: Any) -> None:
    async def story() -> None:
        node = Node("node-1")
        async with client_of(node) as client:
            node.answers = lambda node, connection, request: (
                connection.reply(request.id, nonsense) if request.shard is None else hold(node, connection, request)
            )
            read, write = await ask(client, read_all, write_all, timeouts_s=[1, 1])
            assert isinstance(read, RemoteProtocolError | DeadlineExceeded)
            assert fates(write) == ([UNKNOWN] * 6, {1: "outcome_unknown", 2: "outcome_unknown"})

    run(story)


def test_a_share_that_no_frame_holds_is_sent_shard_by_shard() -> None:
    async def story() -> None:
        node = Node("node-1")
        async with client_of(node, shards=4) as client:
            peer = client.world.links.usable("node-1")
            assert peer is not None
            peer.limits = replace(peer.limits, frame_bytes_max=1000)
            keys = [letter * 400 for letter in (b"a", b"b", b"c", b"d")]
            (read,) = await ask(client, (Op.READ, raw(Read(keys))))
            assert read[0] == keys
            assert [request.shard for request in node.asked] == [1, 2, 3, 4]

    run(story)


def test_a_client_that_is_gone_disturbs_nobody() -> None:
    async def story() -> None:
        node = Node("node-1")
        async with client_of(node) as client:
            node.answers = hold
            client.send(read_all, write_all)
            await until(lambda: len(node.asked) == 2)
            assert client.peer._wire is not None
            client.peer._wire.abort()
            await until(lambda: not client.peer.connected)
            assert node.connection is not None
            for request in node.asked[:]:
                echo(node, node.connection, request)
            await until(lambda: not client.world.forwarder._sent)
            node.answers = echo
            await client.peer.wait_connected(5)
            assert (await ask(client, read_all))[0][0] == KEYS

    run(story)
