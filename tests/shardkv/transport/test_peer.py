"""The connection that mends itself: what breaks in the middle of anything is told, once, and truthfully."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from shardkv.errors import BatchTooLarge, DeadlineExceeded, OutcomeUnknown, ShardKVError, UnavailableError
from shardkv.limits import Limits
from shardkv.transport import peer as peer_module
from shardkv.transport import server as server_module
from shardkv.transport.peer import Peer
from shardkv.transport.server import Server
from shardkv.wire.frame import FrameDecoder, encode_frame
from shardkv.wire.hello import Identity
from shardkv.wire.messages import NOTHING, OK, Op, RawReply, Read, Reply, encode_batch, raw
from tests.shardkv.transport.test_server import LIMITS, SERVER, Echo, until, world
from tests.worlds.proxy import fault_proxy

ME = Identity("router", "r")


@contextlib.asynccontextmanager
async def peer_to(port: int, limits: Limits = LIMITS, **options: object) -> AsyncIterator[Peer]:
    peer = Peer([f"127.0.0.1:{port}"], me=lambda: ME, limits=limits, **options)  # type: ignore[arg-type]
    peer.start()
    try:
        yield peer
    finally:
        await peer.close()


class Listener(asyncio.Protocol):
    """Accepts, says hello back when `greets`, then does what the test wants."""

    def __init__(self, *, greets: bool = True, hangs_up: bool = False) -> None:
        self.greets, self.hangs_up = greets, hangs_up
        self.accepted = 0
        self.ended = 0
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.accepted += 1
        self.transport = transport
        self._decoder = FrameDecoder(10**9)
        self._greeted = False

    def data_received(self, data: bytes) -> None:
        assert self.transport is not None
        if self.greets and not self._greeted and self._decoder.feed(data):
            self._greeted = True
            self.transport.write(encode_frame(encode_batch(1, [Reply(0, OK, SERVER.hello())])))
            if self.hangs_up:
                self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended += 1


@contextlib.asynccontextmanager
async def listening(listener: Listener) -> AsyncIterator[int]:
    server = await asyncio.get_running_loop().create_server(lambda: listener, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        if listener.transport is not None:
            listener.transport.abort()


def test_a_request_made_while_the_connection_breaks_is_not_forgotten() -> None:
    async def main() -> None:
        async with world() as w, peer_to(w.port) as peer:
            await peer.wait_connected(5)
            outcomes: list[object] = []

            def on_broken(reply: RawReply | ShardKVError) -> None:
                outcomes.append(type(reply))
                try:
                    peer.send(Op.PING, NOTHING, on_reply=outcomes.append)
                except UnavailableError:
                    outcomes.append("refused")

            peer.send(Op.META_READ, NOTHING, on_reply=on_broken)
            await until(lambda: w.service.held)
            w.service.held[0][0].close()
            await until(lambda: len(outcomes) == 2, 2)
            assert outcomes == [OutcomeUnknown, "refused"]

    asyncio.run(main())


def test_what_never_left_is_not_an_unknown_outcome() -> None:
    async def main() -> None:
        async with world() as w, peer_to(w.port) as peer:
            await peer.wait_connected(5)
            outcomes: list[object] = []
            peer.send(Op.META_READ, NOTHING, on_reply=lambda reply: outcomes.append(type(reply)))
            await until(lambda: w.service.held)
            assert peer._wire is not None
            peer._wire.abort()
            peer.send(Op.META_READ, NOTHING, on_reply=lambda reply: outcomes.append(type(reply)))
            await until(lambda: len(outcomes) == 2, 2)
            assert outcomes == [OutcomeUnknown, UnavailableError]
            assert len(w.service.held) == 1

    asyncio.run(main())


def test_forgetting_a_request_of_a_broken_connection_forgets_no_other() -> None:
    async def main() -> None:
        async with world() as w, peer_to(w.port) as peer:
            await peer.wait_connected(5)
            outcomes: list[object] = []
            old = peer.send(Op.META_READ, NOTHING, on_reply=outcomes.append)
            await until(lambda: w.service.held)
            w.service.held[0][0].close()
            await until(lambda: len(outcomes) == 1)
            await peer.wait_connected(5)
            peer.send(Op.PING, NOTHING, on_reply=outcomes.append)
            peer.forget(old)
            await until(lambda: len(outcomes) == 2, 2)

    asyncio.run(main())


def test_requests_of_one_turn_are_cut_into_frames_the_peer_accepts() -> None:
    async def main() -> None:
        async with world() as w, peer_to(w.port) as peer:
            key = b"k" * 40_000
            await asyncio.gather(*(peer.call(Op.READ, Read([key]), timeout_s=5) for _ in range(10)))
            assert not w.service.closed

    asyncio.run(main())


def test_a_request_no_frame_holds_costs_nobody_else() -> None:
    async def main() -> None:
        async with world() as w, peer_to(w.port) as peer:
            await peer.wait_connected(5)
            waiting = asyncio.create_task(peer.call(Op.META_READ, None, timeout_s=5))
            await until(lambda: w.service.held)
            with pytest.raises(BatchTooLarge, match="a frame holds 100000"):
                await peer.call(Op.READ, Read([b"k" * 200_000]), timeout_s=5)
            connection, request_id = w.service.held[0]
            connection.reply(request_id, None)
            assert await waiting == NOTHING

    asyncio.run(main())


def test_a_peer_that_takes_nothing_is_not_writable_until_it_does() -> None:
    async def main() -> None:
        listener, room = Listener(), asyncio.Event()
        limits = Limits(output_bytes_max=1 << 20)
        async with listening(listener) as port, peer_to(port, limits, on_room=room.set) as peer:
            await peer.wait_connected(5)
            assert listener.transport is not None
            listener.transport.pause_reading()
            piece = raw(b"x" * 65536)
            for _ in range(1000):
                if not peer.writable:
                    break
                peer.send(Op.READ, piece, on_reply=lambda _: None)
                await asyncio.sleep(0)
            assert not peer.writable
            assert peer.connected
            assert not room.is_set()
            listener.transport.resume_reading()
            async with asyncio.timeout(5):
                await room.wait()
            assert peer.writable

    asyncio.run(main())


def test_closing_in_the_middle_of_the_hello_leaves_no_socket() -> None:
    async def main() -> None:
        listener = Listener(greets=False)
        async with listening(listener) as port:
            async with peer_to(port):
                await until(lambda: listener.accepted)
            await until(lambda: listener.ended, 2)

    asyncio.run(main())


def test_a_process_that_hangs_up_after_every_hello_is_not_stormed() -> None:
    async def main() -> None:
        listener = Listener(hangs_up=True)
        async with listening(listener) as port, peer_to(port):
            await asyncio.sleep(0.6)
            assert 2 <= listener.accepted <= 12

    asyncio.run(main())


def test_a_hello_cut_short_is_not_an_unknown_outcome() -> None:
    async def main() -> None:
        async with world() as w, fault_proxy("127.0.0.1", w.port) as proxy:
            proxy.refuse()
            async with peer_to(proxy.port) as peer:
                await until(lambda: proxy.connections > 1)
                with pytest.raises(UnavailableError):
                    await peer.call(Op.PING, None, timeout_s=0.1)
                proxy.heal()
                assert await peer.call(Op.PING, None, timeout_s=5) == NOTHING

    asyncio.run(main())


def test_a_name_that_cannot_be_one_is_a_problem_told_and_tried_again() -> None:
    async def main() -> None:
        peer = Peer([f"{'a' * 70}.example:1"], me=lambda: ME)
        peer.start()
        with pytest.raises(UnavailableError, match="Cannot connect"):
            await peer.call(Op.PING, None, timeout_s=0.3)
        assert peer._keeper is not None
        assert not peer._keeper.done()
        await peer.close()

    asyncio.run(main())


def test_an_idle_connection_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "SWEEP_INTERVAL_S", 0.02)
    limits = Limits(idle_timeout_ms=150)

    async def main() -> None:
        service = Echo()
        server = Server(service, me=lambda: SERVER, limits=limits)
        port = await server.listen("127.0.0.1", 0)
        async with peer_to(port, limits) as peer:
            await peer.wait_connected(5)
            await asyncio.sleep(0.6)
            assert not service.closed
            assert peer.connected
        await server.drain(grace_s=0)

    asyncio.run(main())


def test_a_link_that_breaks_after_long_use_is_mended_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_module, "RETRY_MOST_S", 0.05)

    async def main() -> None:
        async with world() as w, fault_proxy("127.0.0.1", w.port) as proxy, peer_to(proxy.port) as peer:
            for _ in range(3):
                assert await peer.call(Op.PING, None, timeout_s=5) == NOTHING
                await asyncio.sleep(0.06)
                proxy.cut()
                await until(lambda: not peer.connected)
            assert await peer.call(Op.PING, None, timeout_s=5) == NOTHING

    asyncio.run(main())


IMPATIENT = Limits(silence_timeout_ms=200)


def test_a_link_that_died_without_a_word_is_made_anew() -> None:
    async def main() -> None:
        async with world() as w, fault_proxy("127.0.0.1", w.port) as proxy, peer_to(proxy.port, IMPATIENT) as peer:
            assert await peer.call(Op.PING, None, timeout_s=5) == NOTHING
            proxy.mute()
            with pytest.raises(DeadlineExceeded):
                await peer.call(Op.PING, None, timeout_s=0.05)
            outcomes: list[RawReply | ShardKVError] = []
            peer.send(Op.META_READ, NOTHING, on_reply=outcomes.append)
            await until(lambda: outcomes)
            proxy.heal()
            assert isinstance(outcomes[0], OutcomeUnknown)
            assert "not said a word" in str(outcomes[0])
            assert await peer.call(Op.PING, None, timeout_s=5) == NOTHING

    asyncio.run(main())


def test_a_peer_that_is_long_in_answering_but_lives_is_kept() -> None:
    async def main() -> None:
        async with world() as w, peer_to(w.port, IMPATIENT) as peer:
            await peer.wait_connected(5)
            outcomes: list[RawReply | ShardKVError] = []
            peer.send(Op.META_READ, NOTHING, on_reply=outcomes.append)
            await asyncio.sleep(0.8)
            assert not outcomes
            assert peer.connected
            ((connection, request_id),) = w.service.held
            connection.reply(request_id, None)
            await until(lambda: outcomes)
            assert isinstance(outcomes[0], RawReply)

    asyncio.run(main())
