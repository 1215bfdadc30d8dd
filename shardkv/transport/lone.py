"""Lone requests: those that are all their connection has to do. Most connections have one request under way, and wait.

By itself each would cost a decoder, a look at the service, an encoder and a flush; those that a server hears in one
turn of the loop share all but the write: they are decoded in one go, handed over in one go, and answered without
the books that a line of requests needs.

Invariants: a request is answered as if it had been handed over alone; whatever is more than a lone read or write goes
through `Connection.work`; a connection is heard once in a turn.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING

from shardkv.errors import LocalProtocolError
from shardkv.transport.turn import turn_of
from shardkv.wire.messages import Op, RawReply, Reply, Request, decode_lone_requests

if TYPE_CHECKING:
    from shardkv.transport.server import BeginTogether, Connection, ReadTogether, Server, WriteTogether

log = logging.getLogger(__name__)

READS_S = 0.01
"""Lone reads are answered together for about so long; the others then go one by one."""
LONE_MAX = 1024
"""Most lone requests that are decoded together."""

READ = int(Op.READ)
WRITE = int(Op.WRITE)
"""As plain numbers: comparing with a member of an enum takes 15 times as long."""
KEYED = frozenset((READ, WRITE))
DEADLINE_MS_MAX = 24 * 3600 * 1000
"""A longer deadline counts as this one."""


def deadline_in(now: float, left_ms: int | None) -> float | None:
    """The deadline of a request that has so much time left."""
    return None if left_ms is None else now + min(left_ms, DEADLINE_MS_MAX) / 1000


class Heard:
    """The connections of one server that were heard in this turn."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._heard: list[Connection] = []
        self._loop = asyncio.get_running_loop()
        self._turn = turn_of(self._loop)

    def add(self, connection: Connection) -> None:
        """The connection has at least one whole frame more; it is worked on at the end of the turn."""
        if not self._heard:
            self._turn.defer(self._take)
        self._heard.append(connection)

    def _take(self) -> None:
        heard, self._heard = self._heard, []
        server = self._server
        if not server.look_due:
            server.watch_load()
        for first in range(0, len(heard), LONE_MAX):
            some = heard[first : first + LONE_MAX]
            if len(some) > 1 and not server.draining and not server.admission.crowded:
                some = self._left_after_lone(some)
            for connection in some:
                self._work(connection)

    def _work(self, connection: Connection) -> None:
        try:
            connection.work()
        except Exception:
            log.exception("connection_failed")
            connection.cut_off("connection_failed")

    def _left_after_lone(self, heard: list[Connection]) -> list[Connection]:
        """As `_take_lone`; when that fails, each is worked on by itself, so that a bug costs one connection at most."""
        try:
            return self._take_lone(heard)
        except Exception:
            log.exception("lone_requests_failed count=%d", len(heard))
            return heard

    def _take_lone(self, heard: list[Connection]) -> list[Connection]:
        """Begin the lone reads and writes of these connections; returns the connections that have more to do."""
        lone: list[Connection] = []
        bodies: list[bytes] = []
        others: list[Connection] = []
        for connection in heard:
            body = connection.lone_body()
            if body is None:
                others.append(connection)
            else:
                lone.append(connection)
                bodies.append(body)
        frames = decode_lone_requests(bodies) if len(lone) > 1 else None
        if frames is None:
            return heard
        self._server.observe(max([clock for clock, _ in frames]))
        requests = [request for _, (request,) in frames]
        for op in {request.op for request in requests}:
            of_op = [place for place, request in enumerate(requests) if request.op == op]
            if len(of_op) == len(lone):
                others += self._begin(op, lone, requests)
            else:
                others += self._begin(op, [lone[place] for place in of_op], [requests[place] for place in of_op])
        return others

    def _begin(self, op: int, askers: list[Connection], requests: list[Request]) -> list[Connection]:
        """Answer or begin these requests, all for one operation. Returns those who ask for more than that."""
        server = self._server
        if len(requests) < 2:
            return askers
        if server.begin_together is not None and op in KEYED:
            return self._begin_together(server.begin_together, askers, requests)
        if server.read_together is not None and op == READ:
            return self._read_together(server.read_together, askers, requests)
        if server.write_together is not None and op == WRITE:
            return self._write_together(server.write_together, askers, requests)
        return askers

    def _read_together(
        self, read_together: ReadTogether, askers: list[Connection], reads: list[Request]
    ) -> list[Connection]:
        replies, _ = read_together(reads, monotonic() + READS_S)
        server = self._server
        server.answered += len(replies)
        clock = server.tick()
        for connection, reply in zip(askers, replies, strict=False):
            connection.answer_lone(clock, reply)
        return askers[len(replies) :]

    def _write_together(
        self, write_together: WriteTogether, askers: list[Connection], writes: list[Request]
    ) -> list[Connection]:
        deadlines = self._deadlines(writes)
        if not write_together(askers, writes, deadlines):
            return askers
        _open(askers, writes, deadlines)
        return []

    def _begin_together(
        self, begin_together: BeginTogether, askers: list[Connection], requests: list[Request]
    ) -> list[Connection]:
        deadlines = self._deadlines(requests)
        begin = begin_together(askers, requests, deadlines)
        if begin is None:
            return askers
        _open(askers, requests, deadlines)
        ids = [request.id for request in requests]
        try:
            begin()
        except Exception as error:
            log.exception("requests_failed count=%d", len(ids))
            for connection, request_id in zip(askers, ids, strict=True):
                connection.fail(request_id, LocalProtocolError(f"The request failed inside the server: {error!r}."))
        return []

    def _deadlines(self, requests: list[Request]) -> list[float | None]:
        """When each must be answered; those that came with the same time left have the same deadline."""
        now = self._loop.time()
        ends = {left_ms: deadline_in(now, left_ms) for left_ms in {request.deadline_ms for request in requests}}
        return [ends[request.deadline_ms] for request in requests]


def _open(askers: list[Connection], requests: list[Request], deadlines: list[float | None]) -> None:
    """The requests were begun, and will be answered later."""
    for connection, request, deadline in zip(askers, requests, deadlines, strict=True):
        connection.open_lone(request, deadline)


def reply_to_all(askers: Sequence[Connection], replies: Sequence[Reply | RawReply], size_bytes: int = 0) -> None:
    """Answer requests of any connections, each with who asked for it; together the replies have so many bytes."""
    first = askers[0]
    if first is askers[-1] and len(set(askers)) == 1:
        first.reply_together(replies, size_bytes)
        return
    server = first.server
    clock, size_bytes = server.tick(), size_bytes // len(askers)
    server.answered += len(replies)
    for connection, reply in zip(askers, replies, strict=True):
        if not connection.end_lone(clock, reply):
            server.answered -= 1
            connection.reply_together((reply,), size_bytes)
