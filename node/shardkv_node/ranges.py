"""Steps of COUNT and DELETE_RANGE in one shard: each looks at a bounded stretch of keys and says how far it came.

Invariants: a step holds the loop no longer than a page of a scan does; a frontier is told only for what is covered, of
a delete only when its write was applied. Nothing is kept between steps: whoever asks goes on at the frontier.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from shardkv.errors import InvalidArgument, ShardKVError
from shardkv.limits import Limits
from shardkv.transport.server import Connection
from shardkv.wire.checks import check_range
from shardkv.wire.messages import (
    Count,
    CountReply,
    DeleteRange,
    DeleteRangeReply,
    Request,
    decode_count,
    decode_delete_range,
)
from shardkv_node.committer import Committer
from shardkv_node.engine.columns import DELETE
from shardkv_node.engine.source import Page
from shardkv_node.engine.store import Store
from shardkv_node.engine.write import Write
from shardkv_node.outcome import told_error
from shardkv_node.ownership import Ownership

COUNT_KEYS = 8192
DELETE_KEYS = 1000
STEP_BYTES = 1024 * 1024
"""A step ends at so many keys, or bytes of them, or as a page of a scan does after many deletes."""


class RangeSteps:
    """Answers COUNT and DELETE_RANGE for a node's service."""

    def __init__(self, store: Store, ownership: Ownership, committer: Committer, limits: Limits) -> None:
        self._store = store
        self._ownership = ownership
        self._committer = committer
        self._limits = limits

    def count(self, connection: Connection, request: Request, deadline: float | None) -> None:
        asked: Count = decode_count(request.payload)
        check_range(asked.start, asked.stop, self._limits)

        def step(tablet: int) -> None:
            page = self._page(tablet, asked.start, asked.stop, COUNT_KEYS)
            connection.reply(request.id, CountReply(len(page.keys), page.frontier))

        self._when_ready(connection, request, step)

    def delete(self, connection: Connection, request: Request, deadline: float | None) -> None:
        asked: DeleteRange = decode_delete_range(request.payload)
        check_range(asked.start, asked.stop, self._limits)
        if asked.limit is not None and asked.limit < 1:
            raise InvalidArgument("A delete of a range must have a limit of at least one key, or none.")

        def step(tablet: int) -> None:
            most = DELETE_KEYS if asked.limit is None else min(asked.limit, DELETE_KEYS)
            page = self._page(tablet, asked.start, asked.stop, most)
            if not page.keys:
                connection.reply(request.id, DeleteRangeReply(0, page.frontier))
                return
            done = partial(_answer_delete, connection, request.id, page.frontier)
            write = Write(tablet, page.keys, DELETE, [b""] * len(page.keys), want_existed=True, done=done)
            self._committer.submit(write, deadline)

        self._when_ready(connection, request, step)

    def _page(self, tablet: int, start: bytes, stop: bytes | None, limit: int) -> Page:
        return self._store.scan_page([tablet], start, stop, limit=limit, bytes_max=STEP_BYTES, keys_only=True)

    def _when_ready(self, connection: Connection, request: Request, step: Callable[[int], None]) -> None:
        """Take the step, or, while memtables are being put in order, come back after others were served."""
        tablet = self._ownership.tablet_of(request.shard, request.epoch)
        if self._store.ready_to_scan([tablet]):
            step(tablet)
        else:
            asyncio.get_running_loop().call_soon(self._again, connection, request, step)

    def _again(self, connection: Connection, request: Request, step: Callable[[int], None]) -> None:
        if connection.closed:
            return
        try:
            self._when_ready(connection, request, step)
        except ShardKVError as error:
            connection.fail(request.id, error)


def _answer_delete(connection: Connection, request_id: int, frontier: bytes | None, write: Write) -> None:
    if write.error is not None:
        connection.fail(request_id, told_error(write.error))
    else:
        connection.reply(request_id, DeleteRangeReply(sum(write.existed or ()), frontier))
