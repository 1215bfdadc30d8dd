"""What a node answers: reads, writes and scan pages of the shards it owns, and its status.

Invariant: nothing is read or written before the shard and epoch of the request were checked against what the node
owns now. Replies to reads are formed at once; replies to writes when their group was applied.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

from shardkv.errors import BatchTooLarge, InvalidArgument, OutcomeUnknown, ShardKVError, StorePoisoned
from shardkv.limits import Limits
from shardkv.transport.server import Connection, unknown_operation
from shardkv.wire.checks import check_range, check_read, check_write
from shardkv.wire.messages import (
    Op,
    Page,
    ReadReply,
    Request,
    Scan,
    WriteReply,
    WriteResult,
    decode_read,
    decode_scan,
    decode_write,
)
from shardkv.wire.messages import Write as WriteRequest
from shardkv_node.committer import Committer
from shardkv_node.engine.store import Store
from shardkv_node.engine.write import Write
from shardkv_node.ownership import Ownership

PAGE_BYTES_MAX = 1024 * 1024
"""Upper bound of one page, whatever was asked: it is the time the loop is away for one request."""
READ_STEP_FIRST = 8
READ_STEP_MOST = 1024
"""How many keys are looked up before the bytes found are counted: few while it is unknown how large values are."""

_RESULT_BYTES = bytes((WriteResult.APPLIED, WriteResult.APPLIED_EXISTED))


class NodeService:
    """The `Service` of a node's server."""

    def __init__(self, store: Store, ownership: Ownership, committer: Committer, limits: Limits) -> None:
        self._store = store
        self._ownership = ownership
        self._committer = committer
        self._limits = limits
        self._handlers = {Op.READ: self._read, Op.WRITE: self._write, Op.SCAN: self._scan, Op.STATUS: self._status}
        self.counts = dict.fromkeys((Op.READ, Op.WRITE, Op.SCAN, Op.STATUS), 0)

    def on_request(self, connection: Connection, request: Request, deadline: float | None) -> None:
        handler = self._handlers.get(request.op)  # type: ignore[call-overload]
        if handler is None:
            raise unknown_operation(request.op)
        self.counts[Op(request.op)] += 1
        handler(connection, request, deadline)

    def on_batch_end(self, connection: Connection) -> None:
        """Replies leave by themselves at the end of the loop's turn."""

    def on_closed(self, connection: Connection) -> None:
        """Writes in flight go on; their replies are dropped by the connection."""

    def _read(self, connection: Connection, request: Request, deadline: float | None) -> None:
        tablet = self._ownership.tablet_of(request.shard, request.epoch)
        keys = decode_read(request.payload).keys
        check_read(keys, self._limits)
        values, size_bytes = self._values(tablet, keys)
        connection.reply(request.id, ReadReply(values), size_bytes=size_bytes)

    def _values(self, tablet: int, keys: Sequence[bytes]) -> tuple[list[bytes | None], int]:
        """The values of `keys` and their bytes. Raises BatchTooLarge before they take more memory than a few frames."""
        values: list[bytes | None] = []
        room, size_bytes, step = self._limits.frame_bytes_max, 0, READ_STEP_FIRST
        while len(values) < len(keys):
            found = self._store.get_many(tablet, keys[len(values) : len(values) + step])
            values += found
            size_bytes += sum(map(len, filter(None, found)))
            if size_bytes > room:
                raise BatchTooLarge(
                    f"The first {len(values)} values already hold {size_bytes} bytes; a frame holds {room}.",
                    hint="Ask for fewer keys at once.",
                )
            step = max(1, min(READ_STEP_MOST, (room - size_bytes) * len(values) // (size_bytes or 1)))
        return values, size_bytes

    def _write(self, connection: Connection, request: Request, deadline: float | None) -> None:
        tablet = self._ownership.tablet_of(request.shard, request.epoch)
        asked: WriteRequest = decode_write(request.payload)
        check_write(asked, self._limits)
        write = Write(
            tablet=tablet,
            keys=asked.keys,
            kinds=asked.kinds,
            values=asked.values,
            want_existed=asked.want_existed,
            done=partial(_answer_write, connection, request.id),
        )
        self._committer.submit(write, deadline)

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
        }


def _answer_write(connection: Connection, request_id: int, write: Write) -> None:
    """Tell the outcome of a write to whoever asked for it."""
    error = write.error
    if isinstance(error, StorePoisoned):
        error = OutcomeUnknown(f"The node failed while it stored the write, and starts again: {error.message}")
    if error is not None:
        connection.fail(request_id, error if isinstance(error, ShardKVError) else ShardKVError(str(error)))
        return
    results = bytes(len(write.keys)) if write.existed is None else bytes(map(_RESULT_BYTES.__getitem__, write.existed))
    connection.reply(request_id, WriteReply(results, write.version, []))
