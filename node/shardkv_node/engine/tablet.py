"""`Tablet`: one shard's data in this store: an active memtable, frozen ones, and levels of tables.

Invariant: every row of a younger part is newer than the rows of the same key in older parts; youngest first they are
the active memtable, the frozen ones from the last to the first, level 0 from the last to the first, levels 1, 2...
So a read stops at the first part that knows the key, and a delete found there means the key does not exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from shardkv_node.engine.clipped_table import ClippedTable
from shardkv_node.engine.columns import PUT, PUT_EXPIRING
from shardkv_node.engine.memtable import Memtable, cell_value, cell_version
from shardkv_node.engine.sorted_run import SortedRun
from shardkv_node.engine.source import Source
from shardkv_node.engine.table_reader import Table


class Tablet:
    """Read by `Store`; written by `Store` (memtables, seqno) and `Maintenance` (frozen, levels)."""

    __slots__ = ("_clock", "active", "frozen", "label", "last_seqno", "level0", "number", "sorted_levels")

    def __init__(
        self, number: int, label: bytes, last_seqno: int, active: Memtable, *, clock: Callable[[], int]
    ) -> None:
        """`clock`: milliseconds since 1970, never going back; asked only where a row has an expiry."""
        self._clock = clock
        self.number = number
        self.label = label
        self.last_seqno = last_seqno
        """Of the newest logged write; the next one gets one more."""
        self.active = active
        self.frozen: list[Memtable] = []
        """Oldest first."""
        self.level0: list[Table | ClippedTable] = []
        """Oldest first; they may overlap."""
        self.sorted_levels: list[SortedRun] = []
        """Levels 1, 2... Disjoint tables inside a level."""

    def get(self, key: bytes) -> bytes | None:
        """The value, or None when the key does not exist."""
        cell = self._cell(key)
        if cell is not None:
            return cell_value(cell, self._clock)
        found = self._find_in_tables(key)
        return None if found is None else found[0]

    def get_versioned(self, key: bytes) -> tuple[bytes, int] | None:
        """(value, version), or None when the key does not exist."""
        cell = self._cell(key)
        if cell is not None:
            value = cell_value(cell, self._clock)
            return None if value is None else (value, cell_version(cell))
        return self._find_in_tables(key)

    def version_of(self, key: bytes) -> int:
        """The version of the key's value; 0 when the key does not exist."""
        found = self.get_versioned(key)
        return 0 if found is None else found[1]

    def sources(self) -> Iterator[Source]:
        """All parts, oldest first."""
        yield from reversed(self.sorted_levels)
        yield from self.level0
        yield from self.frozen
        yield self.active

    def memtables(self) -> Iterator[Memtable]:
        """Oldest first."""
        yield from self.frozen
        yield self.active

    def freeze(self) -> Memtable:
        """Put a new memtable in the place of the active one, which becomes the youngest frozen one."""
        frozen = self.active
        self.frozen.append(frozen)
        self.active = Memtable(ordered=frozen.ordered)
        return frozen

    def set_levels(self, levels: Sequence[Sequence[Table | ClippedTable]]) -> None:
        """Level 0 oldest first, the others in key order."""
        self.level0 = list(levels[0]) if levels else []
        self.sorted_levels = [SortedRun(tables) for tables in levels[1:]]

    @property
    def level0_files(self) -> int:
        """Flushes not yet compacted: pieces of one file count once."""
        return len({table.meta.file_name for table in self.level0})

    def tables(self) -> Iterator[Table | ClippedTable]:
        yield from self.level0
        for run in self.sorted_levels:
            yield from run.tables

    def _cell(self, key: bytes) -> bytes | None:
        active = self.active
        cell = active.cells.get(key)
        if cell is None and active.full_parts:
            cell = active.get(key)
        if cell is None and self.frozen:
            for memtable in reversed(self.frozen):
                cell = memtable.get(key)
                if cell is not None:
                    break
        return cell

    def _find_in_tables(self, key: bytes) -> tuple[bytes, int] | None:
        parts: tuple[Table | ClippedTable | SortedRun, ...] = (*reversed(self.level0), *self.sorted_levels)
        for part in parts:
            found = part.find(key)
            if found is not None:
                columns, row = found
                kind = columns.kind(row)
                if kind == PUT or (kind == PUT_EXPIRING and columns.expiry(row) > self._clock()):
                    return columns.values[row], columns.version(row)
                return None
        return None
