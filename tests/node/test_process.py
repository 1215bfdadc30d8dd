"""A node process inside the test's loop, against a real metadata service: when it serves, and when it must end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from shardkv.errors import (
    OutcomeUnknown,
    ShardKVError,
    StaleEpoch,
    StorageError,
    StoreMismatch,
    StorePoisoned,
    WrongShard,
)
from shardkv.limits import DEFAULT_LIMITS
from shardkv.metadata.register import register_node
from shardkv.topology.documents import NodeDocument, ShardDocument, decode_document, encode_document
from shardkv.transport.peer import Peer
from shardkv.wire.hello import Identity
from shardkv.wire.messages import (
    OK,
    Conditions,
    Kind,
    MetaPut,
    Op,
    RawReply,
    Read,
    Scan,
    Write,
    decode_page,
    decode_read_reply,
    decode_write_reply,
    raw,
    reply_error,
)
from shardkv_node.engine.options import Options
from shardkv_node.process import NodeProcess, NodeSettings
from tests.shardkv.metadata.world import MetaWorld, meta_client, meta_world

Question = tuple[object, int, int]
"""A message, its shard and epoch."""


class World:
    def __init__(self, meta: MetaWorld, node: NodeProcess) -> None:
        self.meta, self.node = meta, node
        self.stop = asyncio.Event()
        self.running = asyncio.ensure_future(node.run(self.stop))

    async def serving(self) -> None:
        while not self.node._ownership.shards:
            assert not self.running.done(), self.running
            await asyncio.sleep(0.005)

    async def ask(self, op: Op, message: object, *, shard: int | None, epoch: int | None) -> RawReply:
        """One request to the node, as a router sends it."""
        port = self.node._server._listeners[0].sockets[0].getsockname()[1]
        peer = Peer([f"127.0.0.1:{port}"], me=lambda: Identity("router", "r"))
        peer.start()
        try:
            await peer.wait_connected(5)
            answer: asyncio.Future[RawReply | ShardKVError] = asyncio.get_running_loop().create_future()
            peer.send(op, raw(message), on_reply=answer.set_result, shard=shard, epoch=epoch)
            reply = await answer
            assert isinstance(reply, RawReply)
            return reply
        finally:
            await peer.close()

    async def ask_all(self, questions: Sequence[Question]) -> list[RawReply]:
        """The replies to requests that leave in one frame: reads, and writes where the message is one."""
        port = self.node._server._listeners[0].sockets[0].getsockname()[1]
        peer = Peer([f"127.0.0.1:{port}"], me=lambda: Identity("router", "r"))
        peer.start()
        try:
            await peer.wait_connected(5)
            loop = asyncio.get_running_loop()
            answers: list[asyncio.Future[RawReply]] = [loop.create_future() for _ in questions]
            for answer, (message, shard, epoch) in zip(answers, questions, strict=True):
                op = Op.WRITE if isinstance(message, Write) else Op.READ
                peer.send(op, raw(message), on_reply=answer.set_result, shard=shard, epoch=epoch)  # type: ignore[arg-type]
            return await asyncio.gather(*answers)
        finally:
            await peer.close()

    async def put_document(self, document: ShardDocument | NodeDocument) -> None:
        key = f"shards/{document.id}" if isinstance(document, ShardDocument) else f"nodes/{document.name}"
        async with meta_client(self.meta.address) as client:
            await client.txn([], [MetaPut(key, encode_document(document))])


@contextlib.asynccontextmanager
async def node_world(directory: Path, durability: str = "always") -> AsyncIterator[World]:
    (directory / "node").mkdir()
    async with asyncio.timeout(20), meta_world(directory / "meta", nodes=1) as meta:
        settings = NodeSettings(
            name="node-1",
            meta=[meta.address],
            data_dir=str(directory / "node"),
            bind="127.0.0.1",
            port=0,
            advertise=None,
            engine=Options(durability=durability, workers=0, disk_reserve_bytes=0),  # type: ignore[arg-type]
            limits=DEFAULT_LIMITS,
        )
        world = World(meta, NodeProcess(settings))
        try:
            yield world
        finally:
            world.stop.set()
            await asyncio.gather(world.running, return_exceptions=True)


def test_only_what_is_owned_at_exactly_its_epoch_is_served(tmp_path: Path) -> None:
    async def main() -> None:
        async with node_world(tmp_path) as world:
            await world.serving()
            put = Write(None, None, 1, [b"k"], [b"v"], False)
            assert (await world.ask(Op.WRITE, put, shard=1, epoch=1)).status == 0
            for op, message in ((Op.WRITE, put), (Op.READ, Read([b"k"]))):
                for shard, epoch, error in ((1, 2, StaleEpoch), (1, 0, StaleEpoch), (9, 1, WrongShard)):
                    reply = await world.ask(op, message, shard=shard, epoch=epoch)
                    assert isinstance(reply_error(reply.payload), error)

    asyncio.run(main())


def test_reads_that_arrive_together_are_answered_as_each_alone(tmp_path: Path) -> None:
    async def main() -> None:
        async with node_world(tmp_path) as world:
            await world.serving()
            keys = [b"k%d" % number for number in range(40)]
            for key in keys[:30]:
                await world.ask(Op.WRITE, Write(None, None, 1, [key], [key * 3], False), shard=1, epoch=1)
            plain: list[Question] = [(Read([key]), 1, 1) for key in keys]
            odd: list[Question] = [
                (Read(keys), 1, 1), (Read([b"k1"], True), 1, 1), (Read([]), 1, 1), (Read([b""]), 1, 1),
                (Read([b"k" * 100_000]), 1, 1), (Read([b"k1"]), 9, 1), (Read([b"k1"]), 1, 2), (7, 1, 1), (["k1"], 1, 1),
            ]  # fmt: skip
            for place, question in enumerate(odd):
                asked = [*plain[: 4 * place], question, *plain[4 * place :]]
                alone = [await world.ask_all([one]) for one in asked]
                together = await world.ask_all(asked)
                assert [(reply.status, bytes(reply.payload)) for reply in together] == [
                    (reply.status, bytes(reply.payload)) for (reply,) in alone
                ]

    asyncio.run(main())


def test_writes_that_arrive_together_are_answered_as_each_alone(tmp_path: Path) -> None:
    def put(key: bytes, value: bytes = b"v", *, ttl_ms: int | None = None) -> Write:
        return Write(None, None, int(Kind.PUT), [key], [value], False, ttl_ms)

    def told(reply: RawReply) -> object:
        """All but the version, which rises."""
        if reply.status != OK:
            return bytes(reply.payload)
        answer = decode_write_reply(reply.payload)
        return answer.results, answer.problems, answer.number, bool(answer.version)

    async def main() -> None:
        async with node_world(tmp_path, durability="os") as world:
            await world.serving()
            plain: list[Question] = [(put(b"k%d" % number), 1, 1) for number in range(40)]
            odd: list[Question] = [
                (put(b""), 1, 1), (put(b"k" * 100_000), 1, 1), (put(b"k1", ttl_ms=10**9), 1, 1),
                (put(b"k1"), 9, 1), (put(b"k1"), 1, 2), (put(b"k1", b"v" * (17 << 20)), 1, 1),
                (Write(None, None, 7, [b"k1"], [b"v"], False), 1, 1), (Write(None, None, 1, [b"k1"], [], False), 1, 1),
                (Write(None, None, 1, [b"k1", b"k2"], [b"v", b"w"], False), 1, 1),
                (Write(None, None, 1, [b"k1", b""], [b"v", b"w"], False), 1, 1),
                (Write(None, None, 1, [b"k1", b"k2"], [b"v"], False), 1, 1),
                (Write(None, None, 1, [b"k1", b"k2"] * 5001, [b"v"] * 10_002, False), 1, 1),
                (Write(None, None, 2, [b"k1"], [b""], True), 1, 1), (Write(None, None, 1, [], [], False), 1, 1),
                (Write(None, Conditions([b"none"], [77]), 1, [b"k1"], [b"v"], False), 1, 1),
            ]  # fmt: skip
            for place, question in enumerate(odd):
                asked = [*plain[: 3 * place], question, *plain[3 * place :]]
                alone = [await world.ask_all([one]) for one in asked]
                together = await world.ask_all(asked)
                assert list(map(told, together)) == [told(reply) for (reply,) in alone]
            versions = [decode_write_reply(reply.payload).version for reply in await world.ask_all(plain)]
            assert versions == sorted(set(versions))
            keys = [message.keys[0] for message, _, _ in plain if isinstance(message, Write)]
            (reply,) = await world.ask_all([(Read(keys, True), 1, 1)])
            assert decode_read_reply(reply.payload).versions == versions

    asyncio.run(main())


def test_a_shard_that_moved_away_is_refused_and_a_raised_epoch_holds(tmp_path: Path) -> None:
    async def main() -> None:
        async with node_world(tmp_path) as world:
            await world.serving()
            await world.ask(Op.WRITE, Write(None, None, 1, [b"k"], [b"v"], False), shard=1, epoch=1)
            entry = await world.meta.store.get("shards/1")
            assert entry is not None
            assert entry.value is not None
            shard = decode_document("shards/1", entry.value)
            assert isinstance(shard, ShardDocument)
            raised = ShardDocument(1, shard.keyspace, shard.start, shard.stop, 2, "node-1")
            await world.put_document(raised)
            while world.node._ownership.shards[1] != 2:
                await asyncio.sleep(0.005)
            assert isinstance(
                reply_error((await world.ask(Op.READ, Read([b"k"]), shard=1, epoch=1)).payload), StaleEpoch
            )
            reply = await world.ask(Op.READ, Read([b"k"]), shard=1, epoch=2)
            assert decode_read_reply(reply.payload).values == [b"v"]
            await world.put_document(ShardDocument(1, shard.keyspace, shard.start, shard.stop, 3, "node-2"))
            while 1 in world.node._ownership.shards:
                await asyncio.sleep(0.005)
            reply = await world.ask(Op.READ, Read([b"k"]), shard=1, epoch=3)
            assert isinstance(reply_error(reply.payload), WrongShard)

    asyncio.run(main())


def test_a_node_ends_when_a_later_start_of_it_is_registered(tmp_path: Path) -> None:
    async def main() -> None:
        async with node_world(tmp_path) as world:
            await world.serving()
            async with meta_client(world.meta.address) as client:
                store_id = world.node._store.store_id.hex()
                later = NodeDocument("node-1", store_id, 99, "127.0.0.1:1", 1, start_id="later")
                await register_node(client, later, world.node._identity.start_ids)
            with pytest.raises(StoreMismatch, match="A later start"):
                await world.running

    asyncio.run(main())


def test_a_node_whose_store_was_poisoned_in_the_background_ends(tmp_path: Path) -> None:
    async def main() -> None:
        async with node_world(tmp_path, "interval") as world:
            await world.serving()
            world.node._store.health.poison(StorageError("A sync failed."))
            with pytest.raises(StorePoisoned):
                await world.running

    asyncio.run(main())


def test_a_scan_is_refused_when_one_of_its_shards_is_not_owned_at_its_epoch(tmp_path: Path) -> None:
    async def main() -> None:
        async with node_world(tmp_path) as world:
            await world.serving()
            for pairs, error in (([(1, 1), (2, 9)], StaleEpoch), ([(1, 1), (77, 1)], WrongShard)):
                asked = Scan(b"", None, False, False, 10, 1000, pairs)
                reply = await world.ask(Op.SCAN, asked, shard=None, epoch=None)
                assert reply.status == 1
                assert isinstance(reply_error(reply.payload), error)
            reply = await world.ask(Op.SCAN, Scan(b"", None, False, False, 10, 1000, [(1, 1)]), shard=None, epoch=None)
            assert decode_page(reply.payload).shards == [1]

    asyncio.run(main())


def test_a_write_whose_sync_failed_is_unknown_and_the_node_ends(tmp_path: Path) -> None:
    async def main() -> None:
        async with node_world(tmp_path) as world:
            await world.serving()
            answered = world.node._store._syncer
            answered.submit = lambda sync, done, *, delay_s=0.0: done(StorageError("Broken."))  # type: ignore[method-assign]
            put = Write(None, None, 1, [b"k"], [b"v"], False)
            reply = await world.ask(Op.WRITE, put, shard=1, epoch=1)
            assert isinstance(reply_error(reply.payload), OutcomeUnknown)
            with pytest.raises(StorePoisoned):
                await world.running

    asyncio.run(main())
