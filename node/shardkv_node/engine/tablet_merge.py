"""Merges of two tablets into one, the reverse of a split.

Tablets with adjacent key ranges (`at_key`) share their files with the merged one, level by level and clipped to their
side of the key: nothing is rewritten. Tablets whose keys interleave, those of a keyspace that is split by hash tokens,
are rewritten by jobs while they go on being written to (rewriting.py). Either way the records of tokens of both are
united by a job at the end, since of a lane that both have the higher number counts, and not the newer row (dedupe.py).

Both tablets are fenced for the last stretch, and stay, fenced, once the merged one is there, until their owner drops
them or, to take the merge back, the merged one.

Invariants:
  - rows keep their versions, and the merged tablet goes on with the higher seqno of both: later writes get higher ones;
  - the two have no key in common: of a tablet merged at a key only what lies on its side of it is taken over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest

from shardkv.errors import ShardKVError
from shardkv_node.engine.compaction_picker import CompactionTask
from shardkv_node.engine.maintenance import Maintenance
from shardkv_node.engine.rewriting import JobTables, Levels, Rewriting
from shardkv_node.engine.table_meta import TableMeta
from shardkv_node.engine.tablet import Tablet
from shardkv_node.engine.tablet_split import cut_levels


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
        self._held: Sequence[Levels] | None = None
        """Pinned for the job that unites the records."""
        self._records: list[TableMeta] | None = None
        """What that job made; None: it was not begun, or has not ended."""

    def _submit(self, task: CompactionTask, ended: Callable[[JobTables | ShardKVError], None], *, first: bool) -> None:
        self._maintenance.submit_merge(task, self.merged.number, ended, drop_tombstones=first)

    def _finish(self) -> bool:
        if self._records is None:
            self._unite()
            return False
        if isinstance(self._boundary, bytes):
            left, right = (self._maintenance.levels_of(tablet.number) for tablet in self.sources)
            levels = joined_levels(left, right, self._boundary)
        else:
            levels = self._outputs[self.merged.number]
        self._install(self, levels, [[], self._records])
        return True

    def _unite(self) -> None:
        levels = [
            [] if tablet.records is None else self._maintenance.levels_of(tablet.records.number)
            for tablet in self.sources
        ]
        self._held = levels
        for one in levels:
            self._maintenance.pin(one)
        self._job_running = True
        self._maintenance.submit_unite((levels[0], levels[1]), self.merged.number, self._boundary, self._united)

    def _united(self, outcome: JobTables | ShardKVError) -> None:
        self._job_running = False
        for one in self._held or ():
            self._maintenance.unpin(one)
        self._held = None
        if isinstance(outcome, ShardKVError):
            self.give_up(outcome)
            return
        metas = [meta for found in outcome.values() for meta in found]
        if self.outcome is not None:
            self._maintenance.discard_tables(metas)
            return
        self._records = metas
        self.advance()

    def _unused(self) -> list[TableMeta]:
        return [*super()._unused(), *(self._records or ())]
