"""One blocking connection to a router or node: requests out, replies matched by id back.

Invariants: used by one thread at a time; after anything went wrong `usable` is False and it must be closed, so a late
reply can never answer another request. An outcome says truthfully whether its request may have arrived: a frame that
was not handed to the kernel whole was not received.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Sequence
from itertools import accumulate

import msgspec

from shardkv.client.answers import DecodeAnswer, Replies
from shardkv.client.calls import Lost, Outcome, Payload
from shardkv.client.inbox import Inbox
from shardkv.errors import RouterUnavailable, ShardKVError
from shardkv.hybrid_clock import HybridClock
from shardkv.limits import Limits
from shardkv.transport.address import Address, format_address
from shardkv.wire.frame import encode_frame
from shardkv.wire.hello import Identity, check_hello
from shardkv.wire.messages import (
    OK,
    UNDECODABLE,
    Context,
    Op,
    RawReply,
    decode_hello,
    decode_replies,
    encode,
    raw,
    reply_error,
)

CTX = 1
"""The number under which a client's keyspace is registered on each of its connections."""
ANSWER_MARGIN_S = 0.1
"""The server is told a deadline earlier than ours by this (a third of what is left at most), so that the error with
which it gives up, which knows more than ours, is still in time."""


def told_deadline(deadline: float, now: float) -> float:
    """The deadline that the other side is told."""
    left_s = deadline - now
    return deadline - (ANSWER_MARGIN_S if left_s > 3 * ANSWER_MARGIN_S else left_s / 3)


Ask = tuple[Op, Payload, int | None, int | None]
"""An operation, its payload, and towards a node, unless the payload does, the shard and its epoch."""


class Connection:
    """Connected, and its keyspace registered, once `open` returned."""

    def __init__(self, sock: socket.socket, label: str, limits: Limits) -> None:
        self.label = label
        self.usable = True
        self._sock = sock
        sock.settimeout(0)  # any other timeout makes three system calls of each call
        self._limits = limits
        self._inbox = Inbox(limits.frame_bytes_max)
        self._clock = HybridClock()
        self._next_id = 1
        self._problem: ShardKVError | None = None
        self._first, self._sent = 0, 0
        self._ends: list[int] = []
        self._failure: OSError | ShardKVError | None = None
        """Of what is under way: the first id, how much was sent, where each request ends, what went wrong."""
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        self._readable = poll.poll

    @classmethod
    def open(
        cls,
        address: Address,
        *,
        me: Identity,
        keyspace: str,
        limits: Limits,
        deadline: float,
        expected: Identity | None = None,
    ) -> Connection:
        """Connect and introduce ourselves before `deadline` (monotonic). Raises OSError, ShardKVError.

        `expected`: the node that must answer there; otherwise a router.
        """
        sock = _connected(address, deadline)
        who = f"{expected.role} {expected.name}" if expected is not None else "router"
        connection = cls(sock, f"{who} at {format_address(*address)}", limits)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            hello = decode_hello(connection._introduce(Op.HELLO, raw(me.hello()), deadline))
            check_hello(me, hello, expected=expected)
            connection._introduce(Op.CONTEXT, raw(Context(CTX, keyspace, None, None)), deadline)
        except BaseException:
            connection.close()
            raise
        return connection

    def close(self) -> None:
        self.usable = False
        self._sock.close()

    @property
    def closed(self) -> bool:
        return self._sock.fileno() < 0

    def quiet(self) -> bool:
        """Whether nothing unexpected came while it lay idle: bytes now can only be an error or the end."""
        try:
            return self.usable and not self._readable(0)
        except OSError:
            return False

    def ask(
        self,
        op: Op,
        payload: Payload,
        deadline: float,
        shard: int | None = None,
        epoch: int | None = None,
        decode_answer: DecodeAnswer | None = None,
    ) -> Outcome:
        """As `exchange`, for one request; to a node it names a shard and its epoch."""
        request_id = self._next_id
        self._next_id = request_id + 1
        try:
            frame = self._frame(request_id, op, payload, shard, epoch, deadline)
            sent = self._send(frame, deadline)
            while sent < len(frame):
                sent += self._send(memoryview(frame)[sent:], deadline)
        except OSError as error:
            self.usable = False
            return self._without_answer(error, handed_over=False)
        except BaseException:
            self.usable = False
            raise
        return self.finish(request_id, deadline, decode_answer)

    def begin(self, op: Op, payload: Payload, deadline: float) -> int | None:
        """Send a small request, and do not wait for the answer: `finish` does. None: it could not be sent, and the
        connection is not usable any more."""
        request_id = self._next_id
        self._next_id = request_id + 1
        frame = self._frame(request_id, op, payload, None, None, deadline)
        try:
            if self._sock.send(frame) == len(frame):
                return request_id
        except OSError:
            pass
        self.usable = False
        return None

    def finish(self, request_id: int, deadline: float, decode_answer: DecodeAnswer | None = None) -> Outcome:
        """The outcome of the request that was sent last."""
        outcomes: dict[int, Outcome] = {}
        try:
            while not outcomes:
                self._receive(request_id, outcomes, deadline, decode_answer)
        except (OSError, ShardKVError) as error:
            self.usable = False
            return outcomes.get(request_id) or self._without_answer(error, handed_over=True)
        except BaseException:
            self.usable = False
            raise
        return outcomes[request_id]

    def exchange(self, requests: Sequence[tuple[Op, Payload]], deadline: float) -> list[Outcome]:
        """Send requests, each in a frame of its own, and wait for all answers: one outcome each, in order.

        What the peer did or did not do is in the outcomes; nothing is raised for it.
        """
        self.send([(op, payload, None, None) for op, payload in requests], deadline)
        return self.receive(deadline)

    def send(self, requests: Sequence[Ask], deadline: float) -> None:
        """The first half of an exchange. Until `receive` has returned all answers the connection is not `usable`."""
        self.usable = False
        self._first, self._ends, self._sent, self._failure = self._next_id, [0] * len(requests), 0, None
        self._next_id += len(requests)
        try:
            frames = [self._frame(self._first + index, *request, deadline) for index, request in enumerate(requests)]
            stream = memoryview(b"".join(frames))
            self._ends = list(accumulate(map(len, frames)))
            while self._sent < len(stream):
                self._sent += self._send(stream[self._sent :], deadline)
        except (OSError, ShardKVError) as error:
            self._failure = error

    def receive(self, deadline: float) -> list[Outcome]:
        """The second half: the outcomes of what was sent last."""
        first, count = self._first, len(self._ends)
        outcomes: dict[int, Outcome] = {}
        try:
            if self._failure is not None:
                raise self._failure
            while len(outcomes) < count:
                self._receive(first, outcomes, deadline)
        except (OSError, ShardKVError) as error:
            return [
                outcomes.get(first + index) or self._without_answer(error, handed_over=0 < end <= self._sent)
                for index, end in enumerate(self._ends)
            ]
        self.usable = True
        return [outcomes[first + index] for index in range(count)]

    def _frame(
        self, request_id: int, op: Op, payload: Payload, shard: int | None, epoch: int | None, deadline: float
    ) -> bytes:
        """One request, as `Request` describes it, encoded in one go."""
        now = time.monotonic()
        left_ms = max(1, int((told_deadline(deadline, now) - now) * 1000))
        request = (request_id, op, CTX, shard, epoch, left_ms, payload)
        return encode_frame(encode((self._clock.tick(_wall_ms()), (request,))))

    def _send(self, data: bytes | memoryview, deadline: float) -> int:
        """How many of these bytes the kernel took, which are none when it has to be asked again."""
        if time.monotonic() >= deadline:
            raise TimeoutError("timed out")
        try:
            return self._sock.send(data)
        except BlockingIOError:
            room = select.poll()
            room.register(self._sock, select.POLLOUT)
            left_ms = (deadline - time.monotonic()) * 1000
            if left_ms <= 0 or not room.poll(left_ms):
                raise TimeoutError("timed out") from None
            return 0

    def _receive(
        self,
        first: int,
        outcomes: dict[int, Outcome],
        deadline: float,
        decode_answer: DecodeAnswer | None = None,
    ) -> None:
        left_ms = (deadline - time.monotonic()) * 1000
        if left_ms <= 0 or not self._readable(left_ms):
            raise TimeoutError("timed out")
        count = self._sock.recv_into(self._inbox.room())
        if not count:
            raise ConnectionResetError("it was closed")
        for body in self._inbox.take(count):
            clock, replies = self._decoded(body, decode_answer)
            self._clock.observe(clock, _wall_ms())
            for reply in replies:
                if reply.id >= first:
                    outcomes[reply.id] = reply
                elif reply.id == 0 and reply.status != OK:
                    self._problem = reply_error(reply.payload)
                    raise self._problem

    def _decoded(self, body: memoryview, decode_answer: DecodeAnswer | None) -> Replies:
        if decode_answer is not None:
            try:
                return decode_answer(body)
            except UNDECODABLE:
                pass
        return decode_replies(bytes(body))

    def _without_answer(self, error: OSError | ShardKVError, *, handed_over: bool) -> Outcome:
        if isinstance(error, TimeoutError):
            return Lost(f"The {self.label} did not answer in time.", sent=handed_over, timed_out=True)
        if isinstance(error, ShardKVError):
            return Lost(f"The {self.label} broke off the connection: {error.message}", sent=handed_over)
        return Lost(f"The connection to the {self.label} broke: {_reason(error)}.", sent=handed_over)

    def _introduce(self, op: Op, payload: msgspec.Raw, deadline: float) -> msgspec.Raw:
        """One request of the handshake. Raises RouterUnavailable, or what the peer reported."""
        outcome = self.ask(op, payload, deadline)
        if isinstance(outcome, RawReply):
            if outcome.status == OK:
                return outcome.payload
            raise reply_error(outcome.payload)
        if self._problem is not None:
            raise self._problem
        raise RouterUnavailable(outcome.reason if isinstance(outcome, Lost) else str(outcome))


def _connected(address: Address, deadline: float) -> socket.socket:
    """A socket to the first of a host's addresses that answers; each may take an equal share of what is left."""
    found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
    failure = OSError(f"{address[0]} has no address")
    for number, (family, kind, protocol, _, where) in enumerate(found):
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(left / (len(found) - number))
            sock.connect(where)
        except OSError as error:
            sock.close()
            failure = error
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise failure


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000
