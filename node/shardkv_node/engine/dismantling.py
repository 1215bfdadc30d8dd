"""`Dismantler`: frees the memory of memtables nobody reads any more, a slice at a time.

Freeing half a million rows at once holds the interpreter for some 60 ms. So each slice is a call of its own through
`post`: an event loop serves requests in between.

Invariant: a memtable is dismantled once it was dropped and no pin is left on it, and never before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from shardkv_node.engine.memtable import Memtable


class Dismantler:
    """`post` runs a callable in the owner's context, later or at once."""

    __slots__ = ("_post", "_posted", "_queue", "_running")

    def __init__(self, post: Callable[[Callable[[], None]], None]) -> None:
        self._post = post
        self._queue: deque[Memtable] = deque()
        self._posted = False
        self._running = False

    def drop(self, memtable: Memtable) -> None:
        """The store has no use for it any more."""
        memtable.dropped = True
        if not memtable.pins:
            self._queue.append(memtable)
            self._go_on()

    def unpin(self, memtable: Memtable) -> None:
        """Take back one pin."""
        memtable.pins -= 1
        if memtable.dropped and not memtable.pins:
            self._queue.append(memtable)
            self._go_on()

    def _go_on(self) -> None:
        """Ask for slices until nothing is left; a `post` that calls at once must not nest them."""
        if self._posted or self._running:
            return
        self._running = True
        try:
            while self._queue and not self._posted:
                self._posted = True
                self._post(self._slice)
        finally:
            self._running = False

    def _slice(self) -> None:
        self._posted = False
        if self._queue and not self._queue[0].dismantle():
            self._queue.popleft()
        self._go_on()
