"""A TCP server of the wire protocol: hello, limits, batches in, batches out, drain. What requests mean is the
service's business.

Invariants: nothing but a hello is listened to before the hello was accepted; a peer that breaks a rule gets one
error and is closed; reading stops while a connection has too much unanswered or unread, so memory stays bounded;
no connection is worked for longer than TURN_S before the others get their turn; replies of one loop turn leave in one
write.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice, repeat
from time import monotonic
from typing import Any, Protocol, cast

from shardkv.errors import (
    BatchTooLarge,
    DeadlineExceeded,
    Draining,
    LocalProtocolError,
    OutcomeUnknown,
    Overloaded,
    ProtocolError,
    RemoteProtocolError,
    ShardKVError,
    UnknownOperation,
)
from shardkv.hybrid_clock import HybridClock
from shardkv.limits import DEFAULT_LIMITS, Limits
from shardkv.transport.admission import LOOK_INTERVAL_S, LOOK_SHARE, Admission, Load
from shardkv.transport.farewell import LINGERING_MAX, Farewell
from shardkv.transport.lone import KEYED, READ, WRITE, Heard, deadline_in
from shardkv.transport.ordering import KeyOrder
from shardkv.transport.outbox import BATCH_BYTES, encode_frames, set_socket_options
from shardkv.transport.pace import Pace
from shardkv.transport.turn import turn_of
from shardkv.wire.frame import HEADER_BYTES, FrameDecoder, encode_frame
from shardkv.wire.hello import Identity, check_hello
from shardkv.wire.messages import (
    OK,
    Context,
    Hello,
    Op,
    RawReply,
    Reply,
    Request,
    decode_context,
    decode_hello,
    decode_requests,
    encode_batch,
    error_reply,
    has_one_request,
)

log = logging.getLogger(__name__)

SWEEP_INTERVAL_S = 1.0
TURN_S = 0.0005
"""How long one connection's requests are worked on before the others get their turn."""
STRETCH = 8
QUICK_S = TURN_S / 2
"""So many requests are begun between two looks at the clock, while that takes less than QUICK_S; else only one."""
TOGETHER_MAX = 64
"""Most reads that are answered, or writes that are begun, together."""
TOGETHER_BYTES = 256 * 1024
"""About the most bytes of writes that are begun together: they are copied for it."""
SINGLY = 64
"""After requests that could not be taken together, so many are handed over one by one before that is tried again."""
CONTEXTS_MAX = 1024
"""Most contexts one connection may register."""
CLIENT_SHARE = 4
"""A client may have so many times fewer bytes of replies to come than a router: what it asked for comes in line before
what others ask of the same node."""
OPEN_AT_FIRST = 64
"""How many requests may be open before the connection's first replies have shown how large its replies are."""


class Service(Protocol):
    """What a server serves. Methods run on the event loop and must not block."""

    def on_request(self, connection: Connection, request: Request, deadline: float | None) -> None:
        """Answer now or later with `connection.reply` or `connection.fail`; a raised ShardKVError is a `fail`.

        `deadline` is an absolute `loop.time()`.
        """

    def on_batch_end(self, connection: Connection) -> None:
        """All requests that arrived together were handed over."""

    def on_closed(self, connection: Connection) -> None:
        """The connection is gone; replies to it go nowhere."""


ReadTogether = Callable[[Sequence[Request], float], tuple[Sequence[Reply], int]]
"""Answers reads in one go: the first ones, as many as it can and, with a look at the
clock now and then, until about this `time.monotonic()`; and how large the replies are. What it does not answer is
handed over as any request, so none of its replies is an error. Must not block."""

WriteTogether = Callable[[Sequence["Connection"], Sequence[Request], Sequence[float | None]], bool]
"""Begins writes, each with who asks for it and its deadline, in one go; each is answered later, never before this
returns. False: it began none of them, and they are handed over as any request. Must not block."""


BeginTogether = Callable[[Sequence["Connection"], Sequence[Request], Sequence[float | None]], Callable[[], None] | None]
"""Looks at requests, each with who asks for it and its deadline, and says how to begin them all in one go: by calling
what it returns. None: they are to be handed over as any request. They are open when they are begun, and their ids may
be changed then: each connection knows its own by the id it came with."""


class Server:
    """Listens on any number of addresses for one service.

    `read_together`, `write_together`: quicker ways for many reads or writes at once, with the replies that the service
    would give.
    `begin_together`: the same for all these, where each is answered later; it takes the place of the other two.
    """

    def __init__(
        self,
        service: Service,
        *,
        me: Callable[[], Identity],
        limits: Limits = DEFAULT_LIMITS,
        clock: HybridClock | None = None,
        read_together: ReadTogether | None = None,
        write_together: WriteTogether | None = None,
        begin_together: BeginTogether | None = None,
    ) -> None:
        self.service = service
        self.read_together = read_together
        self.write_together = write_together
        self.begin_together = begin_together
        self.me = me
        self.limits = limits
        self.clock = clock or HybridClock()
        self.connections: set[Connection] = set()
        self.draining = False
        self.admission = Admission(limits)
        self.answered = 0
        """Replies since the last look at the load."""
        self.look_due = False
        self._look_pause_s = LOOK_INTERVAL_S
        self.finishing: Connection | None = None
        """The one connection over its share that is read and served on while the process is crowded."""
        self.lingering: set[Farewell] = set()
        self.heard = Heard(self)
        self._listeners: list[asyncio.Server] = []
        self._sweeper: asyncio.TimerHandle | None = None

    async def listen(self, host: str, port: int, *, reuse_port: bool = False) -> int:
        """Start serving on host:port (0: any free one) and return the port. Raises OSError."""
        loop = asyncio.get_running_loop()
        listener = await loop.create_server(
            lambda: Connection(self), host, port, reuse_address=True, reuse_port=reuse_port or None, backlog=1024
        )
        self._listeners.append(listener)
        if self._sweeper is None:
            self._sweep()
        bound: int = listener.sockets[0].getsockname()[1]
        return bound

    async def drain(self, *, grace_s: float) -> None:
        """Take no more connections, refuse new requests, wait for those in flight, then close everything."""
        self.draining = True
        for listener in self._listeners:
            listener.close()
        loop = asyncio.get_running_loop()
        end = loop.time() + grace_s
        while any(connection.in_flight for connection in self.connections) and loop.time() < end:
            await asyncio.sleep(0.01)
        for connection in list(self.connections):
            connection.close()
        for refused in list(self.lingering):
            refused.abort()
        if self._sweeper is not None:
            self._sweeper.cancel()
        await asyncio.sleep(0)

    def tick(self) -> int:
        """A new reading of the clock, for a frame that leaves."""
        return self.clock.tick(wall_ms())

    def observe(self, clock: int) -> None:
        """Take note of the clock of a frame that came."""
        self.clock.observe(clock, wall_ms())

    def watch_load(self) -> None:
        """Something was heard: see soon what all connections cost together."""
        self.look_due = True
        asyncio.get_running_loop().call_later(self._look_pause_s, self._look)

    def _look(self) -> None:
        self.look_due = False
        began = monotonic()
        connections = list(self.connections)
        loads = [connection.load() for connection in connections]
        was_crowded = self.admission.crowded
        self.admission.look(loads, self.answered, began)
        self.answered = 0
        self._look_pause_s = max(LOOK_INTERVAL_S, (monotonic() - began) / LOOK_SHARE)
        if self.admission.unread_too_much:
            most = max(range(len(loads)), key=lambda number: loads[number].unread)
            connections[most].cut_off("slow_reader_closed")
        if self.admission.crowded:
            self.watch_load()
            self._let_one_finish()
        elif was_crowded:
            for connection in connections:
                connection.make_room()

    def _let_one_finish(self) -> None:
        """When unfinished frames alone crowd the process, all would wait for each other."""
        if self.finishing not in self.connections or not self.finishing.unfinished_bytes:
            unfinished = [connection for connection in self.connections if connection.unfinished_bytes]
            self.finishing = max(unfinished, key=lambda connection: connection.unfinished_bytes, default=None)
            if self.finishing is not None:
                self.finishing.make_room()

    def _sweep(self) -> None:
        """End what has taken too long: silent connections, and requests past their deadline."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._sweeper = loop.call_later(SWEEP_INTERVAL_S, self._sweep)
        if not self.look_due:
            self._look()
        for connection in list(self.connections):
            connection.sweep(now)


class Connection(asyncio.Protocol):
    """One accepted connection. `peer` is None until its hello was accepted.

    A request is waiting (decoded, not handed over), open (handed over, not answered), late (given up at its deadline,
    the service still at it) or answered. The service's answer to a late one goes nowhere; only then is its id free.
    Requests wait while as many are open, or as many bytes unread by the peer, as the limits allow. An open request
    counts with the bytes it came in or those of a recent reply, whichever is more: a few bytes can ask for megabytes.
    Frames are decoded one by one, when the requests of the one before were handed over.
    """

    __slots__ = (
        "_began_at",
        "_bodies",
        "_contexts",
        "_decoder",
        "_flush_due",
        "_frame_bytes",
        "_frames_taken",
        "_heard_at",
        "_late",
        "_limits",
        "_loop",
        "_open",
        "_open_bytes",
        "_open_reads",
        "_order",
        "_pace",
        "_reading",
        "_refusal",
        "_replies",
        "_reply_bytes",
        "_reply_bytes_max",
        "_reply_bytes_usual",
        "_requests_max",
        "_sent_bytes",
        "_server",
        "_singly",
        "_stretch",
        "_transport",
        "_turn",
        "_waiting",
        "_writable",
        "peer",
    )
    """Past 29 attributes CPython gives every instance a dict of its own, and each access takes longer."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._limits = limits = server.limits
        self._decoder = FrameDecoder(limits.hello_bytes_max)
        self._loop = asyncio.get_running_loop()
        self._turn = turn_of(self._loop)
        self._transport: asyncio.Transport | None = None
        self._bodies: deque[bytes] = deque()
        """Frames that are not decoded yet."""
        self._waiting: deque[tuple[Request, float | None, int]] = deque()
        self._frame_bytes = 0
        """Size of the frame the waiting requests came in."""
        self._open: dict[int, tuple[int, float | None, int]] = {}
        self._open_bytes = 0
        self._open_reads = 0
        """Open requests whose replies may be large: all but writes."""
        self._order: KeyOrder | None = None
        self._refusal: Overloaded | None = None
        """What requests are told that come now; None: they are begun."""
        self._late: set[int] = set()
        self._replies: list[Reply | RawReply] = []
        self._reply_bytes = 0
        self._reply_bytes_usual = limits.bytes_in_flight_max // OPEN_AT_FIRST
        """What one reply is expected to hold: the average of recent ones."""
        self._flush_due = False
        self._reading = True
        self._writable = True
        self._requests_max = limits.requests_in_flight_max
        self._reply_bytes_max = limits.bytes_in_flight_max
        self._stretch = STRETCH
        self._singly = 0
        """So many requests are handed over before reads may be answered together again."""
        self._frames_taken = 0
        self._sent_bytes = 0
        self._pace = Pace(self._loop.time())
        self._contexts: dict[int, Context] = {}
        self._heard_at = self._began_at = self._loop.time()
        self.peer: Hello | None = None

    # What a service uses

    @property
    def in_flight(self) -> int:
        """Requests not answered yet, and replies not sent yet, be it in part."""
        unsent = self._transport is not None and self._transport.get_write_buffer_size() > 0
        return len(self._bodies) + len(self._waiting) + len(self._open) + len(self._replies) + unsent

    @property
    def closed(self) -> bool:
        return self._transport is None

    @property
    def server(self) -> Server:
        """Whose connection it is."""
        return self._server

    def context(self, ctx: int) -> Context | None:
        """What the peer registered under this number."""
        return self._contexts.get(ctx)

    def reply(self, request_id: int, payload: Any, *, size_bytes: int = 0) -> None:
        """Answer a request: `payload` is a message, a Raw, or anything msgpack can hold.

        `size_bytes`: about how large it is, when it may be large: large replies are sent at once, so that few of them
        are in memory twice.
        """
        self._answer(Reply(request_id, OK, payload), size_bytes)

    def reply_together(self, replies: Sequence[Reply | RawReply], size_bytes: int = 0) -> None:
        """As `reply` for each of these, which are ready to be sent and have so many bytes together."""
        taken = list(map(self._open.pop, [reply.id for reply in replies], repeat(None)))
        if None in taken:
            self._late.difference_update(reply.id for reply, request in zip(replies, taken, strict=True) if not request)
            replies = [reply for reply, request in zip(replies, taken, strict=True) if request]
        answered = [request for request in taken if request]
        self._open_bytes -= sum([size for size, _, _ in answered])
        self._open_reads -= sum([op != WRITE for _, _, op in answered])
        if self._order is not None:
            for reply in replies:
                self._order.ended(reply.id)
        if replies and self._transport is not None:
            self._put_together(replies, size_bytes)

    def fail(self, request_id: int, error: ShardKVError) -> None:
        """Answer a request with an error."""
        self._answer(error_reply(request_id, error))

    def close(self) -> None:
        """Send what is due and close."""
        if self._transport is not None:
            self._flush()
        if self._transport is not None:
            self._transport.close()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        set_socket_options(transport)
        self._transport.set_write_buffer_limits(high=self._limits.output_bytes_max // 4)
        self._server.connections.add(self)
        if len(self._server.connections) + len(self._server.lingering) > self._limits.connections_max:
            self._refuse(Overloaded(f"This process already has {self._limits.connections_max} connections, its limit."))

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._server.connections.discard(self)
        self._bodies.clear()
        self._waiting.clear()
        self._open.clear()
        self._replies.clear()
        self._server.service.on_closed(self)

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True
        self.work()

    def data_received(self, data: bytes) -> None:
        at_once = self._turn.enter()
        self._heard_at = self._loop.time()
        try:
            self._feed(data)
        except ProtocolError as error:
            self._refuse(error)
        if at_once:
            self._turn.leave()

    def _feed(self, data: bytes) -> None:
        bodies = self._decoder.feed(data)
        if not bodies:
            self._heard_a_part()
            return
        if not self._bodies:
            self._server.heard.add(self)
        self._bodies += bodies

    def _heard_a_part(self) -> None:
        """There is not even one whole frame yet."""
        if not self._server.look_due:
            self._server.watch_load()
        self._adjust_reading()

    # A lone request: the only thing the connection has to do. See lone.py

    def lone_body(self) -> bytes | None:
        """The body of the frame that is all there is to do, if it has one request, and nothing stands in its way."""
        bodies = self._bodies
        if (
            len(bodies) == 1
            and has_one_request(bodies[0])
            and not (self._open or self._waiting or self._replies or self._late)
            and self._writable
            and self._order is None
            and self.peer is not None
            and self._transport is not None
        ):
            return bodies[0]
        return None

    def open_lone(self, request: Request, deadline: float | None) -> None:
        """The request was begun, and will be answered later."""
        size = len(self._bodies.popleft())
        self._frames_taken += 1
        self._open[request.id] = (size, deadline, request.op)
        self._open_bytes += size
        self._open_reads += request.op != WRITE

    def end_lone(self, clock: int, reply: Reply | RawReply) -> bool:
        """Send the reply to what is the only open request, while no other reply waits to be sent. False: it is not."""
        if len(self._open) != 1 or self._replies or self._order is not None:
            return False
        request = self._open.pop(reply.id, None)
        if request is None:
            return False
        self._open_bytes -= request[0]
        self._open_reads -= request[2] != WRITE
        self._send_alone(clock, reply)
        return True

    def answer_lone(self, clock: int, reply: Reply | RawReply) -> None:
        """Send the reply to a request that was never open."""
        self._bodies.clear()
        self._frames_taken += 1
        self._send_alone(clock, reply)

    def _send_alone(self, clock: int, reply: Reply | RawReply) -> None:
        """Send a reply at once, in a frame of its own."""
        body = encode_batch(clock, (reply,))
        size = len(body)
        if self._transport is None or size > self._limits.frame_bytes_max:
            self._put(reply)
            return
        self._reply_bytes_usual += (size - self._reply_bytes_usual) >> 3
        self._sent_bytes += size + HEADER_BYTES
        self._transport.write(encode_frame(body))
        if self._bodies or self._waiting or not self._reading:
            self._work_again()

    # Requests in

    def _take(self, body: bytes) -> None:
        clock, requests = decode_requests(body)
        self._server.observe(clock)
        self._frames_taken += 1
        self._frame_bytes = len(body)
        share = len(body) // (len(requests) or 1)
        if self.peer is None and requests:
            self._take_hello(requests.pop(0))
        if len(requests) == 1:
            self._waiting.append((requests[0], deadline_in(self._heard_at, requests[0].deadline_ms), share))
            return
        deadlines = {
            left_ms: deadline_in(self._heard_at, left_ms) for left_ms in {request.deadline_ms for request in requests}
        }
        self._waiting += [(request, deadlines[request.deadline_ms], share) for request in requests]

    def _take_hello(self, request: Request) -> None:
        if request.op != Op.HELLO:
            raise RemoteProtocolError("The first request of a connection must be a hello.")
        try:
            hello: Hello = decode_hello(request.payload)
        except ShardKVError as error:
            raise RemoteProtocolError(error.message) from error
        me = self._server.me()
        check_hello(me, hello)
        self.peer = hello
        self._decoder.body_bytes_max = self._limits.frame_bytes_max
        if hello.role == "client":
            self._requests_max = min(self._requests_max, self._limits.client_requests_in_flight_max)
            self._reply_bytes_max //= CLIENT_SHARE
        if hello.ordered:
            self._order = KeyOrder()
        self._put(Reply(request.id, OK, me.hello(ordered=hello.ordered)))

    def work(self) -> None:
        """Hand over what came as far as the limits and this connection's turn allow, send what was answered at once,
        and read on accordingly."""
        crowded = self._server.admission.crowded and self is not self._server.finishing
        self._refusal = self._server.admission.refusal_of(self.load()) if crowded else None
        flush_due, self._flush_due = self._flush_due, True
        try:
            turn_over = self._take_turn()
        except RemoteProtocolError as error:
            self._refuse(error)
            return
        self._server.service.on_batch_end(self)
        self._flush()
        self._flush_due = flush_due
        if turn_over:
            self._work_again()
        self._adjust_reading()

    def _take_turn(self) -> bool:
        """Begin requests; True: the time for them is over, and there may be more."""
        now = monotonic()
        ends_at = now + TURN_S
        while self._work_through(self._stretch):
            began, now = now, monotonic()
            self._stretch = STRETCH if now - began < QUICK_S else 1
            if now >= ends_at:
                return True
        return False

    def _work_through(self, count: int) -> bool:
        """Take up to `count` frames and requests; False: no more of them can be begun now."""
        waiting, bodies = self._waiting, self._bodies
        for _ in range(count):
            if len(waiting) > 1 and self._together():
                return True
            if waiting:
                self._singly -= 1
                if self._full(1) or not (self._order is None or self._order.begin(waiting[0][0])):
                    return False
                self._hand_over(*waiting.popleft())
            elif bodies:
                self._take(bodies.popleft())
            else:
                return False
        return True

    def _together(self) -> bool:
        """Answer or begin what is at the head of the line in one go; False: it is not that simple, go on one by one."""
        op, server = self._waiting[0][0].op, self._server
        if self._singly > 0:
            return False
        if server.begin_together is not None:
            return self._begin_together(server.begin_together)
        if self._stretch < STRETCH or self._full(1):
            return False
        if op == READ and server.read_together is not None:
            count, asked = self._read_together(server.read_together)
        elif op == WRITE and server.write_together is not None:
            count, asked = self._write_together(server.write_together)
        else:
            return False
        if count < asked or not asked:
            self._singly = SINGLY
        for _ in range(count):
            self._waiting.popleft()
        return count > 0

    def _read_together(self, read_together: ReadTogether) -> tuple[int, int]:
        """How many of so many reads were answered."""
        reads = [request for request, _, _ in self._simple_run(_READS, TOGETHER_MAX)]
        replies, size_bytes = read_together(reads, monotonic() + QUICK_S) if len(reads) > 1 else ((), 0)
        if replies:
            self._put_together(replies, size_bytes)
        return len(replies), len(reads)

    def _write_together(self, write_together: WriteTogether) -> tuple[int, int]:
        """How many of so many writes were begun: all or none."""
        size = max(1, self._waiting[0][2])
        room = min(self._requests_max - len(self._open), (self._limits.bytes_in_flight_max - self._open_bytes) // size)
        begun = self._simple_run(_WRITES, min(TOGETHER_MAX, TOGETHER_BYTES // size, room))
        writes = [request for request, _, _ in begun]
        askers = [self] * len(writes)
        if len(writes) < 2 or not write_together(askers, writes, [deadline for _, deadline, _ in begun]):
            return 0, len(writes)
        self._open.update({request.id: (size, deadline, WRITE) for request, deadline, size in begun})
        self._open_bytes += sum(size for _, _, size in begun)
        return len(writes), len(writes)

    def _begin_together(self, begin_together: BeginTogether) -> bool:
        """Begin requests at the head of the line in one go; False: it is not that simple, go on one by one."""
        run = self._simple_run(KEYED, min(TOGETHER_MAX, self._room()))
        requests = [request for request, _, _ in run]
        askers = [self] * len(run)
        begin = begin_together(askers, requests, [deadline for _, deadline, _ in run]) if len(run) > 1 else None
        if begin is None:
            self._singly = len(run)
            return False
        ids = [request.id for request in requests]
        self._open.update([(request.id, (size, deadline, request.op)) for request, deadline, size in run])
        self._open_bytes += sum([size for _, _, size in run])
        self._open_reads += sum([request.op != WRITE for request in requests])
        for _ in run:
            self._waiting.popleft()
        try:
            begin()
        except Exception as error:
            log.exception("requests_failed count=%d", len(ids))
            for request_id in ids:
                self.fail(request_id, LocalProtocolError(f"The request failed inside the server: {error!r}."))
        return True

    def _room(self) -> int:
        """How many requests more may be open, at least, if they are as large and answered like those before."""
        open_now = len(self._open)
        size = self._waiting[0][2] or 1
        return min(
            self._requests_max - open_now,
            (self._limits.bytes_in_flight_max - self._open_bytes) // size,
            self._reply_bytes_max // (self._reply_bytes_usual or 1) - open_now,
            self._requests_max if self._writable else 0,
        )

    def _simple_run(self, ops: frozenset[int], most: int) -> list[tuple[Request, float | None, int]]:
        """The requests at the head of the line that nothing stands in the way of, all of one context."""
        if self._order is not None or self._refusal is not None or self._server.draining:
            return []
        now, run, taken = self._loop.time(), [], set[int]()
        ctx = self._waiting[0][0].ctx
        for entry in islice(self._waiting, max(0, most)):
            request, deadline, _ = entry
            request_id = request.id
            if (
                request.op not in ops
                or request.ctx != ctx
                or request_id in taken
                or (deadline is not None and deadline <= now)
            ):
                break
            taken.add(request_id)
            run.append(entry)
        return run if self._open.keys().isdisjoint(taken) and self._late.isdisjoint(taken) else []

    def _work_again(self) -> None:
        """Go on after the others were served."""
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush_and_work)

    def _hand_over(self, request: Request, deadline: float | None, size: int) -> None:
        if request.id in self._open or request.id in self._late:
            raise RemoteProtocolError(f"Request id {request.id} is used twice at once.")
        self._open[request.id] = (size, deadline, request.op)
        self._open_bytes += size
        self._open_reads += request.op != WRITE
        try:
            if self._refusal is not None:
                raise self._refusal
            if deadline is not None and deadline <= self._loop.time():
                raise DeadlineExceeded("The deadline passed before the request was begun.")
            self._dispatch(request, deadline)
        except RemoteProtocolError:
            raise
        except ShardKVError as error:
            self.fail(request.id, error)
        except Exception as error:
            log.exception("request_failed op=%s", request.op)
            self.fail(request.id, LocalProtocolError(f"The request failed inside the server: {error!r}."))

    def _dispatch(self, request: Request, deadline: float | None) -> None:
        if self._server.draining:
            raise Draining("This process is shutting down.", hint="Retry; another one takes over.")
        if request.op not in _OWN_OPS:
            self._server.service.on_request(self, request, deadline)
        elif request.op == Op.PING:
            self.reply(request.id, None)
        elif request.op == Op.CONTEXT:
            self._register(request)
        else:
            raise RemoteProtocolError("A connection says hello once.")

    def _register(self, request: Request) -> None:
        context: Context = decode_context(request.payload)
        if len(self._contexts) >= CONTEXTS_MAX and context.ctx not in self._contexts:
            raise Overloaded(f"A connection may register {CONTEXTS_MAX} contexts.")
        self._contexts[context.ctx] = context
        self.reply(request.id, None)

    # Replies out

    def _answer(self, reply: Reply, size_bytes: int = 0) -> None:
        """Answer a request, if it is still open."""
        request = self._open.pop(reply.id, None)
        if request is None:
            self._late.discard(reply.id)
            return
        self._open_bytes -= request[0]
        self._open_reads -= request[2] != WRITE
        if self._order is not None:
            self._order.ended(reply.id)
        self._put(reply, size_bytes)

    def _put(self, reply: Reply | RawReply, size_bytes: int = 0) -> None:
        if self._transport is None:
            return
        self._replies.append(reply)
        self._reply_bytes += size_bytes
        self._reply_bytes_usual += (size_bytes - self._reply_bytes_usual) >> 3
        self._send_soon()

    def _put_together(self, replies: Sequence[Reply | RawReply], size_bytes: int) -> None:
        """As `_put` for replies that have so many bytes together."""
        self._replies += replies
        usual, count = self._reply_bytes_usual, len(replies)
        self._reply_bytes_usual = (usual * STRETCH + size_bytes) // (STRETCH + count)
        self._reply_bytes += size_bytes
        self._send_soon()

    def _send_soon(self) -> None:
        """Replies leave at the end of the loop's turn, or at once when they are many bytes."""
        if self._reply_bytes > BATCH_BYTES:
            self._flush()
        elif not self._flush_due:
            self._flush_due = True
            self._turn.defer(self._flush_and_work)

    def _flush_and_work(self) -> None:
        self._flush_due = False
        self._flush()
        if self._waiting or self._bodies or not self._reading:
            self.work()

    def _flush(self) -> None:
        self._reply_bytes = 0
        if not self._replies or self._transport is None:
            return
        replies, self._replies = self._replies, []
        frames = self._frames(replies)
        if max(map(len, frames)) > self._limits.frame_bytes_max + HEADER_BYTES:
            frames = [part for reply in replies for part in self._fitting(reply)]
        self._server.answered += len(replies)
        data = frames[0] if len(frames) == 1 else b"".join(frames)
        self._sent_bytes += len(data)
        self._transport.write(data)
        if self._transport.get_write_buffer_size() > self._limits.output_bytes_max + self._limits.frame_bytes_max:
            self.cut_off("slow_reader_closed")

    def _fitting(self, reply: Reply | RawReply) -> list[bytes]:
        """The frame of one reply, or of the error that it does not fit in a frame."""
        frames = self._frames([reply])
        if len(frames[0]) <= self._limits.frame_bytes_max + HEADER_BYTES:
            return frames
        error = BatchTooLarge(
            f"The reply is {len(frames[0])} bytes long; a frame holds {self._limits.frame_bytes_max}.",
            hint="Ask for fewer keys at once.",
        )
        return self._frames([error_reply(reply.id, error)])

    def _frames(self, replies: list[Reply | RawReply]) -> list[bytes]:
        return encode_frames(self._server.tick(), replies, self._limits.frame_bytes_max)

    # Rules

    def _refuse(self, error: ShardKVError) -> None:
        """The one error a peer gets that breaks the rules; then the connection is closed."""
        log.warning("peer_refused code=%s reason=%r", error.code, error.message)
        transport, lingering = self._transport, self._server.lingering
        if transport is None or transport.is_closing():
            return
        self._put(error_reply(0, error))
        self._flush()
        if len(lingering) >= LINGERING_MAX or transport.is_closing():
            transport.close()
            return
        if not self._reading:
            transport.resume_reading()
        Farewell(transport, lingering)
        self.connection_lost(None)

    def _full(self, scale: int) -> bool:
        """Whether the peer has too much unanswered or unread. `scale` 2: more than half of it."""
        return (
            not self._writable
            or len(self._open) * scale >= self._requests_max
            or self._open_bytes * scale >= self._limits.bytes_in_flight_max
            or self._open_reads * self._reply_bytes_usual * scale >= self._reply_bytes_max
        )

    def _adjust_reading(self) -> None:
        """Stop reading a peer that has too much in flight; go on when half of it is done."""
        if self._transport is None or self._transport.is_closing():
            return
        busy = self._waiting or self._bodies or (self._server.admission.crowded and self._hoards())
        if self._reading and (busy or self._full(1)):
            self._reading = False
            self._transport.pause_reading()
        elif not self._reading and not busy and not self._full(2):
            self._reading = True
            self._transport.resume_reading()

    def _hoards(self) -> bool:
        """Whether an unfinished frame of a peer over its share must wait until the process has room for the rest."""
        server = self._server
        return self.unfinished_bytes > 0 and self is not server.finishing and server.admission.over_share(self.load())

    @property
    def unfinished_bytes(self) -> int:
        """How much there is of a frame whose rest has not come."""
        return self._decoder.buffered

    def make_room(self) -> None:
        """The process takes requests again."""
        if not self._reading:
            self._adjust_reading()

    def load(self) -> Load:
        """What this connection costs now."""
        unread = self._transport.get_write_buffer_size() if self._transport is not None else 0
        held = self._open_bytes + self._decoder.buffered + unread
        if self._waiting or self._bodies:
            held += self._frame_bytes + sum(map(len, self._bodies))
        return Load(len(self._open) + len(self._waiting), held, unread)

    def cut_off(self, event: str) -> None:
        """End the connection at once; what the peer has not read is lost."""
        log.warning("%s peer=%s", event, self.peer and self.peer.name)
        if self._transport is not None:
            self._transport.abort()

    def sweep(self, now: float) -> None:
        """Called by the server about once a second: ends what has taken too long."""
        if self._transport is None:
            return
        limits, pace = self._limits, self._pace
        unread = self._transport.get_write_buffer_size()
        unfinished = self._decoder.buffered > 0 and self._reading
        pace.look(now, self._frames_taken, self._sent_bytes - unread, unfinished=unfinished, unread=unread > 0)
        if (now - pace.reads_since) * 1000 > limits.output_timeout_ms:
            self.cut_off("stuck_reader_closed")
        elif self._transport.is_closing():
            return
        elif self.peer is None and (now - self._began_at) * 1000 > limits.hello_timeout_ms:
            self._refuse(RemoteProtocolError(f"No hello came within {limits.hello_timeout_ms} ms."))
        elif (now - pace.sends_since) * 1000 > limits.frame_timeout_ms:
            self._refuse(RemoteProtocolError(f"A frame was not complete within {limits.frame_timeout_ms} ms."))
        elif not self._open and (now - self._heard_at) * 1000 > limits.idle_timeout_ms:
            self.close()
        elif not self._open:
            self._open = {}  # a dict never shrinks, and thousands of connections may have been busy once
        for request_id in [number for number, (_, end, _) in self._open.items() if end is not None and end < now]:
            self._give_up(request_id)

    def _give_up(self, request_id: int) -> None:
        """Answer an open request whose deadline is over; what it still does goes unheard."""
        if self._open[request_id][2] == WRITE:
            self.fail(request_id, OutcomeUnknown("The write was not answered by its deadline; it may yet be applied."))
        else:
            self.fail(request_id, DeadlineExceeded("The request was not answered by its deadline."))
        self._late.add(request_id)


_READS = frozenset((READ,))
_WRITES = frozenset((WRITE,))
_OWN_OPS = frozenset(map(int, (Op.HELLO, Op.PING, Op.CONTEXT)))
"""What a connection answers itself."""


def wall_ms() -> int:
    """Wall time in milliseconds, for hybrid clocks."""
    return time.time_ns() // 1_000_000


def unknown_operation(op: int) -> UnknownOperation:
    """The error for an operation a service does not offer."""
    return UnknownOperation(f"Operation {op} is not known here.", hint="Is the client newer than the server?")
