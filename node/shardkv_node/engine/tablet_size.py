"""How large a tablet is and where its middle lies, told by the indexes of its tables, without reading a row.

An index knows the last key and the size of each partition of a table, some 64 data blocks, and each partition those of
its blocks. Partitions that lie wholly on one side of a key are counted from what is in memory; of those a key may cut
through, one for each table at most, the partition block is read, which the cache may hold.

How exact: a block that a clip or a middle key cuts through counts on one side, so bytes are off by at most one data
block (`Options.block_bytes` before compression, or one large row) for each table that is cut. Rows and raw bytes of a
table that is cut are taken in proportion to its stored bytes. What the same key has in several tables counts in each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shardkv_node.engine.clipped_table import ClippedTable
from shardkv_node.engine.table_reader import Table
from shardkv_node.engine.tablet import Tablet


@dataclass(frozen=True, slots=True)
class TabletSize:
    """Estimates; exact for what is in unclipped tables and in memory."""

    rows: int
    """Of tables and memtables, deletes included."""
    raw_bytes: int
    """Keys and values of the rows in tables, before compression."""
    stored_bytes: int
    """Of the table files, as far as their rows are this tablet's: files that a split left shared are larger."""
    memtable_bytes: int
    """Memory of the rows that are not in tables."""


def size_of(tablet: Tablet) -> TabletSize:
    """Sums up tables and memtables."""
    rows = sum(map(len, tablet.memtables()))
    raw_bytes = stored_bytes = 0.0
    for table in tablet.tables():
        share = _share(table)
        rows += round(table.meta.count * share)
        raw_bytes += table.meta.raw_bytes * share
        stored_bytes += table.meta.size * share
    memtable_bytes = sum(memtable.resident_bytes for memtable in tablet.memtables())
    return TabletSize(rows, round(raw_bytes), round(stored_bytes), memtable_bytes)


def middle_of(tables: Iterable[Table | ClippedTable]) -> bytes | None:
    """A key with about half of the stored bytes below it and half from it on; None when no key cuts them in two.

    What is in memtables does not count.
    """
    parts = [part for table in tables for part in _parts(table)]
    half = sum(part.size for part in parts) / 2
    low, high = _bracket(parts, half)
    taken = sum(part.size for part in parts if part.last_key <= low)
    # Only what lies around the middle is looked at block by block.
    points = sorted(point for part in parts if part.last_key > low and part.after < high for point in part.blocks())
    best: tuple[float, bytes] | None = None
    last_key = max((part.last_key for part in parts), default=b"")
    for key, size in points:
        taken += size
        if key < last_key and (best is None or abs(taken - half) < best[0]):
            best = (abs(taken - half), key)
    return None if best is None else best[1] + b"\0"


@dataclass(slots=True)
class _Part:
    """A partition, as far as the clip may let it through: keys in (`after`, `last_key`]."""

    table: Table
    number: int
    after: bytes
    last_key: bytes
    size: float
    whole_size: int
    """Without the clip."""
    start: bytes
    stop: bytes | None

    def blocks(self) -> list[tuple[bytes, float]]:
        """(last key, stored bytes) of its blocks that may hold rows of the clip, each with its share of the index."""
        points = list(self.table.block_points(self.number))
        scale = self.whole_size / sum(size for _, size in points)
        found, after = [], self.after
        for key, size in points:
            if key >= self.start and (self.stop is None or after < self.stop):
                found.append((key if self.stop is None else min(key, self.stop), size * scale))
            after = key
        return found


def _parts(table: Table | ClippedTable) -> list[_Part]:
    whole, meta = (table.table, table.meta) if isinstance(table, ClippedTable) else (table, table.meta)
    start, stop = (meta.start, meta.high) if meta.clipped else (b"", None)
    parts, after = [], b""
    for number, (last_key, size) in enumerate(whole.points()):
        if last_key >= start and (stop is None or after < stop):
            part = _Part(whole, number, after, last_key, size, size, start, stop)
            if after < start or (stop is not None and last_key >= stop):
                blocks = part.blocks()
                part.size = sum(size for _, size in blocks)
                part.last_key = blocks[-1][0] if blocks else last_key
            parts.append(part)
        after = last_key
    return parts


def _share(table: Table | ClippedTable) -> float:
    """The part of the table's stored bytes that its clip lets through."""
    if not isinstance(table, ClippedTable):
        return 1.0
    whole = sum(size for _, size in table.table.points())
    return sum(part.size for part in _parts(table)) / whole


def _bracket(parts: Sequence[_Part], half: float) -> tuple[bytes, bytes]:
    """Two keys: below the first lies at most half for sure, below the second at least half."""
    low, taken = b"", 0.0
    for after, size in sorted((part.after, part.size) for part in parts):
        if taken + size > half:
            low = after
            break
        taken += size
    taken = 0.0
    for last_key, size in sorted((part.last_key, part.size) for part in parts):
        taken += size
        if taken >= half:
            return min(low, last_key), last_key
    return low, low
