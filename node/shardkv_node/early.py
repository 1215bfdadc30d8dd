"""`EarlyRequests`: requests for a shard that is served in a moment, by those who heard of it before this node did.

Invariants: nothing was done for a request that is kept; each is asked again once, in order, or refused when its time
here is over. It counts as open on its connection meanwhile, so how many there are is bounded.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from shardkv.errors import LocalProtocolError, ShardKVError
from shardkv.transport.server import Connection
from shardkv.wire.messages import Request

log = logging.getLogger(__name__)

KEPT_S = 0.1


@dataclass(slots=True)
class _Early:
    connection: Connection
    request: Request
    deadline: float | None
    refusal: ShardKVError
    until: float


class EarlyRequests:
    """`ask`: how a request is asked again."""

    def __init__(self, ask: Callable[[Connection, Request, float | None], None]) -> None:
        self._ask = ask
        self._kept: deque[_Early] = deque()
        self._loop = asyncio.get_running_loop()

    def keep(self, connection: Connection, request: Request, deadline: float | None, refusal: ShardKVError) -> None:
        """Have a request wait for `ask_again`. `refusal`: what it is told if that takes too long."""
        if not self._kept:
            self._loop.call_later(KEPT_S, self._expire)
        self._kept.append(_Early(connection, request, deadline, refusal, self._loop.time() + KEPT_S))

    def ask_again(self) -> None:
        """Something is served now that was not."""
        kept, self._kept = self._kept, deque()
        for early in kept:
            if early.connection.closed:
                continue
            try:
                self._ask(early.connection, early.request, early.deadline)
            except ShardKVError as error:
                early.connection.fail(early.request.id, error)
            except Exception as error:
                log.exception("request_failed op=%s", early.request.op)
                bug = LocalProtocolError(f"The request failed inside the server: {error!r}.")
                early.connection.fail(early.request.id, bug)

    def _expire(self) -> None:
        now = self._loop.time()
        while self._kept and self._kept[0].until <= now:
            early = self._kept.popleft()
            early.connection.fail(early.request.id, early.refusal)
        if self._kept:
            self._loop.call_later(self._kept[0].until - now, self._expire)
