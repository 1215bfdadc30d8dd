"""`ClippedTable`: a table of which only the rows with keys in [start, stop) are seen.

Two tablets made by a split share the files of their parent this way, and a compaction of a part of the keys leaves the
rest of its inputs in place. What lies outside the clip costs disk space until a compaction has rewritten the inside.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator

from shardkv_node.engine.columns import Columns
from shardkv_node.engine.table_meta import TableMeta
from shardkv_node.engine.table_reader import Partition, Table


class ClippedTable:
    """A `Source`, and reads like `Table`. `meta` carries the clip; the table may be shared by several views."""

    __slots__ = ("_start", "_stop", "meta", "table")

    def __init__(self, table: Table, meta: TableMeta) -> None:
        self.table = table
        self.meta = meta
        self._start = meta.start
        self._stop = meta.high

    def find_in(self, partition: Partition, key: bytes) -> tuple[Columns, int] | None:
        """As `Table.find_in`."""
        return self.table.find_in(partition, key) if self._start <= key < self._stop else None

    def partition(self, number: int) -> Partition:
        """As `Table.partition`."""
        return self.table.partition(number)

    def partition_stops(self) -> tuple[list[bytes], int]:
        """As `Table.partition_stops`, for the partitions that may hold rows of the clip."""
        stops, _ = self.table.partition_stops()
        first, last = bisect_right(stops, self._start), bisect_left(stops, self._stop)
        return [*stops[first:last], self._stop], first

    def chunks(self, start: bytes, stop: bytes | None, *, reverse: bool, hold: bool = True) -> Iterator[Columns]:
        """The rows with keys in [start, stop) that the clip lets through; see `Source`."""
        start = max(start, self._start)
        stop = self._stop if stop is None else min(stop, self._stop)
        return self.table.chunks(start, stop, reverse=reverse, hold=hold) if start < stop else iter(())

    def partition_ends(self) -> list[bytes]:
        """As `Table.partition_ends`, those outside the clip too."""
        return self.table.partition_ends()

    def block_ends(self, start: bytes, stop: bytes) -> list[bytes]:
        """As `Table.block_ends`, those outside the clip too."""
        return self.table.block_ends(start, stop)

    def points(self) -> Iterator[tuple[bytes, int]]:
        """As `Table.points`, for the partitions that may hold rows of the clip."""
        for last_key, size in self.table.points():
            if last_key >= self._start:
                yield last_key, size
            if last_key >= self._stop:
                return


def view(table: Table, meta: TableMeta) -> Table | ClippedTable:
    """The rows of the table that `meta` lets through."""
    return ClippedTable(table, meta) if meta.clipped else table
