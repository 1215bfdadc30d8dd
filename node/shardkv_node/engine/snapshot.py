"""`StoreSnapshot`: some tablets of a store as they were at one moment between two groups of writes.

It costs nothing to make and copies nothing: it pins the tables and memtables there are, and has a `MemtableView` of
each active one. Writes, flushes, compactions and a drop of the tablet go on. What they replace stays, files on disk
and memtables in memory, until the last snapshot that pins it is closed; then it goes as it would have gone before.

Invariant: the parts of a tablet seen here never change, so every read gives what it would have given at the moment.
Expiry is judged by the time of that moment, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from shardkv.errors import InvalidArgument, StoreClosed
from shardkv_node.engine.dismantling import Dismantler
from shardkv_node.engine.memtable import Memtable, cell_value
from shardkv_node.engine.memtable_view import MemtableView
from shardkv_node.engine.reads import Reads
from shardkv_node.engine.source import Source
from shardkv_node.engine.tablet import Tablet


class TabletSnapshot(Tablet):
    """A tablet with its parts as they were. `active` is empty for good; in its place reads ask the view."""

    __slots__ = ("_pinned", "_view")

    def __init__(self, tablet: Tablet, now_ms: int) -> None:
        super().__init__(tablet.number, tablet.label, tablet.last_seqno, Memtable(), clock=lambda: now_ms)
        self.frozen = list(tablet.frozen)
        self.share_levels(tablet)
        self._view = MemtableView(tablet.active)
        self._pinned = [*tablet.frozen, tablet.active]
        for memtable in self._pinned:
            memtable.pins += 1

    def memtables(self) -> list[Memtable]:
        return self._pinned

    def sources(self) -> list[Source]:
        return [*super().sources(), self._view] if self._pinned[-1] else super().sources()

    def get(self, key: bytes) -> bytes | None:
        """The value, or None when the key did not exist."""
        cell = self._view.get(key)
        return super().get(key) if cell is None else cell_value(cell, self._clock)

    def _cell(self, key: bytes) -> bytes | None:
        cell = self._view.get(key)
        return super()._cell(key) if cell is None else cell

    def release(self, dismantler: Dismantler) -> None:
        self._view.close()
        for memtable in self._pinned:
            dismantler.unpin(memtable)


class StoreSnapshot(Reads):
    """Made by `Store.snapshot`. `close` it: it holds files and memory."""

    def __init__(
        self,
        tablets: Mapping[int, Tablet],
        now_ms: int,
        *,
        store_closed: Callable[[], bool],
        on_close: Callable[[StoreSnapshot], None],
    ) -> None:
        self._tablets = {number: TabletSnapshot(tablet, now_ms) for number, tablet in tablets.items()}
        self.table_names = sorted(
            {table.meta.file_name for tablet in self._tablets.values() for table in tablet.tables()}
        )
        """Files pinned on disk."""
        self._now_ms = now_ms
        self._store_closed = store_closed
        self._on_close = on_close
        self.closed = False

    def time_ms(self) -> int:
        return self._now_ms

    def close(self) -> None:
        """Let go of what it pins. Safe to call twice."""
        if not self.closed:
            self.closed = True
            self._on_close(self)

    def release(self, dismantler: Dismantler) -> None:
        """Unpin the memtables; for the store."""
        for tablet in self._tablets.values():
            tablet.release(dismantler)

    def _tablet(self, number: int) -> Tablet:
        if self.closed:
            raise StoreClosed("This snapshot is closed.", hint="Make a new one to read on.")
        if self._store_closed():
            raise StoreClosed("The store of this snapshot is closed.", hint="Open it again and make a new snapshot.")
        tablet = self._tablets.get(number)
        if tablet is None:
            raise InvalidArgument(f"This snapshot has no tablet {number}.", detail={"tablet": number})
        return tablet
