"""A node's share of a read or write over several shards: one request, and one answer, for all of its shards.

Invariants: each shard is read or written as if it had been asked for alone, atomically, and only at the epoch named;
what one shard refuses is its problem, told beside what the others did. The writes of a share are queued together, so
that one group takes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from shardkv.errors import BatchTooLarge, InvalidArgument, OutcomeUnknown, ShardKVError
from shardkv.limits import Limits
from shardkv.transport.server import Connection
from shardkv.wire.checks import check_read, check_write
from shardkv.wire.messages import (
    Kind,
    PartialReadReply,
    ReadReply,
    Request,
    ShardProblem,
    SharedRead,
    SharedWrite,
    WriteReply,
    WriteResult,
    decode_shared_read,
    decode_shared_write,
    problem_of,
)
from shardkv.wire.messages import Write as WriteRequest
from shardkv_node.committer import Committer
from shardkv_node.engine.puts import Puts
from shardkv_node.engine.write import Write
from shardkv_node.outcome import told_error, told_results
from shardkv_node.ownership import Ownership


class ReadOf(Protocol):
    """Reads keys of a tablet; the reply, and the bytes of its values. Raises ShardKVError."""

    def __call__(self, tablet: int, keys: Sequence[bytes], *, want_versions: bool) -> tuple[ReadReply, int]: ...


_Spans = list[tuple[int, int, int, int]]
"""(shard, epoch, index of its first key, index after its last)"""

WriteOf = Callable[[int, WriteRequest, Callable[[Write], None]], Write]
"""A checked write to a tablet, as the store takes it, with what is to be called when it has ended."""


class Shares:
    """Answers READ and WRITE requests that name no shard, for a node's service."""

    def __init__(
        self, ownership: Ownership, committer: Committer, limits: Limits, *, read: ReadOf, write: WriteOf
    ) -> None:
        self._ownership = ownership
        self._committer = committer
        self._limits = limits
        self._read_of = read
        self._write_of = write

    def read(self, connection: Connection, request: Request) -> None:
        asked: SharedRead = decode_shared_read(request.payload)
        self._check_named(asked.shards)
        self._ownership.require_settled(asked.shards)
        check_read(asked.keys, self._limits)
        reply = PartialReadReply([], [] if asked.want_versions else None, [], [])
        size_bytes = 0
        for shard, epoch, first, end in _spans(asked.shards, len(asked.keys)):
            try:
                tablet = self._ownership.tablet_of(shard, epoch)
                self._ownership.count_more(shard, end - first - 1)
                found, found_bytes = self._read_of(tablet, asked.keys[first:end], want_versions=asked.want_versions)
            except BatchTooLarge:
                raise
            except ShardKVError as error:
                found, found_bytes = ReadReply([None] * (end - first), [0] * (end - first)), 0
                reply.missing += range(first, end)
                reply.problems.append(problem_of(shard, error))
            reply.values += found.values
            if reply.versions is not None:
                reply.versions += found.versions or ()
            size_bytes += found_bytes
            self._check_fits(end, size_bytes)
        connection.reply(request.id, reply, size_bytes=size_bytes)

    def _check_named(self, shards: Sequence[tuple[int, int, int]]) -> None:
        """Raises WrongShard for a request that names no shard anywhere."""
        if not shards:
            self._ownership.tablet_of(None, None)

    def _check_fits(self, count: int, size_bytes: int) -> None:
        if size_bytes > self._limits.frame_bytes_max:
            raise BatchTooLarge(
                f"The first {count} values already hold {size_bytes} bytes; "
                f"a frame holds {self._limits.frame_bytes_max}.",
                hint="Ask for fewer keys at once.",
            )

    def write(self, connection: Connection, request: Request, deadline: float | None) -> None:
        asked: SharedWrite = decode_shared_write(request.payload)
        self._check_named(asked.shards)
        self._ownership.require_settled(asked.shards)
        check_write(asked, self._limits)
        if asked.conditions is not None or asked.kinds == Kind.INCR:
            raise InvalidArgument("A write with conditions, or an incr, is of one shard, and names it.")
        spans = _spans(asked.shards, len(asked.keys))
        plain = asked.kinds == Kind.PUT and asked.ttl_ms is None and not asked.want_existed
        if not (plain and self._put_all(connection, request.id, asked, spans, deadline)):
            self._write_each(connection, request.id, asked, spans, deadline)

    def _put_all(
        self, connection: Connection, request_id: int, asked: SharedWrite, spans: _Spans, deadline: float | None
    ) -> bool:
        """Submit puts to all the shards in one go; False: some shard refuses, and each is to be asked for itself."""
        keys, values = asked.keys, asked.values
        try:
            tablets = [self._ownership.tablet_of(shard, epoch) for shard, epoch, _, _ in spans]
            puts = Puts(
                tablets,
                [keys[first:end] for _, _, first, end in spans],
                [values[first:end] for _, _, first, end in spans],
                apart=partial(self._apart, connection, request_id, asked, spans, tablets),
                done=partial(_answer_puts, connection, request_id, len(keys)),
                tokens=None if asked.token is None else [(asked.token.lane, asked.token.number)] * len(spans),
            )
            self._committer.submit_puts(puts, [deadline] * len(spans))
        except ShardKVError:
            return False
        return True

    def _apart(
        self, connection: Connection, request_id: int, asked: SharedWrite, spans: _Spans, tablets: Sequence[int]
    ) -> list[Write]:
        outcome = _Outcome(connection, request_id, len(asked.keys), len(spans))
        return [
            self._write_of(tablet, _part(asked, first, end), partial(outcome.ended, shard, first))
            for tablet, (shard, _, first, end) in zip(tablets, spans, strict=True)
        ]

    def _write_each(
        self, connection: Connection, request_id: int, asked: SharedWrite, spans: _Spans, deadline: float | None
    ) -> None:
        outcome = _Outcome(connection, request_id, len(asked.keys), len(spans))
        for shard, epoch, first, end in spans:
            try:
                tablet = self._ownership.tablet_of(shard, epoch)
                done = partial(outcome.ended, shard, first)
                self._committer.submit(self._write_of(tablet, _part(asked, first, end), done), deadline)
            except ShardKVError as error:
                outcome.failed(shard, first, end, error)


class _Outcome:
    """Gathers what became of the shards of one write, and tells it once all have ended."""

    __slots__ = ("_connection", "_left", "_problems", "_request_id", "_results")

    def __init__(self, connection: Connection, request_id: int, operations: int, shards: int) -> None:
        self._connection = connection
        self._request_id = request_id
        self._results = bytearray(operations)
        self._problems: list[ShardProblem] = []
        self._left = shards

    def ended(self, shard: int, first: int, write: Write) -> None:
        end = first + len(write.keys)
        if write.error is not None:
            self.failed(shard, first, end, told_error(write.error))
            return
        self._results[first:end] = told_results(write)
        self._ended_one()

    def failed(self, shard: int, first: int, end: int, error: ShardKVError) -> None:
        fate = WriteResult.UNKNOWN if isinstance(error, OutcomeUnknown) else WriteResult.REFUSED
        self._results[first:end] = bytes((fate,)) * (end - first)
        self._problems.append(problem_of(shard, error))
        self._ended_one()

    def _ended_one(self) -> None:
        self._left -= 1
        if not self._left:
            self._connection.reply(self._request_id, WriteReply(bytes(self._results), None, self._problems))


def _answer_puts(connection: Connection, request_id: int, operations: int, puts: Puts) -> None:
    """Tell that all of them were applied."""
    connection.reply(request_id, WriteReply(bytes(operations), None, []))


def _part(asked: SharedWrite, first: int, end: int) -> WriteRequest:
    """The write to one of the shards."""
    return WriteRequest(
        token=asked.token,
        conditions=None,
        kinds=asked.kinds if isinstance(asked.kinds, int) else asked.kinds[first:end],
        keys=asked.keys[first:end],
        values=asked.values[first:end],
        want_existed=asked.want_existed,
        ttl_ms=asked.ttl_ms,
    )


def _spans(shards: Sequence[tuple[int, int, int]], count: int) -> _Spans:
    """Raises InvalidArgument."""
    spans: _Spans = []
    at = 0
    for shard, epoch, length in shards:
        spans.append((shard, epoch, at, at + length))
        at += length
    named = {shard for shard, _, _ in shards}
    if at != count or len(named) != len(shards) or min(length for _, _, length in shards) < 1:
        raise InvalidArgument("A request to a node names its shard, or the shards of all its keys, each once.")
    return spans
