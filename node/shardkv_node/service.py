"""What a node answers: reads, writes, scan pages and steps over ranges of the shards it owns, and its status.

Invariant: nothing is read or written before the shard and epoch of the request were checked against what the node
owns now. Replies to reads are formed at once; replies to writes when their group was applied.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from time import monotonic
from typing import Any

from shardkv.errors import BatchTooLarge, InvalidArgument, ShardKVError
from shardkv.limits import Limits
from shardkv.transport.lone import reply_to_all
from shardkv.transport.server import Connection, unknown_operation
from shardkv.wire.checks import check_range, check_read, check_token, check_write
from shardkv.wire.messages import (
    OK,
    Kind,
    Op,
    Page,
    Read,
    ReadReply,
    Reply,
    Request,
    Scan,
    ShardProblem,
    WriteReply,
    decode_puts,
    decode_read,
    decode_reads,
    decode_scan,
    decode_write,
)
from shardkv.wire.messages import Write as WriteRequest
from shardkv_node.committer import Committer
from shardkv_node.early import EarlyRequests
from shardkv_node.engine.columns import PUT, PUT_EXPIRING
from shardkv_node.engine.entries import Token
from shardkv_node.engine.puts import Puts
from shardkv_node.engine.store import Store
from shardkv_node.engine.write import Write
from shardkv_node.outcome import told_error, told_results
from shardkv_node.ownership import Expected, Ownership
from shardkv_node.ranges import RangeSteps
from shardkv_node.shares import Shares

PAGE_BYTES_MAX = 1024 * 1024
"""Upper bound of one page, whatever was asked: it is the time the loop is away for one request."""
READ_STEP_FIRST = 8
READ_STEP_MOST = 1024
"""How many keys are looked up before the bytes found are counted: few while it is unknown how large values are."""

TOGETHER_BYTES = 1024 * 1024
"""Reads are answered together up to about so many bytes of values."""

Handler = Callable[[Connection, Request, float | None], None]

_INCR = int(Kind.INCR)
_NO_PROBLEMS: list[ShardProblem] = []


class NodeService:
    """The `Service` of a node's server. `more` answers operations that are not about the rows of a shard, `report` adds
    to the status, and `on_gone` hears of connections that ended."""

    def __init__(
        self,
        store: Store,
        ownership: Ownership,
        committer: Committer,
        limits: Limits,
        *,
        more: Mapping[Op, Handler] | None = None,
        report: Callable[[], dict[str, Any]] = dict,
        on_gone: Callable[[Connection], None] = lambda connection: None,
    ) -> None:
        self._store = store
        self._ownership = ownership
        self._committer = committer
        self._limits = limits
        ranges = RangeSteps(store, ownership, committer, limits)
        self._shares = Shares(ownership, committer, limits, read=self._read_of, write=self._write_of)
        self._report = report
        self._on_gone = on_gone
        self._handlers: dict[Op, Handler] = {
            Op.READ: self._read,
            Op.WRITE: self._write,
            Op.SCAN: self._scan,
            Op.COUNT: ranges.count,
            Op.DELETE_RANGE: ranges.delete,
            Op.STATUS: self._status,
            **(more or {}),
        }
        self.counts = dict.fromkeys(self._handlers, 0)
        self._early = EarlyRequests(self.on_request)
        ownership.on_settled = self._early.ask_again

    def on_request(self, connection: Connection, request: Request, deadline: float | None) -> None:
        handler = self._handlers.get(request.op)  # type: ignore[call-overload]
        if handler is None:
            raise unknown_operation(request.op)
        self.counts[request.op] += 1  # type: ignore[index]
        try:
            handler(connection, request, deadline)
        except Expected as error:
            self._early.keep(connection, request, deadline, error)

    def on_batch_end(self, connection: Connection) -> None:
        """Replies leave by themselves at the end of the loop's turn."""

    def on_closed(self, connection: Connection) -> None:
        """Writes in flight go on; their replies are dropped by the connection."""
        self._on_gone(connection)

    def _read(self, connection: Connection, request: Request, deadline: float | None) -> None:
        if request.shard is None:
            self._shares.read(connection, request)
            return
        tablet = self._ownership.tablet_of(request.shard, request.epoch)
        asked: Read = decode_read(request.payload)
        check_read(asked.keys, self._limits)
        if len(asked.keys) > 1:
            self._ownership.count_more(request.shard, len(asked.keys) - 1)
        found, size_bytes = self._read_of(tablet, asked.keys, want_versions=asked.want_versions)
        connection.reply(request.id, found, size_bytes=size_bytes)

    def _read_of(self, tablet: int, keys: Sequence[bytes], *, want_versions: bool) -> tuple[ReadReply, int]:
        """What a tablet has, and the bytes of the values. Raises BatchTooLarge."""
        if want_versions:
            return self._versioned(tablet, keys)
        values, size_bytes = self._values(tablet, keys)
        return ReadReply(values), size_bytes

    def _versioned(self, tablet: int, keys: Sequence[bytes]) -> tuple[ReadReply, int]:
        values: list[bytes | None] = []
        versions: list[int] = []
        size_bytes = 0
        for key in keys:
            value, version = self._store.get_versioned(tablet, key) or (None, 0)
            values.append(value)
            versions.append(version)
            size_bytes += len(value or b"")
            self._check_fits(len(values), size_bytes)
        return ReadReply(values, versions), size_bytes

    def _values(self, tablet: int, keys: Sequence[bytes]) -> tuple[list[bytes | None], int]:
        """The values of `keys` and their bytes. Raises BatchTooLarge before they take more memory than a few frames."""
        if len(keys) == 1:
            value = self._store.get(tablet, keys[0])
            size_bytes = len(value or b"")
            self._check_fits(1, size_bytes)
            return [value], size_bytes
        if len(keys) <= READ_STEP_FIRST:
            found = self._store.get_many(tablet, keys)
            size_bytes = sum(map(len, filter(None, found)))
            self._check_fits(len(found), size_bytes)
            return found, size_bytes
        values: list[bytes | None] = []
        room, size_bytes, step = self._limits.frame_bytes_max, 0, READ_STEP_FIRST
        while len(values) < len(keys):
            found = self._store.get_many(tablet, keys[len(values) : len(values) + step])
            values += found
            size_bytes += sum(map(len, filter(None, found)))
            self._check_fits(len(values), size_bytes)
            step = max(1, min(READ_STEP_MOST, (room - size_bytes) * len(values) // (size_bytes or 1)))
        return values, size_bytes

    def read_together(self, requests: Sequence[Request], until: float) -> tuple[list[Reply], int]:
        """The server's quick way for reads of one key each: answers to the first ones, up to one that asks for more or
        fails, or TOGETHER_BYTES, or `until`; and the bytes of their values."""
        replies: list[Reply] = []
        size_bytes, longest, get = 0, self._limits.key_bytes_max, self._store.get
        tablet_of = self._ownership.tablet_of
        with suppress(ShardKVError):
            for request, read in zip(requests, decode_reads([one.payload for one in requests]) or (), strict=False):
                keys = read.keys
                if len(keys) != 1 or not 0 < len(keys[0]) <= longest or read.want_versions:
                    break
                value = get(tablet_of(request.shard, request.epoch), keys[0])
                replies.append(Reply(request.id, OK, ReadReply([value])))
                size_bytes += len(value or b"")
                if size_bytes > TOGETHER_BYTES or (not len(replies) % READ_STEP_FIRST and monotonic() > until):
                    break
        self.counts[Op.READ] += len(replies)
        return replies, size_bytes

    def _check_fits(self, count: int, size_bytes: int) -> None:
        if size_bytes > self._limits.frame_bytes_max:
            raise BatchTooLarge(
                f"The first {count} values already hold {size_bytes} bytes; "
                f"a frame holds {self._limits.frame_bytes_max}.",
                hint="Ask for fewer keys at once.",
            )

    def _write(self, connection: Connection, request: Request, deadline: float | None) -> None:
        if request.shard is None:
            self._shares.write(connection, request, deadline)
            return
        tablet = self._ownership.tablet_of(request.shard, request.epoch)
        asked: WriteRequest = decode_write(request.payload)
        check_write(asked, self._limits)
        if len(asked.keys) > 1:
            self._ownership.count_more(request.shard, len(asked.keys) - 1)
        self._committer.submit(self._write_of(tablet, asked, partial(_answer_write, connection, request.id)), deadline)

    def _write_of(self, tablet: int, asked: WriteRequest, done: Callable[[Write], None]) -> Write:
        """What is asked for, as a write of the store. Requires: `check_write`."""
        write = Write(
            tablet=tablet,
            keys=asked.keys,
            kinds=asked.kinds,
            values=asked.values,
            want_existed=asked.want_existed,
            done=done,
        )
        if asked.token is not None:
            write.token, write.again = (asked.token.lane, asked.token.number), asked.token.again
        if asked.conditions is not None or asked.ttl_ms is not None or asked.kinds == _INCR:
            self._complete(write, asked)
        return write

    def write_together(
        self, askers: Sequence[Connection], requests: Sequence[Request], deadlines: Sequence[float | None]
    ) -> bool:
        """The server's quick way for plain puts; False: one of them is more than that, or refused."""
        asked = decode_puts([one.payload for one in requests])
        if asked is None:
            return False
        keys, values = [one.keys for one in asked], [one.values for one in asked]
        counts, lengths = [*map(len, keys)], [*map(len, chain.from_iterable(keys))]
        limits = self._limits
        if (
            not min(counts)
            or not min(lengths)
            or counts != [*map(len, values)]
            or max(counts) > limits.operations_max
            or max(lengths) > limits.key_bytes_max
            or max(map(len, chain.from_iterable(values))) > limits.value_bytes_max
        ):
            return False
        ids = [one.id for one in requests]
        tokens = [(one.token.lane, one.token.number) if one.token is not None else None for one in asked]
        try:
            if any(tokens):
                for one in asked:
                    check_token(one.token)
            tablet_of = self._ownership.tablet_of
            numbers = [tablet_of(one.shard, one.epoch) for one in requests]
            apart = partial(_apart, askers, ids, numbers, keys, values, tokens)
            done = partial(_answer_puts, askers, ids)
            puts = Puts(numbers, keys, values, apart=apart, done=done, tokens=tokens if any(tokens) else None)
            self._committer.submit_puts(puts, deadlines)
        except ShardKVError:
            return False
        self.counts[Op.WRITE] += len(ids)
        return True

    def _complete(self, write: Write, asked: WriteRequest) -> None:
        """What only some writes have: conditions, a time to live, a number to add."""
        if asked.conditions is not None:
            write.conditions = list(zip(asked.conditions.keys, asked.conditions.versions, strict=True))
        if asked.kinds == _INCR:
            write.kinds, write.add, write.want_existed = PUT, int(asked.values[0]), True
        if asked.ttl_ms is not None:
            write.kinds, write.expiries = PUT_EXPIRING, self._store.time_ms() + asked.ttl_ms

    def _scan(self, connection: Connection, request: Request, deadline: float | None) -> None:
        asked: Scan = decode_scan(request.payload)
        if not asked.shards:
            raise InvalidArgument("A scan sent to a node must name the shards it is about.")
        if asked.limit < 1 or asked.page_bytes < 1:
            raise InvalidArgument("A scan must ask for at least one row and one byte.")
        check_range(asked.start, asked.stop, self._limits)
        self._scan_when_ready(connection, request.id, asked, asked.shards)

    def _scan_when_ready(
        self, connection: Connection, request_id: int, asked: Scan, shards: Sequence[tuple[int, int]]
    ) -> None:
        """Answer with a page, or, while memtables are being put in order, come back after others were served."""
        tablets = self._ownership.tablets_of(shards)
        if not self._store.ready_to_scan(tablets):
            again = partial(self._scan_again, connection, request_id, asked, shards)
            asyncio.get_running_loop().call_soon(again)
            return
        bytes_max = min(asked.page_bytes, PAGE_BYTES_MAX)
        page = self._store.scan_page(
            tablets,
            asked.start,
            asked.stop,
            reverse=asked.reverse,
            limit=asked.limit,
            bytes_max=bytes_max,
            keys_only=asked.keys_only,
        )
        values = None if asked.keys_only else page.values
        covered = [shard for shard, _ in shards]
        connection.reply(request_id, Page(page.keys, values, page.frontier, covered), size_bytes=bytes_max)

    def _scan_again(
        self, connection: Connection, request_id: int, asked: Scan, shards: Sequence[tuple[int, int]]
    ) -> None:
        if connection.closed:
            return
        try:
            self._scan_when_ready(connection, request_id, asked, shards)
        except ShardKVError as error:
            connection.fail(request_id, error)

    def _status(self, connection: Connection, request: Request, deadline: float | None) -> None:
        connection.reply(request.id, self.status())

    def status(self) -> dict[str, Any]:
        """Plain numbers and names, for `shardkv cluster status` and tests."""
        return {
            "shards": self._ownership.shards,
            "revision": self._ownership.revision,
            "requests": {op.name.lower(): count for op, count in self.counts.items()},
            "groups": self._committer.groups,
            "writes": self._committer.writes,
            "engine": self._store.stats(),
            **self._report(),
        }


def _apart(
    askers: Sequence[Connection],
    ids: list[int],
    numbers: list[int],
    keys: list[list[bytes]],
    values: list[list[bytes]],
    tokens: list[Token | None],
) -> list[Write]:
    """Puts as single writes, each answered for itself."""
    return [
        Write(tablet, its_keys, PUT, its_values, token=token, done=partial(_answer_write, asker, request_id))
        for asker, request_id, tablet, its_keys, its_values, token in zip(
            askers, ids, numbers, keys, values, tokens, strict=True
        )
    ]


def _answer_puts(askers: Sequence[Connection], ids: list[int], puts: Puts) -> None:
    """Tell that all of them were applied."""
    reply_to_all(
        askers,
        [
            Reply(request_id, OK, WriteReply(bytes(len(keys)), version, _NO_PROBLEMS))
            for request_id, keys, version in zip(ids, puts.keys, puts.versions, strict=True)
        ],
    )


def _answer_write(connection: Connection, request_id: int, write: Write) -> None:
    """Tell the outcome of a write to whoever asked for it."""
    if write.error is not None:
        connection.fail(request_id, told_error(write.error))
        return
    number = None if write.add is None else int(write.values[0])
    connection.reply(request_id, WriteReply(told_results(write), write.version, [], number))
