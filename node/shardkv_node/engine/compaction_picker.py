"""Which tables to compact next: leveled compaction as a pure function of the tables there are.

Level 0 holds flushed tables, oldest first, which may overlap. Level 1 and deeper hold disjoint tables in key order.
Data in a deeper level is older. Level 0 is full at `l0_trigger` tables, level n >= 1 at
`level1_bytes_max * level_multiplier ** (n - 1)` bytes. The fullest level is compacted into the next one:
  - level 0: all its tables with what they overlap in level 1;
  - level n: one table with what it overlaps in level n + 1, the tables taking turns in key order.

Invariant (`check_levels`): a level below 0 is in key order and disjoint. A task keeps it: its inputs hold, on the
output level, every table that overlaps any of its inputs.
The design is LevelDB's, as its implementation notes describe it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from shardkv_node.engine.table_meta import TableMeta

LEVELS_MAX = 7
"""Level 0 to level 6; the last one is never full. With a multiplier of 10 it holds anything a disk does."""

Levels = Sequence[Sequence[TableMeta]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PickerOptions:
    """When a level is full."""

    l0_trigger: int = 4
    level1_bytes_max: int = 64 * 1024 * 1024
    level_multiplier: int = 10


@dataclass(frozen=True, slots=True)
class CompactionTask:
    """Replace all `inputs` by the tables their merge gives, on `output_level`."""

    level: int
    """The level that was full. When the task is done, its last key is the caller's cursor for this level."""
    output_level: int
    runs: list[list[TableMeta]]
    """Oldest first; inside a run disjoint and in key order."""
    bottommost: bool
    """No table outside the inputs holds older rows in their key range: deletes may be dropped."""
    cursor: bytes
    """Pass it as `cursors[level]` the next time."""

    @property
    def inputs(self) -> list[TableMeta]:
        return [table for run in self.runs for table in run]


def pick(levels: Levels, options: PickerOptions, cursors: Mapping[int, bytes] | None = None) -> CompactionTask | None:
    """The compaction that is most needed, or None when no level is full.

    `cursors`: per level the `cursor` of its last task, so that tables take turns; forgetting it is harmless.
    """
    fullness = [(_fullness(levels, level, options), -level) for level in range(min(len(levels), LEVELS_MAX - 1))]
    worst, negative_level = max(fullness, default=(0.0, 0))
    if worst < 1:
        return None
    level = -negative_level
    if level == 0:
        upper = list(levels[0])
        upper_runs = [[table] for table in upper]
    else:
        upper = [_next_in_turn(levels[level], (cursors or {}).get(level, b""))]
        upper_runs = [upper]
    first, last = _key_range(upper)
    lower = _overlapping(levels, level + 1, first, last)
    first, last = _key_range([*upper, *lower])
    bottommost = not any(_overlapping(levels, deeper, first, last) for deeper in range(level + 2, len(levels)))
    runs = [lower, *upper_runs] if lower else upper_runs
    return CompactionTask(level, level + 1, runs, bottommost, upper[-1].last_key)


def pick_all(levels: Levels) -> CompactionTask | None:
    """One compaction of everything into the deepest level in use; None when that would change nothing."""
    deepest = max((level for level, tables in enumerate(levels) if tables), default=0)
    upper = [tables for tables in levels[:deepest] if tables]
    if deepest > 0 and not upper and not any(table.tombstones or table.expiring for table in levels[deepest]):
        return None
    runs = [list(levels[level]) for level in range(deepest, 0, -1) if levels[level]]
    runs += [[table] for table in (levels[0] if levels else [])]
    if not runs:
        return None
    return CompactionTask(0, max(1, deepest), runs, bottommost=True, cursor=b"")


def check_levels(levels: Levels) -> list[str]:
    """What breaks the invariant, one sentence each; empty when it holds."""
    return [
        f"Level {number}: {one.file_name} ends at {one.last_key!r} but {two.file_name} begins at {two.first_key!r}."
        for number, tables in enumerate(levels)
        if number > 0
        for one, two in pairwise(tables)
        if one.last_key >= two.first_key
    ]


def _fullness(levels: Levels, level: int, options: PickerOptions) -> float:
    if level == 0:
        return len(levels[0]) / options.l0_trigger
    bytes_max = options.level1_bytes_max * int(options.level_multiplier ** (level - 1))
    return sum(table.size for table in levels[level]) / bytes_max


def _next_in_turn(tables: Sequence[TableMeta], cursor: bytes) -> TableMeta:
    return next((table for table in tables if table.first_key > cursor), tables[0])


def _key_range(tables: Sequence[TableMeta]) -> tuple[bytes, bytes]:
    """First and last key, both included."""
    return min(table.first_key for table in tables), max(table.last_key for table in tables)


def _overlapping(levels: Levels, level: int, first: bytes, last: bytes) -> list[TableMeta]:
    if level >= len(levels):
        return []
    return [table for table in levels[level] if table.first_key <= last and table.last_key >= first]
