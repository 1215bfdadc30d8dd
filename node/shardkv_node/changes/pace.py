"""`Pace`: how fast a change may ship, and whether it may at all; both may change while it waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic

from shardkv.topology.documents import Change

LOOK_S = 0.2
"""So often one that waits looks whether it is still to."""


class Pace:
    """Asks `change` for the change as the newest view has it."""

    def __init__(self, change: Callable[[], Change]) -> None:
        self._change = change
        self._free_at = 0.0

    async def go(self) -> None:
        """Until the change is not paused."""
        while self._change().paused:
            await asyncio.sleep(LOOK_S)

    async def take(self, size: int) -> None:
        """Until so many bytes may be shipped."""
        await self.go()
        rate = self._change().rate_bytes_s
        if rate:
            begins = max(self._free_at, monotonic())
            self._free_at = begins + size / rate
            while (wait_s := begins - monotonic()) > 0 and self._change().rate_bytes_s == rate:
                await asyncio.sleep(min(wait_s, LOOK_S))
            await self.go()
