"""Splits of a tablet in two: at a key, where both halves share its files, or at a hash token, where they are rewritten.

A split at a key is one manifest edit (`cut_levels` says what each half has): it reads and writes no table. Each half
sees the files of the whole through a clip, and a compaction of it rewrites what the clip lets through.

A split at a token (`TokenSplit`) streams the tables of the whole once, in parts that are jobs of bounded size, and
puts the halves in force by one edit at the end.

Invariants:
  - a tablet is split only when all it was told is in tables, so that nothing of it is left in the log;
  - halves go on with the sequence numbers of the whole, so versions rise across the split;
  - whatever happens, either the whole is in force or both halves are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shardkv.errors import InvalidArgument, ShardKVError
from shardkv_node.engine.maintenance import Maintenance
from shardkv_node.engine.table_meta import TableMeta
from shardkv_node.engine.tablet import Tablet

Levels = list[list[TableMeta]]


def cut_levels(levels: Sequence[Sequence[TableMeta]], at_key: bytes) -> tuple[Levels, Levels]:
    """The tables with keys below `at_key` and those with keys from it on, in the same order on the same levels."""
    left = [[piece for meta in metas if (piece := meta.clip(b"", at_key))] for metas in levels]
    right = [[piece for meta in metas if (piece := meta.clip(at_key, None))] for metas in levels]
    return left, right


class TokenSplit:
    """A split at a hash token under way. Made by `Store.split_tablet_by_token`; `outcome` tells when it has ended.

    It holds the files it reads, so flushes and compactions of the tablet may go on beside it.
    """

    def __init__(
        self,
        maintenance: Maintenance,
        tablet: Tablet,
        halves: tuple[Tablet, Tablet],
        token: int,
        *,
        settled: Callable[[Tablet], bool],
        install: Callable[[TokenSplit, Levels, Levels], None],
    ) -> None:
        """`settled` says whether all the fenced tablet was told is in tables, and sees to it that it soon will be;
        `install` puts the halves in force.
        """
        self.tablet = tablet
        self.halves = halves
        self.outcome: tuple[int, int] | ShardKVError | None = None
        """The numbers of the halves, or why there are none; None while it is under way."""
        self._maintenance = maintenance
        self._token = token
        self._settled = settled
        self._install = install
        self._levels: Levels | None = None
        """What the tablet has, from the moment it was settled."""
        self._outputs: tuple[list[TableMeta], list[TableMeta]] = ([], [])
        self._start: bytes | None = b""
        """Keys below it are done; None: all are."""
        self._job_running = False
        self._advancing = self._again = False

    def advance(self) -> None:
        """Do what can be done now. Called whenever a group was applied or a job has ended; cheap."""
        self._again = True
        if self._advancing:
            return  # a job that ran inline ended: the loop below goes on
        self._advancing = True
        try:
            while self._again and self.outcome is None and not self._job_running:
                self._again = False
                self._step()
        except ShardKVError as error:
            self.give_up(error)
        finally:
            self._advancing = False

    def cancel(self) -> None:
        """Give it up, if it has not ended: the tablet stays as it was and takes writes again."""
        self.give_up(InvalidArgument(f"The split of tablet {self.tablet.number} was cancelled."))

    def give_up(self, error: ShardKVError) -> None:
        """End it with this outcome, unless it has one."""
        if self.outcome is None:
            self.outcome = error
            self.tablet.fenced = False
            self._maintenance.discard_tables([meta for half in self._outputs for meta in half])
            self._release()

    def _step(self) -> None:
        if self._levels is None:
            if not self._settled(self.tablet):
                return
            self._levels = self._maintenance.pin_levels(self.tablet.number)
        task = None if self._start is None else self._maintenance.pick_part(self._levels, self._start)
        if task is None:
            self._put_in_force(self._levels)
            return
        self._job_running = True
        self._start = task.stop
        left, right = self.halves
        self._maintenance.submit_split(task, (left.number, right.number), self._token, self._part_ended)

    def _part_ended(self, outcome: dict[int, list[TableMeta]] | ShardKVError) -> None:
        self._job_running = False
        if isinstance(outcome, ShardKVError):
            self.give_up(outcome)
            return
        for half, metas in zip(self.halves, self._outputs, strict=True):
            metas += outcome.get(half.number, [])
        if self.outcome is not None:  # given up while the job ran
            self._maintenance.discard_tables([meta for metas in outcome.values() for meta in metas])
            return
        self.advance()

    def _put_in_force(self, levels: Levels) -> None:
        above: Levels = [[] for _ in range(max(1, len(levels) - 1))]
        left, right = self._outputs
        self._install(self, [*above, left], [*above, right])
        self.outcome = (self.halves[0].number, self.halves[1].number)
        self._release()

    def _release(self) -> None:
        if self._levels is not None:
            self._maintenance.unpin_levels(self._levels)
            self._levels = None
