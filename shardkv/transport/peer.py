"""An outgoing connection that mends itself: requests with callbacks out, replies matched by id back.

Invariants: a callback runs exactly once unless its request was forgotten; a late or unknown reply disturbs nobody;
a request that was handed to the socket and never answered ends in OutcomeUnknown, one that was not in
UnavailableError; from the moment a connection is lost nothing is taken for it. Retrying is the caller's decision.
A connection whose other end owes an answer and has gone silent (a link that died without a word, a process that is
stopped) is given up after `silence_timeout_ms` and made anew.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import msgspec

from shardkv.errors import (
    BatchTooLarge,
    ClusterMismatch,
    DeadlineExceeded,
    OutcomeUnknown,
    ProtocolError,
    RemoteProtocolError,
    ShardKVError,
    UnavailableError,
    VersionMismatch,
)
from shardkv.hybrid_clock import HybridClock
from shardkv.limits import DEFAULT_LIMITS, Limits
from shardkv.transport.address import parse_address, problem_of
from shardkv.transport.outbox import encode_frames, set_socket_options
from shardkv.transport.server import wall_ms
from shardkv.transport.turn import turn_of
from shardkv.wire.frame import HEADER_BYTES, FrameDecoder
from shardkv.wire.hello import Identity, check_hello
from shardkv.wire.messages import (
    NOTHING,
    OK,
    Hello,
    Op,
    RawReply,
    Request,
    decode_hello,
    decode_replies,
    raw,
    reply_error,
)

log = logging.getLogger(__name__)

RETRY_FIRST_S = 0.02
RETRY_MOST_S = 1.0
CONNECT_TIMEOUT_S = 5.0
CONNECT_FIRST_S = 0.5
"""With several addresses one gets so long to answer before the next is tried; longer every time, up to
CONNECT_TIMEOUT_S."""
PINGS_PER_IDLE_TIME = 3
"""A connection nobody uses is pinged so often within the time after which it would be closed as idle."""
LOOKS_PER_SILENCE = 4
"""So often within `silence_timeout_ms` a connection is looked at; from half of them on it is pinged."""

OnReply = Callable[[RawReply | ShardKVError], None]


class RunTaker(Protocol):
    """Whoever sent a run of requests together, and takes what comes of each."""

    came: list[RawReply]
    """Replies of one frame to it, while that is being taken apart; it belongs to the connection."""

    def take(self, replies: list[RawReply]) -> None:
        """Some of its requests were answered. The replies are the taker's to change."""

    def lost(self, request_id: int, error: ShardKVError) -> None:
        """A request of the run will not be answered: OutcomeUnknown, UnavailableError or BatchTooLarge."""


class Peer:
    """A connection to one process, reachable at any of several addresses.

    `expected` names who must answer there; `on_up`, `on_down` run when the connection is usable and when it broke,
    `on_room` when a peer that had stopped reading takes requests again.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        me: Callable[[], Identity],
        expected: Identity | None = None,
        limits: Limits = DEFAULT_LIMITS,
        clock: HybridClock | None = None,
        on_up: Callable[[], None] | None = None,
        on_down: Callable[[], None] | None = None,
        on_room: Callable[[], None] | None = None,
    ) -> None:
        self.addresses = [parse_address(address) for address in addresses]
        self.me = me
        self.expected = expected
        self.limits = limits
        self.clock = clock or HybridClock()
        self.remote: Hello | None = None
        self.last_problem: ShardKVError = UnavailableError(f"Not connected to {self.label} yet.")
        self._on_up = on_up or _nothing
        self._on_down = on_down or _nothing
        self.on_room = on_room or _nothing
        self.ids = itertools.count(1)
        """Of requests; never used again, on no later connection either."""
        self._wire: _Wire | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    @property
    def label(self) -> str:
        """What to call this peer in messages."""
        where = ", ".join(f"{host}:{port}" for host, port in self.addresses)
        return f"{self.expected.role} {self.expected.name} at {where}" if self.expected else where

    @property
    def connected(self) -> bool:
        return self._wire is not None

    @property
    def writable(self) -> bool:
        """Connected, and the peer reads what it is sent: what is sent now does not just pile up here."""
        return self._wire is not None and self._wire.writable

    def start(self) -> None:
        """Connect, and connect again whenever the connection breaks, until `close`."""
        self._keeper = asyncio.get_running_loop().create_task(self._keep())

    async def close(self) -> None:
        """Stop connecting and close; whatever is in flight ends in an error."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        if self._wire is not None:
            self._wire.abort()
            await asyncio.sleep(0)

    async def wait_connected(self, timeout_s: float) -> None:
        """Raises the last connection problem when there is no connection within `timeout_s`; at once when the peer
        is of another cluster or version."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._wire is None:
                    if isinstance(self.last_problem, ClusterMismatch | VersionMismatch):
                        raise self.last_problem
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise self.last_problem from None

    def send(
        self,
        op: Op,
        payload: msgspec.Raw,
        *,
        on_reply: OnReply,
        ctx: int = 0,
        shard: int | None = None,
        epoch: int | None = None,
        deadline: float | None = None,
    ) -> int:
        """Send a request; its reply or error comes to `on_reply`. Returns the id that `forget` takes.

        `deadline` is an absolute `loop.time()`; it is passed on, not enforced here. Before sending much ask `writable`.
        Raises UnavailableError when there is no connection.
        """
        if self._wire is None:
            raise self._not_connected()
        return self._wire.send(op, payload, on_reply, ctx, shard, epoch, deadline)

    def send_run(self, requests: Sequence[Request], taker: RunTaker) -> int:
        """Send requests together; what comes of them goes to `taker`. They are given consecutive ids, and the first
        of these is returned: `forget` takes each. Everything else in them is sent as it is.

        Raises UnavailableError when there is no connection.
        """
        if self._wire is None:
            raise self._not_connected()
        return self._wire.send_run(requests, taker)

    def _not_connected(self) -> UnavailableError:
        return UnavailableError(f"There is no connection to {self.label}: {self.last_problem.message}")

    def forget(self, request_id: int) -> None:
        """The caller no longer wants the reply to this request."""
        if self._wire is not None:
            self._wire.pending.pop(request_id, None)

    async def call(self, op: Op, message: Any, *, timeout_s: float, ctx: int = 0) -> msgspec.Raw:
        """Send a request and wait for its payload. Raises what the peer reported, or DeadlineExceeded."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        await self.wait_connected(timeout_s)
        answer: asyncio.Future[RawReply | ShardKVError] = loop.create_future()
        payload = message if isinstance(message, msgspec.Raw) else raw(message)
        request_id = self.send(op, payload, on_reply=_into(answer), ctx=ctx, deadline=deadline)
        try:
            async with asyncio.timeout_at(deadline):
                reply = await answer
        except TimeoutError:
            raise DeadlineExceeded(f"{self.label} did not answer within {timeout_s:g} s.") from None
        finally:
            self.forget(request_id)
        if isinstance(reply, ShardKVError):
            raise reply
        if reply.status != OK:
            raise reply_error(reply.payload)
        return reply.payload

    # Keeping the connection

    async def _keep(self) -> None:
        loop = asyncio.get_running_loop()
        pause_s = RETRY_FIRST_S
        first_s = timeout_s = CONNECT_TIMEOUT_S if len(self.addresses) == 1 else CONNECT_FIRST_S
        for address in itertools.cycle(random.sample(self.addresses, len(self.addresses))):
            wire = await self._connect(*address, timeout_s)
            timeout_s = min(1.6 * timeout_s, CONNECT_TIMEOUT_S) if wire is None else first_s
            if wire is not None:
                since = loop.time()
                self._became_usable(wire)
                await self._stay(wire)
                if loop.time() - since > RETRY_MOST_S:
                    pause_s = RETRY_FIRST_S
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(pause_s * 1.6, RETRY_MOST_S)

    async def _stay(self, wire: _Wire) -> None:
        """Until the connection is lost, or given up as silent. A ping now and then, lest the peer closes it as idle
        under a request's feet."""
        idle_s = self.limits.idle_timeout_ms / 1000 / PINGS_PER_IDLE_TIME
        look_s = self.limits.silence_timeout_ms / 1000 / LOOKS_PER_SILENCE
        unpinged_s = 0.0
        while not wire.closed.is_set():
            try:
                async with asyncio.timeout(min(idle_s, look_s)):
                    await wire.closed.wait()
            except TimeoutError:
                unpinged_s += min(idle_s, look_s)
                if wire.silent_looks() >= LOOKS_PER_SILENCE // 2 or unpinged_s >= idle_s:
                    unpinged_s = 0.0
                    wire.send(Op.PING, NOTHING, _ignore, 0, None, None, None)

    async def _connect(self, host: str, port: int, timeout_s: float) -> _Wire | None:
        loop = asyncio.get_running_loop()
        wire = _Wire(self)
        try:
            async with asyncio.timeout(timeout_s):
                await loop.create_connection(lambda: wire, host, port)
                self.remote = await wire.say_hello()
        except TimeoutError:
            self.last_problem = UnavailableError(f"{host}:{port} did not answer within {timeout_s:g} s.")
        except (OSError, UnicodeError) as error:
            self.last_problem = UnavailableError(f"Cannot connect to {host}:{port}: {problem_of(error)}.")
        except asyncio.CancelledError:
            wire.abort()
            raise
        except ShardKVError as error:
            self.last_problem = error
            if isinstance(error, ProtocolError):
                log.warning("peer_refused peer=%r reason=%r", self.label, error.message)
                self._changed.set()
        else:
            return wire
        wire.abort()
        return None

    def _became_usable(self, wire: _Wire) -> None:
        if not wire.closed.is_set():
            self._wire = wire
            self._changed.set()
            self._on_up()

    def lost(self, wire: _Wire, why: str) -> None:
        """Told by a connection the moment it is lost, before those who wait on it hear."""
        if self._wire is wire:
            self._wire = None
            self.last_problem = UnavailableError(f"The connection to {self.label} broke: {why}.")
            self._on_down()


class _Wire(asyncio.Protocol):
    """One TCP connection of a Peer."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._loop = asyncio.get_running_loop()
        self._turn = turn_of(self._loop)
        self._decoder = FrameDecoder(peer.limits.frame_bytes_max)
        self._transport: asyncio.Transport | None = None
        self._outbox: list[Request] = []
        self.pending: dict[int, OnReply | RunTaker] = {}
        self.closed = asyncio.Event()
        self.writable = True
        self.problem: ShardKVError | None = None
        self._owes = False
        """The peer was asked something since it was heard last."""
        self._silent_looks = 0
        self._unsent_bytes = 0

    async def say_hello(self) -> Hello:
        """Exchange hellos. Raises what the peer refused, or what was wrong with its hello."""
        me = self._peer.me()
        answer: asyncio.Future[RawReply | ShardKVError] = self._loop.create_future()
        self.pending[0] = _into(answer)
        self._put(Request(0, Op.HELLO, 0, None, None, None, raw(me.hello())))
        reply = await answer
        if isinstance(reply, ShardKVError):
            raise UnavailableError(f"{self._peer.label} closed the connection during the hello.")
        if reply.status != OK:
            raise reply_error(reply.payload)
        hello: Hello = decode_hello(reply.payload)
        check_hello(me, hello, expected=self._peer.expected)
        return hello

    def send(
        self,
        op: Op,
        payload: msgspec.Raw,
        on_reply: OnReply,
        ctx: int,
        shard: int | None,
        epoch: int | None,
        deadline: float | None,
    ) -> int:
        request_id = next(self._peer.ids)
        self.pending[request_id] = on_reply
        left_ms = None if deadline is None else max(1, int((deadline - self._loop.time()) * 1000))
        self._put(Request(request_id, op, ctx, shard, epoch, left_ms, payload))
        return request_id

    def send_run(self, requests: Sequence[Request], taker: RunTaker) -> int:
        for request, request_id in zip(requests, self._peer.ids, strict=False):
            request.id = request_id
        first = requests[0].id
        self.pending.update(dict.fromkeys(range(first, first + len(requests)), taker))
        self._due()
        self._outbox += requests
        return first

    def silent_looks(self) -> int:
        """To be asked at regular times: how often in a row there was neither a word from a peer that owes an answer
        nor progress in sending to it. Past LOOKS_PER_SILENCE it is given up.

        Counting looks, not time: when this process itself was stopped, what came meanwhile is not read yet.
        """
        unsent_bytes = self._transport.get_write_buffer_size() if self._transport is not None else 0
        silent = self._owes and unsent_bytes >= self._unsent_bytes
        self._unsent_bytes = unsent_bytes
        self._silent_looks = self._silent_looks + 1 if silent else 0
        if self._silent_looks > LOOKS_PER_SILENCE:
            self._broke_off(UnavailableError("it has not said a word for too long"))
        return self._silent_looks

    def _put(self, request: Request) -> None:
        self._due()
        self._outbox.append(request)

    def _due(self) -> None:
        """Something is about to be put into the outbox: it leaves at the end of the loop's turn."""
        self._owes = True
        if not self._outbox:
            self._turn.defer(self._flush)

    def _flush(self) -> None:
        """Send what this turn brought. What a lost connection cannot send stays where `connection_lost` finds it."""
        if self._transport is None or self._transport.is_closing() or not self._outbox:
            return
        requests, self._outbox = self._outbox, []
        bytes_max = self._peer.limits.frame_bytes_max
        frames = encode_frames(self._peer.clock.tick(wall_ms()), requests, bytes_max)
        if max(map(len, frames)) > bytes_max + HEADER_BYTES:
            frames = [frame for request in requests for frame in self._fitting(request, bytes_max)]
        self._transport.write(frames[0] if len(frames) == 1 else b"".join(frames))

    def _fitting(self, request: Request, bytes_max: int) -> list[bytes]:
        """The frame of one request; none when no frame holds it: the peer would end the connection for it."""
        frames = encode_frames(self._peer.clock.tick(wall_ms()), [request], bytes_max)
        if len(frames[0]) <= bytes_max + HEADER_BYTES:
            return frames
        on_reply = self.pending.pop(request.id, None)
        if on_reply is not None:
            message = f"The request is {len(frames[0])} bytes long; a frame holds {bytes_max}."
            _tell(on_reply, request.id, BatchTooLarge(message, hint="Ask for less at once."))
        return []

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=self._peer.limits.output_bytes_max // 4)
        set_socket_options(transport)

    def pause_writing(self) -> None:
        self.writable = False

    def resume_writing(self) -> None:
        self.writable = True
        self._peer.on_room()

    def data_received(self, data: bytes) -> None:
        at_once = self._turn.enter()
        try:
            for body in self._decoder.feed(data):
                clock, replies = decode_replies(body)
                self._peer.clock.observe(clock, wall_ms())
                self._hand_out(replies)
        except RemoteProtocolError as error:
            self._broke_off(error)
        self._silent_looks = 0
        self._owes = bool(self.pending)
        if at_once:
            self._turn.leave()

    def _hand_out(self, replies: list[RawReply]) -> None:
        """Give every reply to who waits for it; those to one run all at once. Raises RemoteProtocolError."""
        pop, takers = self.pending.pop, []
        farewell: RawReply | None = None
        for reply in replies:
            waiting = pop(reply.id, None)
            if waiting is None:
                farewell = reply if reply.id == 0 else farewell
            elif callable(waiting):
                waiting(reply)
            else:
                if not waiting.came:
                    takers.append(waiting)
                waiting.came.append(reply)
        for taker in takers:
            came, taker.came = taker.came, []
            taker.take(came)
        if farewell is not None:
            told = reply_error(farewell.payload).message
            raise RemoteProtocolError(f"The peer closed the connection: {told}")

    def _broke_off(self, error: ShardKVError) -> None:
        self.problem = error
        log.warning("connection_broken_off peer=%r reason=%r", self._peer.label, error.message)
        self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self.closed.set()
        why = self.problem.message.rstrip(".") if self.problem else "it was closed"
        self._peer.lost(self, why)
        pending, self.pending = self.pending, {}
        unsent = {request.id for request in self._outbox}
        label = self._peer.label
        for request_id, on_reply in pending.items():
            if request_id in unsent:
                error: ShardKVError = UnavailableError(
                    f"The connection to {label} broke before the request was sent: {why}."
                )
            else:
                error = OutcomeUnknown(f"The connection to {label} broke before the answer came: {why}.")
            _tell(on_reply, request_id, error)


def _tell(waiting: OnReply | RunTaker, request_id: int, error: ShardKVError) -> None:
    if callable(waiting):
        waiting(error)
    else:
        waiting.lost(request_id, error)


def _into(answer: asyncio.Future[RawReply | ShardKVError]) -> OnReply:
    def deliver(reply: RawReply | ShardKVError) -> None:
        if not answer.done():
            answer.set_result(reply)

    return deliver


def _nothing() -> None:
    """No one wants to know."""


def _ignore(reply: RawReply | ShardKVError) -> None:
    """That it came is all there is to it."""
