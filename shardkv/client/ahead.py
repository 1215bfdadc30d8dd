"""`Ahead`: one request of the blocking client that is sent before its answer is needed.

Its connection waits in the pool meanwhile, and whoever finds no other one there takes it: then the request is sent
again when its answer is wanted. So a scan that nobody goes on with holds nothing that others need.

Invariants: at most one request is ahead; its answer is read by who sent it, or by nobody, since a connection that was
taken, or whose `Ahead` was dropped, is closed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from shardkv.client.calls import Call, settle
from shardkv.client.connection import Connection
from shardkv.client.pool import Pool
from shardkv.errors import Draining


class Ahead:
    """Used by one thread at a time."""

    __slots__ = ("_connection", "_pool", "_request_id")

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._connection: Connection | None = None
        self._request_id = 0

    def send(self, call: Call, timeout_s: float) -> None:
        """Send the call now, if a connection is free. The answer is expected within `timeout_s`."""
        connection = self._pool.take_idle()
        if connection is None:
            return
        request_id = connection.begin(call.op, call.message(), time.monotonic() + timeout_s)
        if request_id is None:
            self._pool.release(connection)
            return
        self._connection, self._request_id = connection, request_id
        self._pool.park(connection)

    def settle(self, calls: Sequence[Call], timeout_s: float, deadline: float) -> None:
        """Settle the call that was sent, and no other; it goes on waiting when it was not sent, or in vain."""
        connection, self._connection = self._connection, None
        if connection is None or not self._pool.unpark(connection):
            return
        try:
            settle(calls[0], connection.finish(self._request_id, deadline, calls[0].decode_answer))
            if isinstance(calls[0].error, Draining):
                connection.usable = False
        finally:
            self._pool.release(connection)

    def drop(self) -> None:
        """The answer is not wanted. May be called by the garbage collector, anywhere."""
        if self._connection is not None:
            self._pool.discard(self._connection)
