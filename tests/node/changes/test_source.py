"""What the owner of a moving shard answers, and to whom: to the node, starts, change and round at hand, nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shardkv.errors import ShardFenced, ShardKVError, ShardUnavailable, UnknownOperation
from shardkv.topology.documents import (
    Change,
    JobDocument,
    NodeDocument,
    ShardDocument,
    decode_document,
    encode_document,
)
from shardkv.transport.peer import Peer
from shardkv.wire.hello import Identity
from shardkv.wire.messages import Message, MetaPut, Op, Read, Write, reply_error
from shardkv.wire.moves import (
    MoveBegin,
    MoveDump,
    MoveEnd,
    MoveFence,
    MoveFile,
    MoveTail,
    decode_move_begun,
    decode_move_fenced,
    decode_move_slice,
    decode_move_tail_reply,
)
from shardkv_node.engine.memory_dump import decode_slice
from shardkv_node.engine.tail import decode_tail
from tests.node.test_process import World, node_world
from tests.shardkv.metadata.world import meta_client

SHARD, CHANGE = 1, "c0ffee"
TARGET = Identity("node", "node-2", "c1", 5)
NAMED = (CHANGE, SHARD, 1, 5)
Story = Callable[[World, Peer], Coroutine[Any, Any, None]]


async def document(world: World) -> ShardDocument:
    entry = await world.meta.store.get(f"shards/{SHARD}")
    assert entry is not None
    assert entry.value is not None
    found = decode_document(f"shards/{SHARD}", entry.value)
    assert isinstance(found, ShardDocument)
    return found


async def connect(world: World, who: Identity) -> Peer:
    port = world.node._server._listeners[0].sockets[0].getsockname()[1]
    peer = Peer([f"127.0.0.1:{port}"], me=lambda: who)
    peer.start()
    await peer.wait_connected(5)
    return peer


def run(directory: Path, story: Story) -> None:
    """A node that serves a shard with one row, and whose move to node-2 has begun; the peer is node-2."""

    async def main() -> None:
        async with node_world(directory) as world:
            await world.serving()
            await put(world, b"before")
            await world.put_document(NodeDocument("node-2", "s", 5, "127.0.0.1:1", 1))
            async with meta_client(world.meta.address) as client:
                job = JobDocument(
                    1, "add", asked={"node": "nobody"}
                )  # a change without a job is ended by the controller
                await client.txn([], [MetaPut("jobs/1", encode_document(job))])
            change = Change(CHANGE, "move", 1, 1, target="node-2", target_incarnation=5)
            await world.put_document(msgspec.structs.replace(await document(world), change=change))
            while world.node._housekeeping.source_of(CHANGE) is None:
                await asyncio.sleep(0.005)
            peer = await connect(world, TARGET)
            try:
                await story(world, peer)
            finally:
                await peer.close()

    asyncio.run(main())


async def put(world: World, key: bytes) -> ShardKVError | None:
    reply = await world.ask(Op.WRITE, Write(None, None, 1, [key], [b"v"], False), shard=SHARD, epoch=1)
    return reply_error(reply.payload) if reply.status else None


async def refused(peer: Peer, op: Op, message: Message) -> ShardKVError:
    with pytest.raises(ShardKVError) as caught:
        await peer.call(op, message, timeout_s=5)
    return caught.value


async def begin(peer: Peer) -> int:
    found: int = decode_move_begun(await peer.call(Op.MOVE_BEGIN, MoveBegin(*NAMED), timeout_s=5)).round
    return found


def test_dump_and_tail_have_all_that_was_written(tmp_path: Path) -> None:
    async def story(world: World, peer: Peer) -> None:
        number = await begin(peer)
        await put(world, b"after")
        dumped = decode_move_slice(await peer.call(Op.MOVE_DUMP, MoveDump(*NAMED, number, 0), timeout_s=5)).slice
        assert decode_slice(dumped).rows.keys == [b"before"]
        assert decode_move_slice(await peer.call(Op.MOVE_DUMP, MoveDump(*NAMED, number, 1), timeout_s=5)).slice is None
        tail = decode_move_tail_reply(await peer.call(Op.MOVE_TAIL, MoveTail(*NAMED, number, 0), timeout_s=5))
        assert [write.keys for write in decode_tail(tail.batch).writes] == [[b"after"]]
        assert (tail.added, tail.numbers) == (1, None)

    run(tmp_path, story)


def test_a_tail_is_waited_for(tmp_path: Path) -> None:
    async def story(world: World, peer: Peer) -> None:
        number = await begin(peer)
        waiting = asyncio.ensure_future(peer.call(Op.MOVE_TAIL, MoveTail(*NAMED, number, 0, 5000), timeout_s=6))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        await put(world, b"after")
        assert decode_move_tail_reply(await waiting).added == 1
        nothing = decode_move_tail_reply(await peer.call(Op.MOVE_TAIL, MoveTail(*NAMED, number, 1, 20), timeout_s=5))
        assert decode_tail(nothing.batch).writes == []

    run(tmp_path, story)


def test_a_fence_refuses_reads_and_writes_and_the_last_batch_has_the_numbers(tmp_path: Path) -> None:
    async def story(world: World, peer: Peer) -> None:
        number = await begin(peer)
        writing = [asyncio.ensure_future(put(world, b"%d" % one)) for one in range(20)]
        await asyncio.sleep(0.02)
        told = await peer.call(Op.MOVE_FENCE, MoveFence(*NAMED, number), timeout_s=5)
        added = decode_move_fenced(told).added
        outcomes = await asyncio.gather(*writing)
        assert added == sum(error is None for error in outcomes), (
            "all that was accepted is in the tail, nothing else is"
        )
        assert all(error is None or isinstance(error, ShardFenced) for error in outcomes)
        assert isinstance(await put(world, b"late"), ShardFenced)
        reply = await world.ask(Op.READ, Read([b"before"]), shard=SHARD, epoch=1)
        assert isinstance(reply_error(reply.payload), ShardFenced)
        tail = decode_move_tail_reply(await peer.call(Op.MOVE_TAIL, MoveTail(*NAMED, number, 0), timeout_s=5))
        assert tail.numbers is not None
        assert tail.numbers.last_seqno == 1 + added

    run(tmp_path, story)


def test_a_fence_outlasts_the_move_and_its_round_until_the_epoch_rises(tmp_path: Path) -> None:
    async def story(world: World, peer: Peer) -> None:
        await peer.call(Op.MOVE_FENCE, MoveFence(*NAMED, await begin(peer)), timeout_s=5)
        await peer.close()
        before = await document(world)
        await world.put_document(msgspec.structs.replace(before, change=None))
        while world.node._housekeeping.source_of(CHANGE) is not None:
            await asyncio.sleep(0.005)
        assert isinstance(await put(world, b"late"), ShardFenced)
        await world.put_document(msgspec.structs.replace(before, change=None, epoch=2))
        while world.node._ownership.shards.get(SHARD) != 2:
            await asyncio.sleep(0.005)
        reply = await world.ask(Op.READ, Read([b"before"]), shard=SHARD, epoch=2)
        assert reply.status == 0

    run(tmp_path, story)


@pytest.mark.parametrize(
    "named",
    [("beef", SHARD, 1, 5), (CHANGE, 2, 1, 5), (CHANGE, SHARD, 2, 5), (CHANGE, SHARD, 1, 4), ("", 0, 0, 0)],
)
def test_a_message_of_another_change_shard_or_start_is_refused(tmp_path: Path, named: Any) -> None:
    async def story(world: World, peer: Peer) -> None:
        assert isinstance(await refused(peer, Op.MOVE_BEGIN, MoveBegin(*named)), ShardUnavailable)
        assert isinstance(await refused(peer, Op.MOVE_FENCE, MoveFence(*named, 1)), ShardUnavailable)
        assert await put(world, b"k") is None

    run(tmp_path, story)


@pytest.mark.parametrize(
    ("who", "error"),
    [
        (Identity("client", "node-2"), UnknownOperation),
        (Identity("router", "node-2", "c1", 5), UnknownOperation),
        (Identity("node", "node-3", "c1", 5), ShardUnavailable),
        (Identity("node", "node-2", "c1", 6), ShardUnavailable),
    ],
)
def test_only_the_target_of_the_move_is_answered(tmp_path: Path, who: Identity, error: type[ShardKVError]) -> None:
    async def story(world: World, peer: Peer) -> None:
        number = await begin(peer)
        other = await connect(world, who)
        assert isinstance(await refused(other, Op.MOVE_BEGIN, MoveBegin(*NAMED)), error)
        assert isinstance(await refused(other, Op.MOVE_FENCE, MoveFence(*NAMED, number)), error)
        await other.close()
        await peer.call(Op.MOVE_TAIL, MoveTail(*NAMED, number, 0), timeout_s=5)

    run(tmp_path, story)


def test_a_round_ends_with_the_next_one_with_its_connection_and_when_it_is_not_needed(tmp_path: Path) -> None:
    async def story(world: World, peer: Peer) -> None:
        pins = world.node._store._pins
        first = await begin(peer)
        second = await begin(peer)
        assert isinstance(await refused(peer, Op.MOVE_TAIL, MoveTail(*NAMED, first, 0)), ShardUnavailable)
        assert isinstance(await refused(peer, Op.MOVE_FENCE, MoveFence(*NAMED, first)), ShardUnavailable)
        assert isinstance(await refused(peer, Op.MOVE_FILE, MoveFile(*NAMED, second, "x.sst", 0, 1)), ShardUnavailable)
        assert len(pins) == 1
        await peer.call(Op.MOVE_END, MoveEnd(*NAMED, second), timeout_s=5)
        assert not pins
        await begin(peer)
        await peer.close()
        while pins:
            await asyncio.sleep(0.005)
        assert await put(world, b"k") is None

    run(tmp_path, story)


def test_nothing_is_answered_once_the_move_is_over(tmp_path: Path) -> None:
    async def story(world: World, peer: Peer) -> None:
        number = await begin(peer)
        await world.put_document(msgspec.structs.replace(await document(world), change=None, epoch=2))
        while world.node._housekeeping.source_of(CHANGE) is not None:
            await asyncio.sleep(0.005)
        assert isinstance(await refused(peer, Op.MOVE_TAIL, MoveTail(*NAMED, number, 0)), ShardUnavailable)
        assert isinstance(await refused(peer, Op.MOVE_FENCE, MoveFence(*NAMED, number)), ShardUnavailable)
        assert not world.node._store._pins

    run(tmp_path, story)
