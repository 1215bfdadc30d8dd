"""Fencing shards for a change: refuse at once, promise on disk, wait for what was accepted before, watch the time.

Invariants: when `fence` returns, nothing that was accepted for the shards is unanswered, and nothing will be accepted
until their epoch rises, also after a restart. A fence is never lifted here: only a newer view does that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from shardkv.control.duties import Fence
from shardkv_node.changes.site import Site
from shardkv_node.changes.stops import reached


class Fencer:
    """Of one change of one node. `close` ends the watch."""

    def __init__(self, site: Site, change: str, role: str) -> None:
        self._site = site
        self._change = change
        self._role = role
        self._watch: asyncio.TimerHandle | None = None
        self._fenced: asyncio.Task[None] | None = None

    async def fence(self, shards: Sequence[int], epochs: Sequence[int]) -> None:
        """Fence these shards at their epochs, or wait for that to be done. Raises StorageError."""
        if self._fenced is None:
            fences = [Fence(shard, epoch, self._change) for shard, epoch in zip(shards, epochs, strict=True)]
            self._watch = asyncio.get_running_loop().call_later(self._site.fence_abort_s, self._overdue, shards[0])
            self._fenced = asyncio.get_running_loop().create_task(self._do(fences))
        await asyncio.shield(self._fenced)

    @property
    def done(self) -> bool:
        return self._fenced is not None and self._fenced.done() and not self._fenced.exception()

    async def _do(self, fences: list[Fence]) -> None:
        for fence in fences:
            self._site.ownership.fence(fence.shard, fence.epoch)
        reached(f"{self._role}.fencing")
        await self._site.fences.add(fences)
        await self._site.drained()
        reached(f"{self._role}.fenced")

    def _overdue(self, shard: int) -> None:
        problem = f"The fence of shard {shard} stood for {self._site.fence_abort_s:g} s on node {self._site.me().name}."
        self._site.settler.abort(shard, self._change, problem)

    def close(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
