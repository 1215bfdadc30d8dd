"""`Settler`: sends the commit or abort of a change until it is known how the change has ended.

Invariants: a transaction whose answer was lost is sent again as it was, so it is applied once at most; one that was
refused is made anew from a view that is at least as new as the refusal. What no view shows yet is taken for ended only
when the transaction was answered.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from shardkv.control import changes
from shardkv.errors import DeadlineExceeded, OutcomeUnknown, StorageError, UnavailableError
from shardkv.metadata.client import Backoff, MetaClient
from shardkv.topology.view import Topology
from shardkv.wire.messages import MetaTxn, MetaTxnReply
from shardkv_node.changes.stops import reached
from shardkv_node.changes.views import Views

log = logging.getLogger(__name__)

TXN_TIMEOUT_S = 2.0

Build = Callable[[Topology], MetaTxn | None]
"""The transaction on a view; None: the change is over there."""


class Settler:
    """`on_applied` is told of every transaction that was applied, with its revision."""

    def __init__(self, meta: MetaClient, views: Views, on_applied: Callable[[MetaTxn, int], None]) -> None:
        self._meta = meta
        self._views = views
        self._on_applied = on_applied
        self._aborting: dict[str, asyncio.Task[None]] = {}

    async def commit(self, shard: int, change: str, *, role: str) -> bool:
        """Commit; True: this call did it. False: the change is over, one way or the other; the newest view says how.

        Requires: as `changes.commit`.
        """
        return await self._settle(lambda topology: changes.commit(topology, shard, change), f"{role}.committed")

    def abort(self, shard: int, change: str, problem: str) -> None:
        """See that a change ends; whether by this abort or otherwise, views will show. Safe to call again."""
        if change not in self._aborting:
            log.warning("change_given_up change=%s shard=%d reason=%r", change, shard, problem)
            build = partial(_abort, shard, change, problem)
            task = self._aborting[change] = asyncio.get_running_loop().create_task(self._end(build))
            task.add_done_callback(lambda _: self._aborting.pop(change, None))

    async def close(self) -> None:
        tasks = list(self._aborting.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _end(self, build: Build) -> None:
        await self._settle(build)

    async def _settle(self, build: Build, step: str = "") -> bool:
        while (txn := build(self._views.newest)) is not None:
            reply = await self._answer_to(txn, build)
            if reply is None:
                return False
            if reply.applied:
                reached(step)
                self._on_applied(txn, reply.revision)
                return True
            await self._views.told(reply.revision)
        return False

    async def _answer_to(self, txn: MetaTxn, build: Build) -> MetaTxnReply | None:
        """Send a transaction until it is answered; None: a newer view shows that the change is over."""
        backoff = Backoff()
        while True:
            try:
                return await self._meta.txn(txn.compares, txn.puts, timeout_s=TXN_TIMEOUT_S)
            except (UnavailableError, DeadlineExceeded, OutcomeUnknown, StorageError) as error:
                log.debug("metadata_not_reached reason=%r", error.message)
                await backoff.pause()
            if build(self._views.newest) is None:
                return None


def _abort(shard: int, change: str, problem: str, topology: Topology) -> MetaTxn | None:
    return changes.abort(topology, shard, change, problem)
