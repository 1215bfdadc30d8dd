"""`Rewriting`: tablets become other tablets by jobs that rewrite their tables, while they go on being written to.

It goes in rounds, each of which rewrites some tables of the sources for the tablets made, in jobs of bounded size:
    first     the tables there are at the start, without deletes, for the lowest level of the tablets made;
    catch-up  those that flushes have made meanwhile, with what was in memory at the end of the round before; each
              such round has the next higher level. There is one at least, and another one while more than
              `last_bytes_max` was flushed during the one before and a level is left for it;
    last      those since then, with the sources fenced and all they were told in tables, for level 0.
Then the tablets made are put in force. What a job does with the rows, and what else there is to do at the end, is a
`TokenSplit`'s (tablet_split.py) or a `TabletMerge`'s (tablet_merge.py) business.

It holds the files it reads, so flushes and compactions of the sources go on beside it.

Invariants:
  - the tablets made come into force when all the sources were told is in tables: nothing of it is left in the log;
  - whatever happens, either the sources are as they were, or the tablets made are in force.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import zip_longest

from shardkv.errors import InvalidArgument, ShardKVError
from shardkv_node.engine.compaction_picker import CompactionTask
from shardkv_node.engine.maintenance import Maintenance
from shardkv_node.engine.memtable import Memtable
from shardkv_node.engine.table_meta import TableMeta
from shardkv_node.engine.tablet import Tablet

Levels = list[list[TableMeta]]
JobTables = dict[int, list[TableMeta]]
"""What a job made, by tablet."""


class Rewriting(ABC):
    """`outcome` tells when it has ended. `advance` it whenever a group was applied or a job has ended."""

    def __init__(
        self,
        what: str,
        maintenance: Maintenance,
        sources: Sequence[Tablet],
        made: Sequence[Tablet],
        *,
        last_bytes_max: int,
        flush: Callable[[], None],
        in_tables: Callable[[int], bool],
        rewrite: bool = True,
    ) -> None:
        """`what` it is, in a sentence. `flush` has what is in memory flushed, if it can; `in_tables`: all that the
        tablet was told is in tables; `rewrite`: False skips all rounds, and leaves only the end, with the fence.
        """
        self.sources = tuple(sources)
        self.made = tuple(made)
        self.outcome: tuple[int, ...] | ShardKVError | None = None
        """The numbers of the tablets made, or why there are none; None while it is under way."""
        self._what = what
        self._maintenance = maintenance
        self._last_bytes_max = last_bytes_max
        self._flush = flush
        self._in_tables = in_tables
        self._were_fenced = [tablet.fenced for tablet in sources]
        self._round = 0
        self._fencing = not rewrite
        """The next round is the last, or the one at hand is."""
        self._fence_up = False
        self._in_last_round = False
        self._awaited: list[Memtable] | None = None
        """What a catch-up round waits for to be in tables."""
        levels = [maintenance.levels_of(tablet.number) for tablet in sources]
        self._inputs: Levels = stacked(levels) if rewrite else []
        """Of the round at hand, pinned."""
        self._flushed: list[TableMeta] = []
        """What flushes have made since, oldest first, pinned."""
        self._start: bytes | None = b"" if rewrite else None
        """Keys below it are done in this round; None: all are."""
        self._depth = max(2, *(len(one) - 1 for one in levels))
        """The lowest level of the tablets made."""
        self._outputs: dict[int, Levels] = {tablet.number: [[] for _ in range(self._depth + 1)] for tablet in self.made}
        self._job_running = False
        self._advancing = self._again = False
        maintenance.pin(self._inputs)
        if rewrite:
            for tablet in sources:
                maintenance.on_flushed[tablet.number] = self._note_flushed

    @abstractmethod
    def _submit(self, task: CompactionTask, ended: Callable[[JobTables | ShardKVError], None], *, first: bool) -> None:
        """Have the rows of the task rewritten for the tablets made. `first`: it has all there is in that part."""

    def _prepared(self) -> bool:
        """What else is to be done before the next catch-up round, or the fence. False: it is under way."""
        return True

    @abstractmethod
    def _finish(self) -> bool:
        """All is rewritten, the sources are fenced. Put the tablets made in force: True; or begin a job that is needed
        first, after which this is called once more: False."""

    def advance(self) -> None:
        """Do what can be done now; cheap."""
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
        """Give it up, if it has not ended: the sources stay as they were and take writes again."""
        self.give_up(InvalidArgument(f"{self._what} was cancelled."))

    def give_up(self, error: ShardKVError) -> None:
        """End it with this outcome, unless it has one."""
        if self.outcome is None:
            self.outcome = error
            for tablet, was_fenced in zip(self.sources, self._were_fenced, strict=True):
                tablet.fenced = was_fenced
            self._maintenance.discard_tables(self._unused())
            self._release()

    def _unused(self) -> list[TableMeta]:
        """The tables made so far, which nobody will use."""
        return [meta for levels in self._outputs.values() for metas in levels for meta in metas]

    def _step(self) -> None:
        task = None if self._start is None else self._maintenance.pick_part(self._inputs, self._start)
        if task is not None:
            self._job_running = True
            self._start = task.stop
            self._submit(task, self._part_ended, first=self._round == 0)
        elif self._in_last_round:
            if self._finish():
                self.outcome = tuple(tablet.number for tablet in self.made)
                self._release()
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
        if not self._fence_up and not self._prepared():
            return False
        return self._fenced() if self._fencing else self._caught_up()

    def _caught_up(self) -> bool:
        """What was in memory when this was asked first is in tables now."""
        if self._awaited is None:
            self._awaited = [memtable for part in self._parts() for memtable in part.memtables()]
        if any(part.active in self._awaited and len(part.active) for part in self._parts()):
            self._flush()
        there = {id(memtable) for part in self._parts() for memtable in part.memtables() if len(memtable)}
        return not any(id(memtable) in there for memtable in self._awaited)

    def _fenced(self) -> bool:
        """The sources take no writes, and all they were told is in tables."""
        self._fence_up = True
        for tablet in self.sources:
            tablet.fenced = True
        if any(len(part.active) for part in self._parts()):
            self._flush()
        return all(self._in_tables(tablet.number) for tablet in self.sources)

    def _parts(self) -> list[Tablet]:
        """The sources, and the tablets with their records of tokens."""
        return [part for tablet in self.sources for part in (tablet, tablet.records) if part is not None]

    def _note_flushed(self, metas: list[TableMeta]) -> None:
        self._maintenance.pin([metas])
        self._flushed += metas

    def _part_ended(self, outcome: JobTables | ShardKVError) -> None:
        self._job_running = False
        if isinstance(outcome, ShardKVError):
            self.give_up(outcome)
            return
        if self.outcome is not None:  # given up while the job ran
            self._maintenance.discard_tables([meta for metas in outcome.values() for meta in metas])
            return
        for number, levels in self._outputs.items():
            levels[0 if self._in_last_round else self._depth - self._round] += outcome.get(number, [])
        self.advance()

    def _release(self) -> None:
        for tablet in self.sources:
            self._maintenance.on_flushed.pop(tablet.number, None)
        self._maintenance.unpin(self._inputs)
        self._maintenance.unpin([self._flushed])


def stacked(levels: Sequence[Levels]) -> Levels:
    """The levels of several tablets that have no key in common as those of one: each of level 0 at first, then each of
    level 1, and so on, so that of one key a deeper table is older. None of the lower ones overlaps itself."""
    deep = [metas for level in zip_longest(*(one[1:] for one in levels), fillvalue=[]) for metas in level]
    return [[meta for one in levels if one for meta in one[0]], *deep]
