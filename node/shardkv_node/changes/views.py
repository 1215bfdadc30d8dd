"""`Views`: the newest topology this node knows, for those who wait for a newer one.

A view is a guess when it was made here, of the one before and a transaction of this node that was applied: it may lack
what others wrote before that transaction. Invariant: the view only moves forward in revision; a guess is replaced by
the store's own view of the same revision.
"""

from __future__ import annotations

import asyncio

from shardkv.topology.view import Topology


class Views:
    """Used on one event loop."""

    def __init__(self) -> None:
        self.newest = Topology()
        self._told = 0
        """The revision of the newest view that the store told."""
        self._moved = asyncio.Event()

    def show(self, topology: Topology) -> None:
        """The store has told a view; one that is not newer is passed over."""
        if topology.revision > self._told:
            self._told = topology.revision
            if topology.revision >= self.newest.revision:
                self._move(topology)

    def guess(self, topology: Topology) -> None:
        """A transaction of this node was applied, and has this revision."""
        if topology.revision > self.newest.revision:
            self._move(topology)

    def _move(self, topology: Topology) -> None:
        self.newest = topology
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    async def moved(self) -> None:
        """Until there is a newer view than now."""
        await self._moved.wait()

    async def told(self, revision: int) -> None:
        """Until the store has told a view of `revision` or beyond."""
        while self._told < revision or self.newest.revision < revision:
            await self.moved()
