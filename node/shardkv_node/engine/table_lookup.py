"""`TableLookup`: finds one key in all tables of a tablet, youngest first. Flat, since every read that misses runs it.

Each run of tables (a table of level 0, a whole sorted level) is one list of the ends of its partitions and one of the
partitions themselves, as far as the tables hold them for good: so a run that does not have the key costs a bisect and a
test of its filter, and no look-up in the cache.

Invariant: a run is asked for the partition whose end is the first above the key; the key is nowhere else in that run.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from xxhash import xxh3_64_intdigest

from shardkv_node.engine.clipped_table import ClippedTable
from shardkv_node.engine.columns import Columns
from shardkv_node.engine.filter import bit_pairs
from shardkv_node.engine.sorted_run import SortedRun
from shardkv_node.engine.table_reader import NOWHERE, Partition, Table


class _Run:
    """The partitions of all tables of one run, one after the other."""

    __slots__ = ("ends", "held", "numbers", "tables")

    def __init__(self, run: Table | ClippedTable | SortedRun) -> None:
        self.ends: list[bytes] = []
        """Exclusive."""
        self.tables: list[Table | ClippedTable] = []
        """For each partition its table."""
        self.numbers: list[int] = []
        """For each partition its number there."""
        for table in run.tables if isinstance(run, SortedRun) else [run]:
            stops, first = table.partition_stops()
            self.ends += stops
            self.tables += [table] * len(stops)
            self.numbers += range(first, first + len(stops))
        self.held: list[Partition | None] = [*([None] * len(self.ends)), NOWHERE]
        """None: ask the table. The last one is for keys above all ends."""

    def partition(self, number: int) -> Partition:
        partition = self.tables[number].partition(self.numbers[number])
        if partition.resident:
            self.held[number] = partition
        return partition


class TableLookup:
    """Over tables that do not change. Belongs to the owner of the store."""

    __slots__ = ("_bit_pairs", "_runs")

    def __init__(self, runs: Sequence[Table | ClippedTable | SortedRun]) -> None:
        """`runs`: youngest first."""
        self._bit_pairs = bit_pairs()
        made = [_Run(run) for run in runs]
        self._runs = [(run.ends, run.held, run) for run in made]

    def find(self, key: bytes) -> tuple[Columns, int] | None:
        """The block with the newest row of the key, deletes included, and the row in it; None when there is none."""
        h, pairs = xxh3_64_intdigest(key), self._bit_pairs
        high, mask = h >> 32, pairs[h & 4095] | pairs[h >> 12 & 4095]
        for ends, held, run in self._runs:
            number = bisect_right(ends, key)
            partition = held[number]
            if partition is None:
                partition = run.partition(number)
            words = partition.filter
            if words[high * len(words) >> 32] & mask == mask:
                found = run.tables[number].find_in(partition, key)
                if found is not None:
                    return found
        return None
