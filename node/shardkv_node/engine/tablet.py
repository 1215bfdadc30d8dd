"""`Tablet`: one shard's data in this store: an active memtable, frozen ones, and levels of tables.

Invariant: every row of a younger part is newer than the rows of the same key in older parts; youngest first they are
the active memtable, the frozen ones from the last to the first, level 0 from the last to the first, levels 1, 2...
So a read stops at the first part that knows the key, and a delete found there means the key does not exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from shardkv_node.engine.clipped_table import ClippedTable
from shardkv_node.engine.columns import PUT, PUT_EXPIRING
from shardkv_node.engine.memtable import CELL_HEADER_BYTES, Memtable, cell_expiry, cell_value, cell_version
from shardkv_node.engine.merged_tables import MergedTables
from shardkv_node.engine.row_cache import RowCache
from shardkv_node.engine.sorted_run import SortedRun
from shardkv_node.engine.source import Source
from shardkv_node.engine.table_lookup import TableLookup
from shardkv_node.engine.table_reader import Table


class Tablet:
    """Read by `Store`; written by `Store` (memtables, seqno) and `Maintenance` (frozen, levels)."""

    __slots__ = (
        "_clock",
        "_merged",
        "_parts",
        "_tables",
        "active",
        "fenced",
        "frozen",
        "label",
        "last_seqno",
        "level0",
        "number",
        "records",
        "records_of",
        "rows",
        "sorted_levels",
    )

    def __init__(
        self,
        number: int,
        label: bytes,
        last_seqno: int,
        active: Memtable,
        *,
        clock: Callable[[], int],
        records_of: int = 0,
    ) -> None:
        """`clock`: milliseconds since 1970, never going back; asked only where a row has an expiry."""
        self._clock = clock
        self.number = number
        self.label = label
        self.last_seqno = last_seqno
        """Of the newest logged write; the next one gets one more."""
        self.active = active
        self.records_of = records_of
        """The tablet whose records of tokens this one holds (see dedupe.py); 0: it holds rows of users."""
        self.records: Tablet | None = None
        """The tablet with the records of this one; None: no write with a token was made yet."""
        self.fenced = False
        """It takes no writes: what it holds must stay as it is for a while."""
        self.frozen: list[Memtable] = []
        """Oldest first."""
        self.level0: list[Table | ClippedTable] = []
        """Oldest first; they may overlap."""
        self.sorted_levels: list[SortedRun] = []
        """Levels 1, 2... Disjoint tables inside a level."""
        self.rows: RowCache | None = None
        """Given by `Maintenance` before there is a table; a snapshot has none. Asked first, before the memtables."""
        self._parts: tuple[Table | ClippedTable | SortedRun, ...] = ()
        """Of all levels, youngest first."""
        self._tables = TableLookup(())
        """Of the same, for gets."""
        self._merged: MergedTables | None = None
        """Of the same, for scans; None where there is nothing to merge."""

    def get(self, key: bytes) -> bytes | None:
        """The value, or None when the key does not exist. Flat, since every read runs it."""
        rows, active = self.rows, self.active
        if rows is not None:
            value = rows.values.get(key)
            if value is not None:
                return value
        cell = active.cells.get(key)
        if cell is None and (self.frozen or active.full_parts):
            cell = self._cell(key)
        if cell is not None:
            return cell_value(cell, self._clock)
        merged = self._merged
        found = merged.find(key) if merged is not None and merged.any_kept else None
        misses = 0 if rows is None else rows.blocks.misses
        if found is None:
            found = self._tables.find(key)
            if found is None:
                return None
        columns, row = found
        kind = columns.kind(row)
        if kind == PUT:
            value = columns.values[row]
            # Read before, not long ago, or there is room: else of reads all over the place nothing is kept.
            if rows is not None and (rows.blocks.misses == misses or rows.blocks.has_room):
                rows.hold(key, value)
            return value
        return columns.values[row] if kind == PUT_EXPIRING and columns.expiry(row) > self._clock() else None

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """A value or None for each key, in the order asked."""
        rows = self.rows
        if rows is None or not rows.values:
            cells = map(self.active.cells.get, keys)
            return [
                cell[CELL_HEADER_BYTES:] if cell is not None and cell[0] == PUT else self.get(key)
                for key, cell in zip(keys, cells, strict=True)
            ]
        found: list[bytes | None] = list(map(rows.values.get, keys))
        if None in found:
            found = [self.get(key) if value is None else value for key, value in zip(keys, found, strict=True)]
        return found

    def get_versioned(self, key: bytes) -> tuple[bytes, int] | None:
        """(value, version), or None when the key does not exist."""
        cell = self._cell(key)
        if cell is not None:
            value = cell_value(cell, self._clock)
            return None if value is None else (value, cell_version(cell))
        return self._find_in_tables(key)

    def get_expiring(self, key: bytes) -> tuple[bytes, int] | None:
        """(value, when it ends in milliseconds since 1970 or NO_EXPIRY), or None when the key does not exist."""
        cell = self._cell(key)
        if cell is not None:
            value = cell_value(cell, self._clock)
            return None if value is None else (value, cell_expiry(cell))
        found = self._tables.find(key)
        if found is None:
            return None
        columns, row = found
        expiry = columns.expiry(row)
        live = columns.kind(row) == PUT or (columns.kind(row) == PUT_EXPIRING and expiry > self._clock())
        return (columns.values[row], expiry) if live else None

    def version_of(self, key: bytes) -> int:
        """The version of the key's value; 0 when the key does not exist."""
        found = self.get_versioned(key)
        return 0 if found is None else found[1]

    def sources(self) -> list[Source]:
        """All parts that a scan merges, oldest first."""
        found: list[Source] = [self._merged] if self._merged is not None else [*reversed(self._parts)]
        found += [memtable for memtable in self.frozen if memtable]
        if self.active:
            found.append(self.active)
        return found

    def memtables(self) -> list[Memtable]:
        """Oldest first."""
        return [*self.frozen, self.active]

    @property
    def in_tables(self) -> bool:
        """All that was applied is in tables, records too."""
        return not (len(self.active) or self.frozen) and (self.records is None or self.records.in_tables)

    def freeze(self) -> Memtable:
        """Put a new memtable in the place of the active one, which becomes the youngest frozen one."""
        frozen = self.active
        self.frozen.append(frozen)
        self.active = Memtable(ordered=frozen.ordered)
        return frozen

    def set_levels(self, levels: Sequence[Sequence[Table | ClippedTable]], *, same_rows: bool = False) -> None:
        """Level 0 oldest first, the others in key order.

        `same_rows`: reads find what they found before, as after a flush, once the memtable is gone, or a compaction.
        """
        self.level0 = list(levels[0]) if levels else []
        self.sorted_levels = [SortedRun(tables) for tables in levels[1:]]
        self._parts = (*reversed(self.level0), *filter(len, self.sorted_levels))
        self._tables = TableLookup(self._parts)
        if self._merged is not None:
            self._merged.close()
            self._merged = None
        if self.rows is not None and len(self._parts) > 1:
            self._merged = MergedTables(self._parts[::-1], self.rows.blocks)
        if self.rows is not None and not same_rows:
            self.rows.clear()

    def share_levels(self, other: Tablet) -> None:
        """Have the levels that the other has now."""
        self.level0, self.sorted_levels = list(other.level0), list(other.sorted_levels)
        self._parts, self._tables, self._merged = other._parts, other._tables, other._merged

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
        """(value, version)."""
        found = self._tables.find(key)
        if found is None:
            return None
        columns, row = found
        kind = columns.kind(row)
        if kind == PUT or (kind == PUT_EXPIRING and columns.expiry(row) > self._clock()):
            return columns.values[row], columns.version(row)
        return None
