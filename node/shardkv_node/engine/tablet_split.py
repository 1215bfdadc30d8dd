"""Splits of a tablet in two: at a key, where both halves share its files, or at a hash token, where they are rewritten.

A split at a key is one manifest edit (`cut_levels` says what each half has): it reads and writes no table. Each half
sees the files of the whole through a clip, and a compaction of it rewrites what the clip lets through.

A split at a token (`TokenSplit`) streams the tables of the whole once while it goes on being written to, then what was
written meanwhile, and puts the halves in force by one edit at the end.

Either way the whole is dropped by the edit that makes the halves, or it stays, fenced, until its owner drops it or, to
take the split back, the halves.

Invariants:
  - halves come into force when all the tablet was told is in tables, so that nothing of it is left in the log;
  - halves go on with the sequence numbers of the whole, so versions rise across the split;
  - whatever happens, either the whole is in force or both halves are; with `keep_whole` then both, the whole fenced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shardkv.errors import ShardKVError
from shardkv_node.engine.compaction_picker import CompactionTask
from shardkv_node.engine.maintenance import Maintenance
from shardkv_node.engine.rewriting import JobTables, Levels, Rewriting
from shardkv_node.engine.table_meta import TableMeta
from shardkv_node.engine.tablet import Tablet


def cut_levels(levels: Sequence[Sequence[TableMeta]], at_key: bytes) -> tuple[Levels, Levels]:
    """The tables with keys below `at_key` and those with keys from it on, in the same order on the same levels."""
    left = [[piece for meta in metas if (piece := meta.clip(b"", at_key))] for metas in levels]
    right = [[piece for meta in metas if (piece := meta.clip(at_key, None))] for metas in levels]
    return left, right


class TokenSplit(Rewriting):
    """A split at a hash token under way. Made by `Store.split_tablet_by_token`; see rewriting.py for how it goes.

    Both halves get the files of the whole's records of tokens (see dedupe.py).
    """

    def __init__(
        self,
        maintenance: Maintenance,
        tablet: Tablet,
        halves: tuple[Tablet, Tablet],
        token: int,
        *,
        last_bytes_max: int,
        flush: Callable[[], None],
        in_tables: Callable[[int], bool],
        install: Callable[[TokenSplit, Levels, Levels], None],
    ) -> None:
        """`install` puts the halves in force; the others as in `Rewriting`."""
        super().__init__(
            f"The split of tablet {tablet.number}",
            maintenance,
            [tablet],
            halves,
            last_bytes_max=last_bytes_max,
            flush=flush,
            in_tables=in_tables,
        )
        self.tablet = tablet
        self.halves = halves
        self._token = token
        self._install = install

    def _submit(self, task: CompactionTask, ended: Callable[[JobTables | ShardKVError], None], *, first: bool) -> None:
        numbers = self.halves[0].number, self.halves[1].number
        self._maintenance.submit_split(task, numbers, self._token, ended, drop_tombstones=first)

    def _finish(self) -> bool:
        left, right = (self._outputs[half.number] for half in self.halves)
        self._install(self, left, right)
        return True
