"""`MergedTables`: all tables of one tablet as one source, merged once and not again by every scan.

A scan over several overlapping runs pays for the merge more than for all else. So the merged rows are kept in the
block cache, cut into stretches of keys. Tables never change, so a stretch is right for as long as these are the tables
of the tablet. Where the cuts are:

  - a segment ends where a partition of any table ends: all ends are in memory, in the top indexes;
  - a stretch ends at every second of the ends of blocks, of all tables, inside a segment. So it takes from each run a
    part of two or three blocks, wherever the keys lie.

Invariants:
  - a stretch holds the newest row of each key. Deletes are left out, since nothing older is anywhere below these
    tables; but a desert of them stays, so that a page over it ends as soon as any page does;
  - versions are not kept (0), and rows that expired are left to the reader.

A stretch takes the place of the blocks it was made of, so that little is in the cache twice; a get looks for its key
there, too.

With a single run there is nothing to merge and nothing is kept: a scan reads its blocks.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence

from shardkv_node.engine.block_cache import BlockCache, columns_charge, keys_charge
from shardkv_node.engine.clipped_table import ClippedTable
from shardkv_node.engine.columns import DELETE, NO_EXPIRY, PUT, Columns, concat
from shardkv_node.engine.merge import merge_newest, without_tombstones
from shardkv_node.engine.sorted_run import SortedRun
from shardkv_node.engine.table_reader import Table

BLOCKS_PER_STRETCH = 2
SHORT_STEPS = 2
"""A scan that finds nothing kept takes so many stretches one at a time, then makes 2 at once, 4..."""
STEPS_MOST = 5
"""...up to 16."""
DELETES_SHARE = 2
"""Deletes stay where they are at least one of so many rows."""
_SEGMENT_BITS = 16
_CUTS = (1 << _SEGMENT_BITS) - 1
"""In the place of a stretch: the ends of all stretches of the segment."""

_NO_ROW = Columns([b""], DELETE, 0, NO_EXPIRY, [b""])

Run = Table | ClippedTable | SortedRun


class MergedTables:
    """A `Source`. Belongs to the owner of the store. `close` it when these are no more the tables of the tablet."""

    __slots__ = (
        "_cache",
        "_cache_base",
        "_closed",
        "_reserved_bytes",
        "_resident",
        "_runs",
        "_segment_ends",
        "any_kept",
    )

    def __init__(self, runs: Sequence[Run], cache: BlockCache) -> None:
        """`runs`: oldest first, more than one."""
        self._runs = runs
        self._cache = cache
        self._cache_base = cache.new_base()
        self._segment_ends: list[bytes] = sorted({end for run in runs for end in run.partition_ends()})
        self._resident: list[list[bytes] | None] = [None] * len(self._segment_ends)
        """Of each segment the ends of its stretches, if there is room to keep them for good."""
        self._reserved_bytes = 0
        self._closed = False
        self.any_kept = False
        """Whether `find` may find anything."""

    def close(self) -> None:
        """Give the memory of what is kept back. A snapshot may read on, and has nothing kept for good any more."""
        self._closed = True
        self._cache.forget(self._cache_base)
        self._cache.release(self._reserved_bytes)
        self._reserved_bytes = 0
        self._resident = [None] * len(self._segment_ends)

    def chunks(self, start: bytes, stop: bytes | None, *, reverse: bool) -> Iterator[Columns]:
        """The newest rows with keys in [start, stop), a stretch at a time; see `Source`."""
        for columns in self._backward(start, stop) if reverse else self._forward(start, stop):
            keys = columns.keys
            if not keys:
                continue
            first = 0 if keys[0] >= start else bisect_left(keys, start)
            end = len(keys) if stop is None or keys[-1] < stop else bisect_left(keys, stop)
            if end - first == len(keys):
                yield columns
            elif first < end:
                yield columns.slice(first, end)

    def find(self, key: bytes) -> tuple[Columns, int] | None:
        """The row of the key, or one of a delete if there is none, when its stretch is kept; else None. No version."""
        segment = bisect_left(self._segment_ends, key)
        base = self._cache_base + (segment << _SEGMENT_BITS)
        known = segment < len(self._segment_ends)
        ends: list[bytes] | None = (self._resident[segment] or self._cache.get(base + _CUTS)) if known else None
        columns: Columns | None = None if ends is None else self._cache.get(base + bisect_left(ends, key))
        if columns is None:
            return None
        row = bisect_left(columns.keys, key)
        return (columns, row) if row < len(columns.keys) and columns.keys[row] == key else (_NO_ROW, 0)

    def _forward(self, start: bytes, stop: bytes | None) -> Iterator[Columns]:
        """The stretches that may hold keys of [start, stop), ascending."""
        held, steps = self._cache.get, 0
        for segment in range(bisect_left(self._segment_ends, start), len(self._segment_ends)):
            ends = self._ends(segment)
            base = self._cache_base + (segment << _SEGMENT_BITS)
            number = bisect_left(ends, start)
            while number < len(ends):
                columns = held(base + number)
                if columns is not None:
                    yield columns
                    number += 1
                    steps = max(steps, SHORT_STEPS)
                elif steps < SHORT_STEPS:
                    yield self._glance(segment, ends, number, start, stop)
                    number += 1
                    steps += 1
                else:
                    made = self._make(segment, ends, number, self._gap_end(base, number, steps, len(ends)))
                    yield from made
                    number += len(made)
                    steps = min(steps + 1, STEPS_MOST)
                if stop is not None and ends[number - 1] >= stop:
                    return

    def _backward(self, start: bytes, stop: bytes | None) -> Iterator[Columns]:
        """The same, descending."""
        held, steps = self._cache.get, 0
        last = len(self._segment_ends) - 1
        for segment in range(last if stop is None else min(bisect_left(self._segment_ends, stop), last), -1, -1):
            ends = self._ends(segment)
            base = self._cache_base + (segment << _SEGMENT_BITS)
            number = len(ends) if stop is None else min(bisect_left(ends, stop) + 1, len(ends))
            while number:
                if ends[number - 1] < start:
                    return
                columns = held(base + number - 1)
                if columns is not None:
                    yield columns
                    number -= 1
                    steps = max(steps, SHORT_STEPS)
                elif steps < SHORT_STEPS:
                    number -= 1
                    steps += 1
                    yield self._glance(segment, ends, number, start, stop)
                else:
                    made = self._make(segment, ends, self._gap_start(base, number, steps), number)
                    yield from reversed(made)
                    number -= len(made)
                    steps = min(steps + 1, STEPS_MOST)

    def _gap_end(self, base: int, number: int, steps: int, last: int) -> int:
        """Where the stretches to be made now end, the first being this one: before one that is kept."""
        wanted = range(number + 1, min(number + (1 << (steps - 1)), last))
        return next((other for other in wanted if base + other in self._cache), wanted.stop)

    def _gap_start(self, base: int, number: int, steps: int) -> int:
        """Where the stretches to be made now start, the last being the one before this: after one that is kept."""
        wanted = range(number - 2, max(number - (1 << (steps - 1)), 0) - 1, -1)
        return next((other + 1 for other in wanted if base + other in self._cache), wanted.stop + 1)

    def _start_of(self, segment: int, ends: list[bytes], number: int) -> bytes:
        if number:
            return ends[number - 1] + b"\0"
        return self._segment_ends[segment - 1] + b"\0" if segment else b""

    def _ends(self, segment: int) -> list[bytes]:
        """The last key of each stretch of the segment."""
        place = self._cache_base + (segment << _SEGMENT_BITS) + _CUTS
        ends: list[bytes] | None = self._resident[segment] or self._cache.get(place)
        if ends is None:
            start, stop = self._start_of(segment, [], 0), self._segment_ends[segment]
            found = sorted({end for run in self._runs for end in run.block_ends(start, stop)} | {stop})
            ends = found[::-BLOCKS_PER_STRETCH][::-1]
            charge = keys_charge(len(ends), sum(map(len, ends)))
            if not self._closed and self._cache.reserve(charge):
                self._reserved_bytes += charge
                self._resident[segment] = ends
            else:
                self._cache.put(place, ends, charge)
        return ends

    def _glance(self, segment: int, ends: list[bytes], number: int, start: bytes, stop: bytes | None) -> Columns:
        """The rows of a stretch with keys in [start, stop), or all of them.

        Made into a stretch only if its blocks were held, but for one at most, so read before, not long ago: of short
        scans all over the place nothing but the blocks is kept.
        """
        misses = self._cache.misses
        low, high = self._start_of(segment, ends, number), ends[number] + b"\0"
        columns = self._read(max(low, start), high if stop is None else min(high, stop), hold=True)
        return columns if self._cache.misses > misses + 1 else self._make(segment, ends, number, number + 1)[0]

    def _make(self, segment: int, ends: list[bytes], low: int, high: int) -> list[Columns]:
        """Merge and keep the stretches [low, high) of a segment, and let their blocks go: gets look here too."""
        self.any_kept = True
        merged = self._read(self._start_of(segment, ends, low), ends[high - 1] + b"\0", hold=False)
        place = self._cache_base + (segment << _SEGMENT_BITS)
        made, first = [], 0
        for number in range(low, high):
            end = bisect_right(merged.keys, ends[number], first)
            columns = merged.slice(first, end)
            raw_bytes = sum(map(len, columns.keys)) + sum(map(len, columns.values))
            self._cache.put(place + number, columns, columns_charge(end - first, raw_bytes))
            made.append(columns)
            first = end
        return made

    def _read(self, start: bytes, stop: bytes, *, hold: bool) -> Columns:
        """The newest row of each key in [start, stop), see `_merge`. `hold`: have blocks kept."""
        parts = [list(run.chunks(start, stop, reverse=False, hold=hold)) for run in self._runs]
        return _merge([concat(part) for part in parts if part])


def _merge(parts: list[Columns]) -> Columns:
    """The newest row of each key, without versions, and without deletes unless they are many. `parts`: oldest first."""
    if all(part.kinds == PUT and part.expiries == NO_EXPIRY for part in parts):
        newest: dict[bytes, bytes] = {}
        for part in parts:
            newest.update(zip(part.keys, part.values, strict=True))
        keys = sorted(newest)
        return Columns(keys, PUT, 0, NO_EXPIRY, list(map(newest.__getitem__, keys)))
    versionless = [Columns(part.keys, part.kinds, 0, part.expiries, part.values) for part in parts]
    merged = merge_newest(versionless, drop_tombstones=False)
    live = without_tombstones(merged)
    return live if len(live) * DELETES_SHARE > len(merged) else merged
