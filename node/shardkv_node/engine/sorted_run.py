"""`SortedRun`: tables that do not overlap, in key order, seen as one source. A level below level 0 is one.

A look-up asks one table, and a scan opens only the tables it passes through, one after the other: so a level of
a hundred tables costs a merge no more than one table does.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence

from shardkv_node.engine.clipped_table import ClippedTable
from shardkv_node.engine.columns import Columns
from shardkv_node.engine.table_reader import Table


class SortedRun:
    """A `Source` over disjoint tables. Requires: ascending by key, no two overlap."""

    __slots__ = ("_highs", "_lows", "tables")

    def __init__(self, tables: Sequence[Table | ClippedTable]) -> None:
        self.tables = list(tables)
        self._lows = [table.meta.low for table in self.tables]
        self._highs = [table.meta.high for table in self.tables]

    def __len__(self) -> int:
        return len(self.tables)

    def chunks(self, start: bytes, stop: bytes | None, *, reverse: bool, hold: bool = True) -> Iterator[Columns]:
        """The rows with keys in [start, stop); see `Source`."""
        tables = self._between(start, stop)
        for table in reversed(tables) if reverse else tables:
            yield from table.chunks(start, stop, reverse=reverse, hold=hold)

    def partition_ends(self) -> list[bytes]:
        """As `Table.partition_ends`, of all tables; in any order when some are clipped."""
        return [end for table in self.tables for end in table.partition_ends()]

    def block_ends(self, start: bytes, stop: bytes) -> list[bytes]:
        """As `Table.block_ends`, of the tables with rows there; in any order when some are clipped."""
        return [end for table in self._between(start, stop) for end in table.block_ends(start, stop)]

    def _between(self, start: bytes, stop: bytes | None) -> list[Table | ClippedTable]:
        """The tables that may have rows in [start, stop)."""
        low = bisect_right(self._highs, start)
        high = len(self.tables) if stop is None else bisect_left(self._lows, stop)
        return self.tables[low:high]
