"""Merges of two tablets into one, the reverse of a split.

Tablets with adjacent key ranges (`at_key`) share their files with the merged one, level by level and clipped to their
side of the key: nothing is rewritten. Tablets whose keys interleave, those of a keyspace that is split by hash tokens,
are rewritten by jobs while they go on being written to (rewriting.py). Either way the records of tokens of both are
united by jobs (uniting.py), since of a lane that both have the higher number counts, and not the newer row (dedupe.py).

Both tablets are fenced for the last stretch, and stay, fenced, once the merged one is there, until their owner drops
them or, to take the merge back, the merged one.

Invariants:
  - rows keep their versions, and the merged tablet goes on with the higher seqno of both: later writes get higher ones;
  - the two have no key in common: of a tablet merged at a key only what lies on its side of it is taken over.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest

from shardkv.errors import ShardKVError
from shardkv_node.engine.compaction_picker import CompactionTask
from shardkv_node.engine.maintenance import Maintenance
from shardkv_node.engine.rewriting import JobTables, Levels, Rewriting
from shardkv_node.engine.table_meta import TableMeta
from shardkv_node.engine.tablet import Tablet
from shardkv_node.engine.tablet_split import cut_levels
from shardkv_node.engine.uniting import Uniting


def joined_levels(left: Levels, right: Levels, at_key: bytes) -> Levels:
    """The tables of both, level by level, each clipped to its side of the key."""
    below, above = cut_levels(left, at_key)[0], cut_levels(right, at_key)[1]
    nothing: list[TableMeta] = []
    return [[*one, *other] for one, other in zip_longest(below, above, fillvalue=nothing)]


class TabletMerge(Rewriting):
    """A merge under way. Made by `Store.merge_tablets`; see rewriting.py for how it goes."""

    def __init__(
        self,
        maintenance: Maintenance,
        sources: tuple[Tablet, Tablet],
        merged: Tablet,
        boundary: bytes | int,
        *,
        last_bytes_max: int,
        flush: Callable[[], None],
        in_tables: Callable[[int], bool],
        install: Callable[[TabletMerge, Levels, Levels], None],
    ) -> None:
        """`install` puts the merged tablet in force with these levels, and its records with those; the others as in
        `Rewriting`. `boundary`: a key, where files are shared, or a hash token.
        """
        super().__init__(
            f"The merge of tablets {sources[0].number} and {sources[1].number}",
            maintenance,
            sources,
            [merged],
            last_bytes_max=last_bytes_max,
            flush=flush,
            in_tables=in_tables,
            rewrite=isinstance(boundary, int),
        )
        self.merged = merged
        self._boundary = boundary
        self._install = install
        self._uniting = Uniting(maintenance, sources, merged.number, boundary)
        self._united_last = False

    def _submit(self, task: CompactionTask, ended: Callable[[JobTables | ShardKVError], None], *, first: bool) -> None:
        self._maintenance.submit_merge(task, self.merged.number, ended, drop_tombstones=first)

    def _prepared(self) -> bool:
        due = self._uniting.behind if self._fencing else self._uniting.passes == 0
        if not due:
            return True
        if self._caught_up():
            self._awaited = None
            self._again = not self._unite()
        return False

    def _finish(self) -> bool:
        if not self._united_last:
            self._united_last = True
            if self._unite(last=True):
                return False
        if isinstance(self._boundary, bytes):
            left, right = (self._maintenance.levels_of(tablet.number) for tablet in self.sources)
            levels = joined_levels(left, right, self._boundary)
        else:
            levels = self._outputs[self.merged.number]
        self._install(self, levels, self._uniting.levels)
        return True

    def _unite(self, *, last: bool = False) -> bool:
        """Begin a pass. False: there is nothing to do in it."""
        self._job_running = True
        begun = self._uniting.begin(self._pass_ended, last=last)
        self._job_running = self._job_running and begun
        return begun

    def _pass_ended(self, error: ShardKVError | None) -> None:
        self._job_running = False
        if error is not None:
            self.give_up(error)
        elif self.outcome is None:
            self.advance()

    def _unused(self) -> list[TableMeta]:
        return [*super()._unused(), *(meta for metas in self._uniting.levels for meta in metas)]

    def _release(self) -> None:
        super()._release()
        self._uniting.release()
