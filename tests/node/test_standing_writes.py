"""A disk that does not answer holds up writes and nothing else: reads behind them on a connection are served."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

import pytest

from shardkv.limits import Limits
from shardkv.transport.server import Server
from shardkv.wire.hello import Identity
from shardkv.wire.messages import ERROR, OK, Op, RawReply, Read, Request, Write, decode_read_reply, raw, reply_error
from shardkv_node import committer as committer_module
from shardkv_node.committer import Committer
from shardkv_node.engine.options import Options
from shardkv_node.engine.store import Store
from shardkv_node.ownership import Ownership
from shardkv_node.service import NodeService
from tests.node.engine.crash_vfs import CrashVfs
from tests.node.test_committer import HeldSyncer
from tests.shardkv.transport.test_server import until
from tests.shardkv.transport.test_server_time import Raw

LIMITS = Limits(requests_in_flight_max=400)
SHARD, EPOCH = 1, 1


def put(request_id: int, value: bytes = b"v") -> Request:
    payload = raw(Write(None, None, 1, [b"key"], [value], False))
    return Request(request_id, Op.WRITE, 0, SHARD, EPOCH, None, payload)


def get(request_id: int) -> Request:
    return Request(request_id, Op.READ, 0, SHARD, EPOCH, None, raw(Read([b"key"])))


def run(story: Callable[[Raw, HeldSyncer, Committer], Coroutine[None, None, None]]) -> None:
    async def main() -> None:
        syncer = HeldSyncer()
        options = Options(durability="always", workers=0, disk_reserve_bytes=0)
        store = Store.open("/store", options, post=lambda work: work(), vfs=CrashVfs(), syncer=syncer)
        ownership = Ownership("node-1")
        ownership.serve(SHARD, EPOCH, store.create_tablet(b"%d" % SHARD))
        committer = Committer(store, on_fatal=lambda error: None, limits=LIMITS)
        service = NodeService(store, ownership, committer, LIMITS)
        server = Server(service, me=lambda: Identity("node", "node-1"), limits=LIMITS)
        router = Raw(await server.listen("127.0.0.1", 0))
        await router.connect()
        await story(router, syncer, committer)
        await server.drain(grace_s=0)

    asyncio.run(main())


async def answer_to(router: Raw, request_id: int) -> tuple[RawReply, list[RawReply]]:
    """The reply with this id, and those that came before it."""
    before: list[RawReply] = []
    while (reply := await router.reply()).id != request_id:
        before.append(reply)
    return reply, before


@pytest.mark.parametrize("size_bytes", [10, 10_000])
def test_reads_pass_any_number_of_writes_the_disk_does_not_take(
    size_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(committer_module, "STANDING_S", 0.05)

    async def story(router: Raw, syncer: HeldSyncer, committer: Committer) -> None:
        router.send(put(1))
        await until(lambda: syncer.waiting)
        for number in range(2, 2000):
            router.send(put(number, bytes(size_bytes)))
        router.send(get(5000))
        reply, refused = await answer_to(router, 5000)
        assert decode_read_reply(reply.payload).values == [None]
        assert len(refused) > 1000
        for each in refused:
            error = reply_error(each.payload)
            assert (each.status, error.code) == (ERROR, "overloaded")
            assert 20 <= error.detail["retry_after_ms"] <= 5000
        answered = 1999 - len(refused)
        assert answered > 50, "what may wait waits"
        for _ in range(3):
            await until(lambda: syncer.waiting or committer.idle)
            if syncer.waiting:
                syncer.finish()
        assert [(await router.reply()).status for _ in range(answered)] == [OK] * answered

    run(story)


def test_a_queue_that_moves_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(committer_module, "STANDING_S", 0.2)

    async def story(router: Raw, syncer: HeldSyncer, committer: Committer) -> None:
        router.send(*(put(number) for number in range(1, 2001)))
        statuses: list[int] = []
        while len(statuses) < 2000:
            await until(lambda: syncer.waiting)
            syncer.finish()
            statuses.append((await router.reply()).status)
            await until(lambda: syncer.waiting or committer.idle)
            statuses += [router.replies.pop(0).status for _ in range(len(router.replies))]
            if committer.idle:
                statuses += [(await router.reply()).status for _ in range(2000 - len(statuses))]
        assert statuses == [OK] * 2000

    run(story)
