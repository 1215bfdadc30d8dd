"""Which tables to compact next: leveled compaction as a pure function of the tables there are.

Level 0 holds flushed tables, oldest first, which may overlap. Level 1 and deeper hold disjoint tables in key order.
Data in a deeper level is older. Level 0 is full at `l0_trigger` tables, level n >= 1 at
`level1_bytes_max * level_multiplier ** (n - 1)` bytes. The fullest level is compacted into the next one:
  - level 0: its tables with what they overlap in level 1;
  - level n: one table with what it overlaps in level n + 1, the tables taking turns in key order.
When no level is full, a table dense with deletes goes down, or is rewritten where it is when nothing lies below it.

No task is larger than about `task_bytes_max`: one that would be is cut at a key (`narrow`), and its inputs stay where
they are, clipped to what was not merged yet. On level 0 the rest of such a task is told by its clip and goes first.

Invariant (`check_levels`): a level below 0 is in key order and disjoint. A task keeps it: its inputs hold, on the
output level, every table that overlaps any of its inputs.
The design is LevelDB's, as its implementation notes describe it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile

from shardkv_node.engine.table_meta import TableMeta

LEVELS_MAX = 7
"""Level 0 to level 6; the last one is never full. With a multiplier of 10 it holds anything a disk does."""

Levels = Sequence[Sequence[TableMeta]]
Points = Callable[[TableMeta], Iterable[tuple[bytes, int]]]
"""Ascending (key, bytes of the table up to this key since the point before), from its index."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PickerOptions:
    """When a level is full, and how large a task may be."""

    l0_trigger: int = 4
    level1_bytes_max: int = 64 * 1024 * 1024
    level_multiplier: int = 10
    task_bytes_max: int = 128 * 1024 * 1024
    dense_tombstones_min: int = 1024
    """A table with this many deletes, and as many deletes as puts, is compacted early."""
    one_codec: bool = False
    """The bottom is compressed like the levels above: then tables may move there as they are."""


@dataclass(frozen=True, slots=True)
class CompactionTask:
    """Replace the rows with keys in [start, stop) of all `inputs` by what their merge gives, on `output_level`."""

    level: int
    """The level that was full."""
    output_level: int
    runs: list[list[TableMeta]]
    """Oldest first; inside a run disjoint and in key order."""
    bottommost: bool
    """No table outside the inputs holds older rows in their key range: deletes may be dropped."""
    cursor: bytes
    """Pass it as `cursors[level]` the next time."""
    start: bytes = b""
    stop: bytes | None = None
    move: bool = False
    """The inputs can stand on the output level as they are: nothing need be read or written."""

    @property
    def inputs(self) -> list[TableMeta]:
        return [table for run in self.runs for table in run]


def no_points(meta: TableMeta) -> Iterable[tuple[bytes, int]]:
    """Nothing known of the inside of tables: they are never cut."""
    return ((meta.last_key, meta.size),)


def pick(
    levels: Levels,
    options: PickerOptions,
    cursors: Mapping[int, bytes] | None = None,
    points: Points = no_points,
) -> CompactionTask | None:
    """The compaction that is most needed, or None when no level is full and no table is dense with deletes.

    `cursors`: per level the `cursor` of its last task, so that tables take turns; forgetting it is harmless.
    """
    fullness = [(_fullness(levels, level, options), -level) for level in range(min(len(levels), LEVELS_MAX - 1))]
    worst, negative_level = max(fullness, default=(0.0, 0))
    if worst < 1:
        return _pick_dense(levels, options, points)
    level = -negative_level
    if level == 0:
        return _push_level0(levels, options, points)
    return _push(levels, level, _next_in_turn(levels[level], (cursors or {}).get(level, b"")), options, points)


def pick_all(
    levels: Levels, options: PickerOptions | None = None, start: bytes = b"", points: Points = no_points
) -> CompactionTask | None:
    """The next compaction on the way of everything into the deepest level in use, at keys from `start`.

    The one after it starts at the `stop` of this one; None: that was the last. Returns None when nothing would change.
    """
    options = options or PickerOptions()
    deepest = max((level for level, tables in enumerate(levels) if tables), default=0)
    upper = any(tables for tables in levels[:deepest])
    settled = not any(
        table.tombstones or table.expiring or table.clipped for table in (levels[deepest] if levels else ())
    )
    if deepest > 0 and not upper and settled:
        return None
    return pick_part(levels, options, start, points)


def pick_part(levels: Levels, options: PickerOptions, start: bytes, points: Points) -> CompactionTask | None:
    """All tables of all levels, for keys from `start` up to where about `task_bytes_max` are read; None: no more."""
    deepest = max((level for level, tables in enumerate(levels) if tables), default=0)
    runs = runs_of(levels, start)
    if not runs:
        return None
    task = CompactionTask(0, max(1, deepest), runs, bottommost=True, cursor=b"", start=start)
    return narrow(levels, task, options, points)


def runs_of(levels: Levels, start: bytes = b"") -> list[list[TableMeta]]:
    """All tables with keys from `start` on as runs, oldest first."""
    runs = [_overlapping(levels, level, start, None) for level in range(len(levels) - 1, 0, -1)]
    runs += [[table] for table in _overlapping(levels, 0, start, None)]
    return [run for run in runs if run]


def narrow(levels: Levels, task: CompactionTask, options: PickerOptions, points: Points) -> CompactionTask:
    """The first part of the task in key order that reads about `task_bytes_max`; all of it when that is little."""
    left_bytes = sum(table.size for table in task.inputs)
    if left_bytes <= options.task_bytes_max * 3 // 2:
        return task
    taken_bytes, lowest = 0, max(task.start, _key_range(task.inputs)[0])
    for key, size in heapq.merge(*(points(table) for table in task.inputs)):
        if key < lowest:
            continue
        taken_bytes += size
        if taken_bytes >= options.task_bytes_max and left_bytes - taken_bytes > options.task_bytes_max // 2:
            return _cut(levels, task, key)
    return task


def replaced(levels: Levels, task: CompactionTask, outputs: Sequence[TableMeta]) -> list[tuple[int, TableMeta]]:
    """What an edit that removes the files of the inputs must add: the outputs, and what the inputs keep."""
    inputs = set(task.inputs)
    names = {table.file_name for table in inputs}
    kept = [
        (level, piece)
        for level, tables in enumerate(levels)
        for table in tables
        if table.file_name in names
        for piece in (_left(table, task) if table in inputs else [table])
    ]
    return [*kept, *((task.output_level, table) for table in (task.inputs if task.move else outputs))]


def check_levels(levels: Levels) -> list[str]:
    """What breaks the invariant, one sentence each; empty when it holds."""
    return [
        f"Level {number}: {one.file_name} ends at {one.last_key!r} but {two.file_name} begins at {two.first_key!r}."
        for number, tables in enumerate(levels)
        if number > 0
        for one, two in pairwise(tables)
        if one.high > two.low
    ]


def _left(table: TableMeta, task: CompactionTask) -> list[TableMeta]:
    return [] if task.move else table.without(task.start, task.stop)


# --- level 0 ---


def _push_level0(levels: Levels, options: PickerOptions, points: Points) -> CompactionTask:
    """The oldest tables of level 0 with one clip: all of them, or the rest of a task that was cut."""
    oldest = levels[0][0].start
    upper = list(takewhile(lambda table: table.start == oldest, levels[0]))
    return _task(levels, 0, [[table] for table in upper], options, points)


# --- deeper levels ---


def _push(levels: Levels, level: int, table: TableMeta, options: PickerOptions, points: Points) -> CompactionTask:
    return _task(levels, level, [[table]], options, points)


def _pick_dense(levels: Levels, options: PickerOptions, points: Points) -> CompactionTask | None:
    for level, tables in enumerate(levels):
        for table in tables:
            if table.tombstones < options.dense_tombstones_min or 2 * table.tombstones < table.count:
                continue
            if level == 0:
                return _push_level0(levels, options, points)
            if _nothing_below(levels, level, table.low, table.high):
                task = CompactionTask(level, level, [[table]], bottommost=True, cursor=table.last_key)
                return narrow(levels, task, options, points)
            return _push(levels, level, table, options, points)
    return None


def _task(
    levels: Levels, level: int, upper_runs: list[list[TableMeta]], options: PickerOptions, points: Points
) -> CompactionTask:
    upper = [table for run in upper_runs for table in run]
    lower = _overlapping(levels, level + 1, *_key_range(upper))
    bottommost = _nothing_below(levels, level + 1, *_key_range([*upper, *lower]))
    runs = [lower, *upper_runs] if lower else upper_runs
    task = CompactionTask(level, level + 1, runs, bottommost, upper[-1].last_key)
    if not lower and _may_move(level, upper, options, bottommost=bottommost):
        return replace(task, move=True)
    return narrow(levels, task, options, points)


def _may_move(level: int, upper: list[TableMeta], options: PickerOptions, *, bottommost: bool) -> bool:
    """Whether tables that overlap nothing below may stand there unread: at the bottom deletes and codec are wrong."""
    if bottommost and (any(table.tombstones for table in upper) or (level == 0 and not options.one_codec)):
        return False
    ascending = sorted(upper, key=lambda table: table.low)
    return all(one.high <= two.low for one, two in pairwise(ascending))


def _cut(levels: Levels, task: CompactionTask, key: bytes) -> CompactionTask:
    """The part of the task up to and with `key`."""
    stop = key + b"\0"
    runs = [[table for table in run if table.low < stop] for run in task.runs]
    runs = [run for run in runs if run]
    low, high = _key_range([table for run in runs for table in run])
    bottommost = task.bottommost or _nothing_below(levels, task.output_level, low, min(high, stop))
    return replace(task, runs=runs, bottommost=bottommost, cursor=key, stop=stop)


def _fullness(levels: Levels, level: int, options: PickerOptions) -> float:
    if level == 0:
        return len({table.file_name for table in levels[0]}) / options.l0_trigger
    bytes_max = options.level1_bytes_max * int(options.level_multiplier ** (level - 1))
    return sum(table.size for table in levels[level]) / bytes_max


def _next_in_turn(tables: Sequence[TableMeta], cursor: bytes) -> TableMeta:
    return next((table for table in tables if table.low > cursor), tables[0])


def _key_range(tables: Sequence[TableMeta]) -> tuple[bytes, bytes]:
    """[low, high) that holds all rows of the tables."""
    return min(table.low for table in tables), max(table.high for table in tables)


def _overlapping(levels: Levels, level: int, low: bytes, high: bytes | None) -> list[TableMeta]:
    if level >= len(levels):
        return []
    return [table for table in levels[level] if (high is None or table.low < high) and table.high > low]


def _nothing_below(levels: Levels, level: int, low: bytes, high: bytes) -> bool:
    return not any(_overlapping(levels, deeper, low, high) for deeper in range(level + 1, len(levels)))
