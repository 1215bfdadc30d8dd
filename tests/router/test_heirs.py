"""Parts of requests whose shard moves, is fenced, split or merged while they are on their way."""

from __future__ import annotations

import msgspec
import pytest

from shardkv.errors import InvalidArgument, ShardKVError, ShardUnavailable, StaleEpoch, WrongShard
from shardkv.topology.tokens import hash_token
from shardkv.transport.server import Connection
from shardkv.wire.messages import (
    Conditions,
    Op,
    Read,
    ReadReply,
    Request,
    Token,
    Write,
    WriteReply,
    decode_read,
    decode_read_reply,
    decode_write,
    decode_write_reply,
    raw,
)
from tests.router.test_ranges import Shards, count, delete, two_nodes
from tests.router.world import Node, hold, refuse, router_world, run, until

MIDDLE = 2**63
KEYS = [b"%d" % number for number in range(20)]
LANE = b"lane".ljust(16)


def store(node: Node, connection: Connection, request: Request) -> None:
    """Each key has its own name, the shard it was read from, as its value; writes are applied."""
    if request.op == Op.READ:
        read: Read = decode_read(request.payload)
        values = [b"%d:%s" % (request.shard or 0, key) for key in read.keys]
        connection.reply(request.id, ReadReply(values, [7] * len(values) if read.want_versions else None))
    else:
        write: Write = decode_write(request.payload)
        connection.reply(request.id, WriteReply(bytes(len(write.keys)), 1, []))


def ended(node: Node, connection: Connection, request: Request) -> None:
    """Shards 1 and 2 are not here any more."""
    if request.shard in (1, 2):
        connection.fail(request.id, WrongShard("Not here."))
    else:
        store(node, connection, request)


def test_a_refusal_that_comes_after_the_news_is_no_reason_to_wait() -> None:
    async def story() -> None:
        one, two = Node("node-1"), Node("node-2")
        one.answers, two.answers = hold, store
        async with router_world(one, two) as world:
            sent = world.send(Op.READ)
            sent.part.pause_s = 1000.0
            await until(lambda: one.asked)
            world.follow(epoch=3, owners={1: "node-2"})
            assert one.connection is not None
            one.connection.fail(one.asked[0].id, WrongShard("Not here."))
            assert decode_read_reply(ok(await sent.answer(1))).values == [b"1:k"]

    run(story)


def child_of(key: bytes) -> int:
    return 8 if hash_token(key) < MIDDLE else 9


CHILDREN = {8: (0, MIDDLE, "node-1"), 9: (MIDDLE, None, "node-2")}


def ok(answer: msgspec.Raw | ShardKVError) -> msgspec.Raw:
    assert isinstance(answer, msgspec.Raw), answer
    return answer


@pytest.mark.parametrize("error", [WrongShard("Not here."), StaleEpoch("Another epoch.")])
def test_a_refused_part_goes_to_the_new_owner_the_moment_it_is_known(error: ShardKVError) -> None:
    async def story() -> None:
        one, two = Node("node-1"), Node("node-2")
        one.answers, two.answers = refuse(error), store
        async with router_world(one, two) as world:
            sent = world.send(Op.READ)
            await until(lambda: one.asked)
            sent.part.pause_s = 1000.0
            waiting = world.forwarder._refused
            await until(lambda: sent.part in waiting and waiting[sent.part].when() > world.loop.time() + 100)
            world.follow(epoch=3, owners={1: "node-2"})
            assert decode_read_reply(ok(await sent.answer(1))).values == [b"1:k"]

    run(story)


def test_a_read_of_a_shard_that_was_split_asks_both_halves() -> None:
    async def story() -> None:
        one, two = Node("node-1"), Node("node-2")
        one.answers, two.answers = ended, store
        async with router_world(one, two, partition="hash", shards=1) as world:
            sent = world.send(Op.READ, payload=raw(Read(KEYS, want_versions=True)))
            await until(lambda: one.asked)
            world.replace([1], CHILDREN)
            reply = decode_read_reply(ok(await sent.answer()))
            assert reply.values == [b"%d:%s" % (child_of(key), key) for key in KEYS]
            assert reply.versions == [7] * len(KEYS)

    run(story)


def test_a_write_to_a_shard_that_was_split_goes_to_both_halves_with_its_token() -> None:
    async def story() -> None:
        one, two = Node("node-1"), Node("node-2")
        one.answers, two.answers = ended, store
        async with router_world(one, two, partition="hash", shards=1) as world:
            write = Write(Token(LANE, 5), None, 1, KEYS, KEYS, want_existed=False)
            sent = world.send(Op.WRITE, payload=raw(write))
            await until(lambda: one.asked)
            world.replace([1], CHILDREN)
            reply = decode_write_reply(ok(await sent.answer()))
            assert (reply.results, reply.problems) == (bytes(len(KEYS)), [])
            told = {request.shard: decode_write(request.payload) for request in [*one.asked, *two.asked]}
            for child in CHILDREN:
                assert told[child].keys == told[child].values == [key for key in KEYS if child_of(key) == child]
                assert (told[child].token.lane, told[child].token.number) == (LANE, 5)

    run(story)


def test_a_write_with_conditions_that_is_no_longer_of_one_shard_is_not_made() -> None:
    async def story() -> None:
        node = Node("node-1")
        node.answers = ended
        async with router_world(node, partition="hash", shards=1) as world:
            write = Write(None, Conditions(KEYS, [0] * len(KEYS)), 1, KEYS, KEYS, want_existed=False)
            sent = world.send(Op.WRITE, payload=raw(write))
            await until(lambda: node.asked)
            world.replace([1], {8: (0, MIDDLE, "node-1"), 9: (MIDDLE, None, "node-1")})
            answer = await sent.answer()
            assert isinstance(answer, InvalidArgument)
            assert "split" in answer.message
            assert all(request.shard == 1 for request in node.asked)

    run(story)


def test_two_parts_of_one_write_go_as_one_to_the_shard_that_theirs_were_merged_into() -> None:
    async def story() -> None:
        node = Node("node-1")
        node.answers = ended
        async with router_world(node, partition="hash", shards=2) as world:
            token = Token(LANE, 5)
            first = world.send(
                Op.WRITE, shard=1, payload=raw(Write(token, None, 1, [b"a", b"b"], [b"1", b"2"], want_existed=False))
            )
            second = world.send(
                Op.WRITE, shard=2, payload=raw(Write(token, None, bytes([2]), [b"c"], [b""], want_existed=False))
            )
            await until(lambda: len(node.asked) >= 2)
            world.replace([1, 2], {7: (0, None, "node-1")})
            assert decode_write_reply(ok(await first.answer())).results == bytes(2)
            assert decode_write_reply(ok(await second.answer())).results == bytes(1)
            (asked,) = [request for request in node.asked if request.shard == 7]
            told = decode_write(asked.payload)
            rows = sorted(zip(told.keys, told.values, told.kinds, strict=True))
            assert rows == [(b"a", b"1", 1), (b"b", b"2", 1), (b"c", b"", 2)]
            assert (told.token.lane, told.token.number) == (LANE, 5)

    run(story)


def test_a_part_whose_other_half_is_on_its_way_by_itself_is_not_sent_as_its_repetition() -> None:
    async def story() -> None:
        node = Node("node-1")
        async with router_world(node, partition="hash", shards=2) as world:
            node.answers = hold
            token = Token(LANE, 5)
            world.replace([1, 2], {7: (0, None, "node-1")})
            world.send(Op.WRITE, shard=1, payload=raw(Write(token, None, 1, [b"a"], [b"1"], want_existed=False)))
            await until(lambda: node.asked)
            late = world.send(Op.WRITE, shard=2, payload=raw(Write(token, None, 1, [b"c"], [b"3"], want_existed=False)))
            assert isinstance(await late.answer(), ShardUnavailable)
            assert len(node.asked) == 1

    run(story)


def test_a_part_finds_the_shard_its_own_was_merged_into_also_after_two_merges() -> None:
    async def story() -> None:
        node = Node("node-1")
        node.answers = ended
        async with router_world(node, partition="hash", shards=2) as world:
            sent = world.send(Op.READ, shard=2)
            await until(lambda: node.asked)
            world.replace([1, 2], {7: (0, None, "node-1")})
            assert decode_read_reply(ok(await sent.answer())).values == [b"7:k"]

    run(story)


def test_a_part_of_a_shard_that_is_gone_without_heirs_waits_and_says_so() -> None:
    async def story() -> None:
        node = Node("node-1")
        async with router_world(node, park_ms=100) as world:
            sent = world.send(Op.READ, shard=77)
            assert isinstance(await sent.answer(), ShardUnavailable)

    run(story)


class Splitting(Shards):
    """Shard 1 is split at its first answer; then node-1 does not know it any more."""

    world = None

    def answer(self, node: Node, connection: Connection, request: Request) -> None:
        if request.shard == 1 and self.asked:
            if self.world is not None and 1 in self.world.topology.shards:
                self.keys |= {8: self.keys[1][::2], 9: self.keys[1][1::2]}
                self.world.replace([1], CHILDREN)
            connection.fail(request.id, WrongShard("Not here."))
        else:
            super().answer(node, connection, request)


def test_a_count_over_a_shard_that_is_split_meanwhile_counts_every_key_once() -> None:
    async def story() -> None:
        shards = Splitting(s1="abcdefgh")
        async with router_world(*two_nodes(shards), partition="hash", shards=1) as world:
            shards.world = world
            assert await count(world) == 8
            assert 1 not in world.topology.shards

    run(story)


def test_a_delete_over_a_shard_that_is_split_meanwhile_counts_every_key_once() -> None:
    async def story() -> None:
        shards = Splitting(s1="abcdefgh")
        async with router_world(*two_nodes(shards), partition="hash", shards=1) as world:
            shards.world = world
            deleted, start = 0, b""
            while True:
                reply = await delete(world, start)
                deleted += reply.deleted
                if reply.frontier is None:
                    break
                start = reply.frontier
            assert deleted == 8
            assert not shards.keys[8] and not shards.keys[9]

    run(story)
