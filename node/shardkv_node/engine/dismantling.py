"""`Dismantler`: frees the memory of memtables nobody reads any more, a slice at a time.

Freeing half a million rows at once holds the interpreter for some 60 ms. So it is a chore, each slice a step of it.

Invariant: a memtable is dismantled once it was dropped and no pin is left on it, and never before.
"""

from __future__ import annotations

from shardkv_node.engine.chores import Chores
from shardkv_node.engine.memtable import Memtable


class Dismantler:
    """Called by the owner of the store; the slices run wherever chores do."""

    __slots__ = ("_chores",)

    def __init__(self, chores: Chores) -> None:
        self._chores = chores

    def drop(self, memtable: Memtable) -> None:
        """The store has no use for it any more."""
        memtable.dropped = True
        if not memtable.pins:
            self._chores.submit(memtable.dismantle)

    def unpin(self, memtable: Memtable) -> None:
        """Take back one pin."""
        memtable.pins -= 1
        if memtable.dropped and not memtable.pins:
            self._chores.submit(memtable.dismantle)
