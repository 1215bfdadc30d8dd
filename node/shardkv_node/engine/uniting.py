"""`Uniting`: the records of tokens of two tablets become those of the merged one, in passes, while they are written to.

    first   all the records in tables, for the lowest level
    next    the lanes with records in what flushes have made since; each such pass has the next higher level
    last    as those, with both tablets fenced and all they were told in tables, for level 0

So what is done while writes are refused does not grow with the number of lanes. For a lane of a later pass the other
tablet's record is looked up, and both are united anew: what an earlier pass came to is not read, but hidden.

Invariants:
  - a lane that no later pass has stood still in both tablets since an earlier one: all passes together come to what
    one at the end would, but for records that have ended meanwhile;
  - the tables made are in nobody's levels, and those to read are pinned, until `release`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from shardkv.errors import ShardKVError
from shardkv_node.engine.compaction_picker import Levels, runs_of
from shardkv_node.engine.maintenance import Maintenance
from shardkv_node.engine.table_meta import TableMeta
from shardkv_node.engine.tablet import Tablet

PASSES_MAX = 4
LANES_MAX = 500
"""The last pass should have no more than about so many lanes."""

Outcome = dict[int, list[TableMeta]] | ShardKVError


class Uniting:
    """`begin` pass after pass until it is not `behind`, then the last one. Runs one job at a time."""

    def __init__(
        self, maintenance: Maintenance, sources: tuple[Tablet, Tablet], merged: int, boundary: bytes | int
    ) -> None:
        self.passes = 0
        """Begun so far."""
        self.levels: list[list[TableMeta]] = [[] for _ in range(PASSES_MAX)]
        """What was made."""
        self._maintenance = maintenance
        self._sources = sources
        self._merged = merged
        self._boundary = boundary
        self._watched: list[int | None] = [None, None]
        """The tablets with the records whose flushes are noted; None: there was none yet."""
        self._new: list[list[TableMeta]] = [[], []]
        """What no pass has had of either tablet's records; pinned."""
        self._ended = False

    @property
    def behind(self) -> bool:
        """Another pass is worth its while before the last one."""
        return self.passes == 0 or (self.passes < PASSES_MAX - 1 and self._lanes_left() > LANES_MAX)

    def begin(self, ended: Callable[[ShardKVError | None], None], *, last: bool = False) -> bool:
        """Begin a pass; `ended` is called at its end, with what went wrong. False: there is nothing to do in it."""
        level = 0 if last else PASSES_MAX - 1 - self.passes
        whole = [self._watch(side) for side in (0, 1)]
        new, self._new = self._new, [[], []]
        runs = [runs_of(levels) for levels in whole] if self.passes == 0 else [[[meta] for meta in one] for one in new]
        looked_up = ([], []) if self.passes == 0 else (runs_of(whole[0]), runs_of(whole[1]))
        self.passes += 1
        if not any(runs):
            self._maintenance.unpin(new)
            return False
        held = [new, *whole]
        for levels in whole:
            self._maintenance.pin(levels)
        done = partial(self._pass_ended, held, level, ended)
        self._maintenance.submit_unite((runs[0], runs[1]), looked_up, self._merged, self._boundary, done)
        return True

    def release(self) -> None:
        """No more passes. The tables made stay; those of a pass under way are discarded when it ends."""
        self._ended = True
        for number in self._watched:
            if number is not None:
                self._maintenance.on_flushed.pop(number, None)
        self._maintenance.unpin(self._new)
        self._new = [[], []]

    def _watch(self, side: int) -> Levels:
        """The levels of its records, of whose flushes it is told from now on."""
        records = self._sources[side].records
        if records is None:
            return []
        levels = self._maintenance.levels_of(records.number)
        if self._watched[side] is None:
            self._watched[side] = records.number
            self._maintenance.on_flushed[records.number] = partial(self._note_flushed, side)
            self._note_flushed(side, [meta for run in runs_of(levels) for meta in run])
        return levels

    def _note_flushed(self, side: int, metas: list[TableMeta]) -> None:
        self._maintenance.pin([metas])
        self._new[side] += metas

    def _lanes_left(self) -> int:
        """At most so many lanes no pass has had."""
        records = [tablet.records for tablet in self._sources if tablet.records is not None]
        in_memory = sum(len(memtable) for one in records for memtable in one.memtables())
        return in_memory + sum(meta.count for metas in self._new for meta in metas)

    def _pass_ended(
        self,
        held: Sequence[Sequence[Sequence[TableMeta]]],
        level: int,
        ended: Callable[[ShardKVError | None], None],
        outcome: Outcome,
    ) -> None:
        for levels in held:
            self._maintenance.unpin(levels)
        if isinstance(outcome, ShardKVError):
            ended(outcome)
            return
        metas = [meta for found in outcome.values() for meta in found]
        if self._ended:
            self._maintenance.discard_tables(metas)
        else:
            self.levels[level] = metas
        ended(None)
