"""Splits of a tablet in two: at a key, where both halves share its files, or at a hash token, where they are rewritten.

A split at a key is one manifest edit (`cut_levels` says what each half has): it reads and writes no table. Each half
sees the files of the whole through a clip, and a compaction of it rewrites what the clip lets through.

A split at a token (`TokenSplit`) streams the tables of the whole once while it goes on being written to, then what was
written meanwhile, and puts the halves in force by one edit at the end.

Invariants:
  - halves come into force when all the tablet was told is in tables, so that nothing of it is left in the log;
  - halves go on with the sequence numbers of the whole, so versions rise across the split;
  - whatever happens, either the whole is in force or both halves are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shardkv.errors import InvalidArgument, ShardKVError
from shardkv_node.engine.maintenance import Maintenance
from shardkv_node.engine.memtable import Memtable
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

    It goes in rounds, each of which rewrites some tables of the tablet for the halves, in jobs of bounded size:
        first     the tables there are at the start, without deletes, for the lowest level of the halves;
        catch-up  those that flushes have made meanwhile, with what was in memory at the end of the round before; each
                  such round has the next higher level. There is one at least, and another one while more than
                  `last_bytes_max` was flushed during the one before and a level is left for it;
        last      those since then, with the tablet fenced and all it was told in tables, for level 0.
    Then the halves are put in force; both get the files of the whole's records of tokens (see dedupe.py).

    It holds the files it reads, so flushes and compactions of the tablet go on beside it.
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
        in_tables: Callable[[], bool],
        install: Callable[[TokenSplit, Levels, Levels], None],
    ) -> None:
        """`flush` has what is in memory flushed, if it can; `in_tables`: all the tablet was told is in tables;
        `install` puts the halves in force.
        """
        self.tablet = tablet
        self.halves = halves
        self.outcome: tuple[int, int] | ShardKVError | None = None
        """The numbers of the halves, or why there are none; None while it is under way."""
        self._maintenance = maintenance
        self._token = token
        self._last_bytes_max = last_bytes_max
        self._flush = flush
        self._in_tables = in_tables
        self._install = install
        self._was_fenced = tablet.fenced
        self._round = 0
        self._fencing = False
        """The next round is the last, or the one at hand is."""
        self._in_last_round = False
        self._awaited: list[Memtable] | None = None
        """What a catch-up round waits for to be in tables."""
        self._inputs: Levels = maintenance.levels_of(tablet.number)
        """Of the round at hand, pinned."""
        self._flushed: list[TableMeta] = []
        """What flushes have made since, oldest first, pinned."""
        self._start: bytes | None = b""
        """Keys below it are done in this round; None: all are."""
        self._depth = max(2, len(self._inputs) - 1)
        """The lowest level of the halves."""
        self._outputs: tuple[Levels, Levels] = (
            [[] for _ in range(self._depth + 1)],
            [[] for _ in range(self._depth + 1)],
        )
        self._job_running = False
        self._advancing = self._again = False
        maintenance.pin(self._inputs)
        maintenance.on_flushed[tablet.number] = self._note_flushed

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
            self.tablet.fenced = self._was_fenced
            self._maintenance.discard_tables([meta for half in self._outputs for level in half for meta in level])
            self._release()

    def _step(self) -> None:
        task = None if self._start is None else self._maintenance.pick_part(self._inputs, self._start)
        if task is not None:
            self._job_running = True
            self._start = task.stop
            left, right = self.halves
            self._maintenance.submit_split(
                task, (left.number, right.number), self._token, self._part_ended, drop_tombstones=self._round == 0
            )
        elif self._in_last_round:
            self._put_in_force()
        elif self._ready():
            self._round += 1
            self._in_last_round = self._fencing
            self._maintenance.unpin(self._inputs)
            self._inputs, self._flushed, self._start, self._awaited = [self._flushed], [], b"", None
            self._again = True

    def _ready(self) -> bool:
        """What the next round is about is in tables."""
        if not self._fencing:
            behind = sum(meta.size for meta in self._flushed) > self._last_bytes_max
            self._fencing = self._round > 0 and not (behind and self._round + 1 < self._depth)
        return self._fenced() if self._fencing else self._caught_up()

    def _caught_up(self) -> bool:
        """What was in memory when this was asked first is in tables now."""
        tablet = self.tablet
        if self._awaited is None:
            self._awaited = list(tablet.memtables())
        if tablet.active in self._awaited and len(tablet.active):
            self._flush()
        return not any(
            memtable in tablet.frozen or (memtable is tablet.active and len(memtable)) for memtable in self._awaited
        )

    def _fenced(self) -> bool:
        """The tablet takes no writes, and all it was told is in tables."""
        self.tablet.fenced = True
        records = self.tablet.records
        if len(self.tablet.active) or (records is not None and len(records.active)):
            self._flush()
        return self._in_tables()

    def _note_flushed(self, metas: list[TableMeta]) -> None:
        self._maintenance.pin([metas])
        self._flushed += metas

    def _part_ended(self, outcome: dict[int, list[TableMeta]] | ShardKVError) -> None:
        self._job_running = False
        if isinstance(outcome, ShardKVError):
            self.give_up(outcome)
            return
        if self.outcome is not None:  # given up while the job ran
            self._maintenance.discard_tables([meta for metas in outcome.values() for meta in metas])
            return
        for half, levels in zip(self.halves, self._outputs, strict=True):
            levels[0 if self._in_last_round else self._depth - self._round] += outcome.get(half.number, [])
        self.advance()

    def _put_in_force(self) -> None:
        self._install(self, *self._outputs)
        self.outcome = (self.halves[0].number, self.halves[1].number)
        self._release()

    def _release(self) -> None:
        del self._maintenance.on_flushed[self.tablet.number]
        self._maintenance.unpin(self._inputs)
        self._maintenance.unpin([self._flushed])
