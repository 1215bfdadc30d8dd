"""`Maintenance`: turns frozen memtables into tables and keeps the levels in shape, one job of each kind at a time.

It owns the manifest while the store is open, and the tables of all tablets. Heavy work is done by the job runner;
here a finished job is installed: outputs opened, manifest appended and synced, tablets switched, inputs deleted.

Invariants:
  - generations are flushed in the order they were frozen, so a tablet's `flushed_seqno` has no hole below it;
  - nothing is deleted before the manifest edit that makes it unneeded is durable, and nothing after a poisoning;
  - a job that fails changes nothing. It is tried again after a pause; a flush whose log segment turned out damaged is
    made from the memtable instead, which holds the same rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from shardkv.errors import Corruption, ShardKVError, StorageError, StoreClosed
from shardkv.hybrid_clock import COUNTER_BITS
from shardkv_node.engine import filenames
from shardkv_node.engine.block import CODEC_LZ4, CODEC_NONE, CODEC_ZSTD
from shardkv_node.engine.block_cache import BlockCache
from shardkv_node.engine.chores import Chores
from shardkv_node.engine.compaction_picker import (
    CompactionTask,
    PickerOptions,
    pick,
    pick_all,
    pick_part,
    replaced,
)
from shardkv_node.engine.dismantling import Dismantler
from shardkv_node.engine.expiry import end_expired
from shardkv_node.engine.health import COMPACTION, FLUSH, REMOVAL, Health
from shardkv_node.engine.job import (
    CompactionInput,
    CompactionJob,
    FlushJob,
    JobResult,
    SegmentSpan,
    SplitJob,
    TableOptions,
    UniteJob,
)
from shardkv_node.engine.job_runner import JobRunner
from shardkv_node.engine.manifest import (
    ClosedEdit,
    CreatedEdit,
    DroppedEdit,
    Edit,
    FlushedEdit,
    ManifestState,
    ManifestWriter,
    NumbersEdit,
    Position,
    SegmentEdit,
    TablesEdit,
)
from shardkv_node.engine.memtable import Memtable
from shardkv_node.engine.options import Options
from shardkv_node.engine.recovery import sweep
from shardkv_node.engine.row_cache import RowCache, RowCaches
from shardkv_node.engine.table_files import TableFiles
from shardkv_node.engine.table_meta import TableMeta
from shardkv_node.engine.table_output import TableOutput
from shardkv_node.engine.table_reader import Table
from shardkv_node.engine.tablet import Tablet
from shardkv_node.engine.vfs import Vfs
from shardkv_node.engine.worker_protocol import Outcome

_CODECS = {"none": CODEC_NONE, "lz4": CODEC_LZ4, "zstd": CODEC_ZSTD}
_RETRY_PAUSE_S = 1.0


@dataclass(slots=True, eq=False)
class Generation:
    """What was frozen together: the memtables of all tablets, and the log segments that hold the same writes."""

    segments: list[tuple[int, int]]
    """(number, end), in log order."""
    next_segment: int
    """The first one of the next generation."""
    memtables: dict[int, Memtable]
    """Per tablet that had writes."""
    upto: dict[int, int]
    """Per tablet with writes in the log that no table had then, its last seqno."""
    resident_bytes: int


@dataclass(slots=True)
class Counters:
    """Since the store was opened."""

    flushes: int = 0
    flushes_from_memory: int = 0
    compactions: int = 0
    moves: int = 0
    """Tables that went down a level unread."""
    job_failures: int = 0
    bytes_flushed: int = 0
    bytes_compacted: int = 0


class Maintenance:
    """`clock` gives hybrid clock readings, `monotonic` seconds, `random_bytes(n)` bytes for job ids."""

    def __init__(
        self,
        vfs: Vfs,
        directory: str,
        options: Options,
        *,
        state: ManifestState,
        manifest: ManifestWriter,
        tablets: dict[int, Tablet],
        health: Health,
        runner: JobRunner,
        dismantler: Dismantler,
        chores: Chores,
        clock: Callable[[], int],
        monotonic: Callable[[], float],
        random_bytes: Callable[[int], bytes],
    ) -> None:
        self._vfs = vfs
        self._directory = directory
        self._options = options
        self._state = state
        self._manifest = manifest
        self._tablets = tablets
        self._health = health
        self._runner = runner
        self._dismantler = dismantler
        self._clock = clock
        self._monotonic = monotonic
        self._random_bytes = random_bytes
        self._picker = PickerOptions(
            l0_trigger=options.l0_compaction_trigger,
            level1_bytes_max=options.level1_bytes_max,
            level_multiplier=options.level_multiplier,
            task_bytes_max=options.compaction_bytes_max,
            one_codec=options.upper_compression == options.bottom_compression,
        )
        self._cursors: dict[int, dict[int, bytes]] = {}
        self._unpicked: dict[int, None] = {}
        """Tablets whose levels have changed since the picker found nothing to do for them; it looks at no others. They
        take turns: one goes to the end when a compaction of it has ended."""
        self._level0_files: dict[int, int] = {}
        self._flush_running = False
        self._compaction_running = False
        self._full_compaction = False
        """The running one is a step of what `_compact_all` asks for."""
        self._compact_all: dict[int, bytes] = {}
        """Tablets to be merged into one level, and the key up to which that is done."""
        self._scheduling = self._again = False
        self._retry_at: dict[str, float] = {}
        """By kind of work that failed, as in `Health.failing`."""
        self._closed = False
        self.cache = BlockCache(options.block_cache_bytes)
        self._row_caches = RowCaches(self.cache)
        self.files = TableFiles(
            vfs,
            directory,
            self.cache,
            chores,
            open_files_max=options.open_files_max,
            on_failure=self._note_unremoved,
        )
        self.frozen: deque[Generation] = deque()
        """Oldest first."""
        self.counters = Counters()
        self.most_level0_tables = 0
        """Of any tablet; kept up to date by `_set_levels`, since every group asks for it."""
        self.on_progress: Callable[[], None] | None = None
        """Called after each job that ended, well or not."""
        self.on_flushed: dict[int, Callable[[list[TableMeta]], None]] = {}
        """By tablet, what wants to know of each flush which tables it gave the tablet."""
        self.on_job_end: Callable[[], None] | None = None
        """As `on_progress`, and before it: for the store itself."""

    # --- opening and closing ---

    def open_tables(self) -> None:
        """Open every table the manifest names and give each tablet its levels. Raises `Corruption`."""
        for number, tablet in self._state.tablets.items():
            self.files.open_all(tablet.levels)
            self._set_levels(number)

    def sweep(self) -> list[str]:
        """Delete files nothing refers to; returns their names. Only at open, before any job."""
        return sweep(self._vfs, self._directory, self._state, self._manifest.number)

    def close(self) -> None:
        """End the workers; unfinished jobs leave files that the next open sweeps."""
        self._closed = True
        self._runner.close()

    def close_files(self) -> None:
        self._closed = True
        self.files.close_all()
        self._manifest.close()

    def note_closed(self, end: Position) -> None:
        """The store is being closed in order, and its log is on disk up to `end`. Nothing may be written after this.

        A help to find a log that is cut short later: if it cannot be written, the store is closed all the same.
        """
        with suppress(StorageError):
            self._manifest.append([ClosedEdit(end)], self._clock())

    # --- the work ---

    @property
    def idle(self) -> bool:
        """Nothing frozen, nothing running, nothing asked for."""
        busy = self.frozen or self._flush_running or self._compaction_running or self._compact_all
        return not busy

    @property
    def full_compaction_pending(self) -> bool:
        """A requested full compaction has not ended yet."""
        return bool(self._compact_all)

    def add_frozen(self, generation: Generation) -> None:
        self.frozen.append(generation)
        self.schedule()

    def request_full_compaction(self, tablets: Iterable[int]) -> None:
        """Merge each of these tablets into one level, as soon as possible."""
        self._compact_all |= dict.fromkeys(tablets, b"")
        self.schedule()

    def schedule(self) -> None:
        """Start what is due, or do nothing. Cheap; call it any time."""
        self._again = True
        if self._scheduling:
            return  # a job that ran inline ended: the loop below goes on, instead of this calling itself ever deeper
        self._scheduling = True
        try:
            while self._again:
                self._again = False
                self._start_due()
        finally:
            self._scheduling = False

    def _start_due(self) -> None:
        if self._closed or self._health.poisoned:
            return
        if self.frozen and not self._flush_running and self._may_try(FLUSH):
            self._start_flush(self.frozen[0])
        if self._compaction_running or self._health.poisoned or not self._may_try(COMPACTION):
            return
        found = self._pick()
        if found is None:
            self._health.failing.pop(COMPACTION, None)  # what failed is not wanted any more
        elif found[1].move:
            self._move(*found)
        else:
            self._start_compaction(*found)

    def _may_try(self, kind: str) -> bool:
        """Whether work of this kind did not fail just now."""
        return kind not in self._health.failing or self._monotonic() >= self._retry_at[kind]

    def _move(self, number: int, task: CompactionTask) -> None:
        try:
            self._install_compaction(number, task, JobResult({}))
            self._again = True
        except ShardKVError as error:
            self._note_failure(COMPACTION, error)

    def commit(self, edits: Sequence[Edit]) -> None:
        """Make the edits durable, then apply them to the state. A failure poisons the store and is raised."""
        if self._health.poisoned:
            raise self._health.refusal(stalled=False) or StorageError("The store is poisoned.")
        try:
            self._state.check(edits)
        except ValueError as error:
            raise StorageError(f"A change of tables does not fit the store at {self._directory}: {error}.") from error
        try:
            self._manifest.append(edits, self._clock())
            self._state.apply(edits)
            if self._manifest.bytes > self._options.manifest_bytes_max:
                self._roll_manifest()
        except StorageError as error:
            raise self._health.poison(error) from error

    def change_tablets(
        self,
        made: Sequence[tuple[Tablet, Sequence[Sequence[TableMeta]]]],
        dropped: Sequence[int],
        position: Position,
        also: Sequence[Edit] = (),
    ) -> None:
        """Make these tablets with the levels they have, and drop those, by one group of edits; durable on return.

        `position`: where the log is now. `also`: edits of the group before those. The files of the tables made are
        open; files that nobody uses afterwards are deleted. Requires: a tablet made has all it holds in these tables.
        """
        edits: list[Edit] = []
        for tablet, levels in made:
            added = [(level, meta) for level, metas in enumerate(levels) for meta in metas]
            edits.append(CreatedEdit(tablet.number, tablet.label, position, tablet.records_of))
            edits += [TablesEdit(tablet.number, added, [])] if added else []
            edits += [FlushedEdit(tablet.number, tablet.last_seqno)] if tablet.last_seqno else []
        self.commit([*also, *edits, *(DroppedEdit(number, position) for number in dropped)])
        for tablet, _ in made:
            self._tablets[tablet.number] = tablet
            self._set_levels(tablet.number)
            if any(number in self._compact_all for number in dropped):
                self._compact_all[tablet.number] = b""
        for number in dropped:
            self._forget(number)

    def row_cache(self, number: int) -> RowCache:
        """That of the tablet, made when it is first asked for."""
        tablet = self._tablets[number]
        if tablet.rows is None:
            tablet.rows = self._row_caches.new()
        return tablet.rows

    def _forget(self, number: int) -> None:
        tablet = self._tablets.pop(number)
        tablet.set_levels([])
        for memtable in (*tablet.frozen, tablet.active):
            self._dismantler.drop(memtable)
        self._note_level0(number, 0)
        self._compact_all.pop(number, None)
        self._cursors.pop(number, None)
        self._unpicked.pop(number, None)
        del self._level0_files[number]
        self.files.forget(number)

    def _roll_manifest(self) -> None:
        old = self._manifest
        number = old.number + 1
        self._manifest = ManifestWriter.start(self._vfs, self._directory, number, self._state, self._clock())
        old.close()
        self._vfs.remove(filenames.manifest_path(self._directory, old.number))

    # --- flush ---

    def _start_flush(self, generation: Generation) -> None:
        self._flush_running = True
        live = {n: upto for n, upto in generation.upto.items() if n in self._tablets}
        job = FlushJob(
            job_id=self._random_bytes(4).hex(),
            output_directory=filenames.table_directory(self._directory),
            file_number=self._state.next_file,
            segments=[SegmentSpan(filenames.segment_path(self._directory, n), end) for n, end in generation.segments],
            tablets={n: (self._state.tablets[n].flushed_seqno, upto) for n, upto in live.items()},
            options=self._table_options(self._options.upper_compression),
            now_ms=self._clock() >> COUNTER_BITS,
        )
        self._runner.submit(job, lambda outcome: self._flush_ended(generation, job, outcome))

    def _flush_ended(self, generation: Generation, job: FlushJob, outcome: Outcome) -> None:
        self._flush_running = False
        if self._closed or self._health.poisoned:
            return
        try:
            try:
                self._install_flush(generation, outcome)
            except Corruption:
                self.counters.flushes_from_memory += 1
                self._install_flush(generation, self._flush_from_memory(generation, job))
        except ShardKVError as error:
            self._note_failure(FLUSH, error)
        self._progress()

    def _install_flush(self, generation: Generation, outcome: Outcome) -> None:
        tables = self._open_outputs(outcome)
        edits: list[Edit] = []
        for number, upto in generation.upto.items():
            if number in self._tablets:
                metas = [table.meta for table in tables.get(number, [])]
                edits.append(TablesEdit(number, [(0, meta) for meta in metas], []))
                edits.append(FlushedEdit(number, upto))
        edits += [SegmentEdit(generation.next_segment), self._numbers_after(tables)]
        self.commit(edits)
        for run in tables.values():
            self.files.adopt(run)
        for number, memtable in generation.memtables.items():
            if number in self._tablets:
                self._tablets[number].frozen.remove(memtable)
                self._set_levels(number, same_rows=True)
                self._dismantler.drop(memtable)
                if number in self.on_flushed:
                    self.on_flushed[number]([table.meta for table in tables.get(number, [])])
        for number in tables.keys() - self._tablets.keys():  # dropped while the job ran
            self.files.discard([table.meta.file_name for table in tables[number]])
        self.frozen.remove(generation)
        self.counters.flushes += 1
        self.counters.bytes_flushed += sum(table.meta.size for run in tables.values() for table in run)
        self._note_success(FLUSH)
        for number, _ in generation.segments:
            self.files.remove(filenames.segment_path(self._directory, number))

    def _flush_from_memory(self, generation: Generation, job: FlushJob) -> JobResult:
        output = TableOutput(
            self._vfs,
            job.output_directory,
            job_id=self._random_bytes(4).hex(),
            file_number=self._state.next_file,
            options=job.options,
        )
        try:
            for number in sorted(set(generation.memtables) & set(self._tablets)):
                for rows in generation.memtables[number].chunks(b"", None, reverse=False):
                    output.add(number, end_expired(rows, job.now_ms))
                output.end_tablet()
            return output.finish()
        except BaseException:
            output.abandon()
            raise

    # --- compaction ---

    def _pick(self) -> tuple[int, CompactionTask] | None:
        behind = self.most_level0_tables >= self._options.l0_slow_tables
        return (self._pick_full() or self._pick_level()) if not behind else (self._pick_level() or self._pick_full())

    def _pick_level(self) -> tuple[int, CompactionTask] | None:
        behind = self.most_level0_tables >= self._options.l0_slow_tables
        while self._unpicked:
            waiting = iter(self._unpicked)
            number = max(waiting, key=self._level0_files.__getitem__) if behind else next(waiting)
            levels = self._state.tablets[number].levels
            task = pick(levels, self._picker, self._cursors.get(number), self.files.points)
            if task is not None:
                return number, task
            del self._unpicked[number]
        return None

    def _pick_full(self) -> tuple[int, CompactionTask] | None:
        if self.frozen:
            return None  # what is frozen belongs into the merge too
        for number, start in sorted(self._compact_all.items()):
            task = pick_all(self._state.tablets[number].levels, self._picker, start, self.files.points)
            if task is not None:
                self._full_compaction = True
                return number, task
            del self._compact_all[number]
        return None

    def _start_compaction(self, number: int, task: CompactionTask) -> None:
        self._compaction_running = True
        codec = self._options.bottom_compression if task.bottommost else self._options.upper_compression
        behind = self.most_level0_tables >= self._options.l0_slow_tables
        job = CompactionJob(
            job_id=self._random_bytes(4).hex(),
            output_directory=filenames.table_directory(self._directory),
            file_number=self._state.next_file,
            tablet=number,
            runs=self._inputs(task.runs),
            drop_tombstones=task.bottommost,
            options=self._table_options(codec),
            now_ms=self._clock() >> COUNTER_BITS,
            start=task.start,
            stop=task.stop,
            bytes_per_s=0 if behind else self._options.compaction_bytes_per_s,
        )
        self._runner.submit(job, lambda outcome: self._compaction_ended(number, task, outcome))

    def _compaction_ended(self, number: int, task: CompactionTask, outcome: Outcome) -> None:
        self._compaction_running = False
        full, self._full_compaction = self._full_compaction, False
        if self._closed or self._health.poisoned:
            return
        try:
            if isinstance(outcome, JobResult) or number in self._tablets:  # a dropped tablet's job may well fail
                self._install_compaction(number, task, outcome)
            if full and number in self._compact_all:
                self._advance_full(number, task)
        except ShardKVError as error:
            self._note_failure(COMPACTION, error)
        self._progress()

    def _advance_full(self, number: int, task: CompactionTask) -> None:
        if task.stop is None:
            del self._compact_all[number]
        else:
            self._compact_all[number] = task.stop

    def _install_compaction(self, number: int, task: CompactionTask, outcome: Outcome) -> None:
        tables = self._open_outputs(outcome)
        outputs = tables.get(number, [])
        self.files.adopt(outputs)
        if number not in self._tablets:  # dropped while the job ran
            self.files.discard([table.meta.file_name for table in outputs])
            return
        names = sorted({meta.file_name for meta in task.inputs})
        added = replaced(self._state.tablets[number].levels, task, [table.meta for table in outputs])
        self.commit([TablesEdit(number, added, names), self._numbers_after(tables)])
        self._unpicked.pop(number, None)
        self._set_levels(number, same_rows=True)
        self._cursors.setdefault(number, {})[task.level] = task.cursor
        if task.move:
            self.counters.moves += 1
        else:
            self.counters.compactions += 1
            self.counters.bytes_compacted += sum(table.meta.size for table in outputs)
        self._note_success(COMPACTION)

    # --- splits and merges ---

    def levels_of(self, number: int) -> list[list[TableMeta]]:
        """The tablet's tables as they are."""
        return [list(metas) for metas in self._state.tablets[number].levels]

    def pin(self, levels: Sequence[Sequence[TableMeta]]) -> None:
        """Keep the files of these tables until `unpin`."""
        self.files.pin({meta.file_name for metas in levels for meta in metas})

    def unpin(self, levels: Sequence[Sequence[TableMeta]]) -> None:
        if not self._closed and not self._health.poisoned:  # else the next open sweeps what is left
            self.files.unpin({meta.file_name for metas in levels for meta in metas})

    def pick_part(self, levels: Sequence[Sequence[TableMeta]], start: bytes) -> CompactionTask | None:
        """What one job should read of pinned levels, at keys from `start`; None: there is nothing more."""
        return pick_part(levels, self._picker, start, self.files.points)

    def submit_split(
        self,
        task: CompactionTask,
        tablets: tuple[int, int],
        token: int,
        ended: Callable[[dict[int, list[TableMeta]] | ShardKVError], None],
        *,
        drop_tombstones: bool,
    ) -> None:
        """Have a part of a tablet rewritten for two others; `ended` gets the new tables, open, or why there are none.

        They are in no tablet yet: they wait for `change_tablets` or `discard_tables`. `drop_tombstones`: the task has
        all the tablet has in that part.
        """
        job = SplitJob(
            job_id=self._random_bytes(4).hex(),
            output_directory=filenames.table_directory(self._directory),
            file_number=self._state.next_file,
            tablets=tablets,
            token=token,
            runs=self._inputs(task.runs),
            drop_tombstones=drop_tombstones,
            options=self._table_options(
                self._options.bottom_compression if drop_tombstones else self._options.upper_compression
            ),
            now_ms=self._clock() >> COUNTER_BITS,
            start=task.start,
            stop=task.stop,
            bytes_per_s=self._options.compaction_bytes_per_s,
        )
        self._runner.submit(job, lambda outcome: self._part_ended(outcome, ended))

    def submit_merge(
        self,
        task: CompactionTask,
        tablet: int,
        ended: Callable[[dict[int, list[TableMeta]] | ShardKVError], None],
        *,
        drop_tombstones: bool,
    ) -> None:
        """Have a part of several tablets rewritten for another one, else as `submit_split`."""
        job = CompactionJob(
            job_id=self._random_bytes(4).hex(),
            output_directory=filenames.table_directory(self._directory),
            file_number=self._state.next_file,
            tablet=tablet,
            runs=self._inputs(task.runs),
            drop_tombstones=drop_tombstones,
            options=self._table_options(
                self._options.bottom_compression if drop_tombstones else self._options.upper_compression
            ),
            now_ms=self._clock() >> COUNTER_BITS,
            start=task.start,
            stop=task.stop,
            bytes_per_s=self._options.compaction_bytes_per_s,
        )
        self._runner.submit(job, lambda outcome: self._part_ended(outcome, ended))

    def submit_unite(
        self,
        runs: tuple[Sequence[Sequence[TableMeta]], Sequence[Sequence[TableMeta]]],
        looked_up: tuple[Sequence[Sequence[TableMeta]], Sequence[Sequence[TableMeta]]],
        tablet: int,
        boundary: bytes | int,
        ended: Callable[[dict[int, list[TableMeta]] | ShardKVError], None],
    ) -> None:
        """Have the records of tokens of two tablets, pinned, united for a third one, else as `submit_split`.

        `runs`: oldest first; the lanes in these of one of them are looked up in what is `looked_up` of the other one.
        """
        job = UniteJob(
            job_id=self._random_bytes(4).hex(),
            output_directory=filenames.table_directory(self._directory),
            file_number=self._state.next_file,
            tablet=tablet,
            left=self._inputs(runs[0]),
            right=self._inputs(runs[1]),
            boundary=boundary,
            looked_up=(self._inputs(looked_up[0]), self._inputs(looked_up[1])),
            options=self.table_options(),
            now_ms=self._clock() >> COUNTER_BITS,
        )
        self._runner.submit(job, lambda outcome: self._part_ended(outcome, ended))

    def _part_ended(self, outcome: Outcome, ended: Callable[[dict[int, list[TableMeta]] | ShardKVError], None]) -> None:
        if self._closed or self._health.poisoned:
            ended(self._health.refusal(stalled=False) or StoreClosed(f"The store at {self._directory} is closed."))
            return
        try:
            tables = self._open_outputs(outcome)
        except ShardKVError as error:
            ended(error)
        else:
            for run in tables.values():
                self.files.adopt(run)
            ended({number: [table.meta for table in run] for number, run in tables.items()})
        if self.on_progress is not None:
            self.on_progress()

    def discard_tables(self, metas: Sequence[TableMeta]) -> None:
        """Delete tables that are open and in no tablet."""
        if not self._closed and not self._health.poisoned:
            self.files.discard([meta.file_name for meta in metas])

    # --- tables ---

    def table_options(self) -> TableOptions:
        """Of tables that compaction will rewrite."""
        return self._table_options(self._options.upper_compression)

    def _table_options(self, compression: str) -> TableOptions:
        return TableOptions(
            codec=_CODECS[compression],
            block_bytes=self._options.block_bytes,
            filter_bits_per_key=self._options.filter_bits_per_key,
            table_bytes_max=self._options.table_bytes_max,
        )

    def _inputs(self, runs: Sequence[Sequence[TableMeta]]) -> list[list[CompactionInput]]:
        return [
            [CompactionInput(filenames.table_path(self._directory, meta.file_name), meta) for meta in run]
            for run in runs
        ]

    def numbers_after(self, metas: Iterable[TableMeta]) -> NumbersEdit:
        """The edit after which no new file is numbered like one of these."""
        names = (filenames.parse_table_name(meta.file_name) for meta in metas)
        highest = max((name[0] for name in names if name is not None), default=0)
        return NumbersEdit(max(self._state.next_file, highest + 1), self._state.next_tablet)

    def _open_outputs(self, outcome: Outcome) -> dict[int, list[Table]]:
        """The tables a job made, opened. Raises the job's error, or what is wrong with a table."""
        if not isinstance(outcome, JobResult):
            raise outcome
        return {number: list(map(self.files.open, metas)) for number, metas in outcome.tables.items()}

    def _numbers_after(self, tables: dict[int, list[Table]]) -> NumbersEdit:
        return self.numbers_after(table.meta for run in tables.values() for table in run)

    def _set_levels(self, number: int, *, same_rows: bool = False) -> None:
        """Give the tablet the tables of the manifest. `same_rows`: as in `Tablet.set_levels`."""
        self.row_cache(number)
        tablet = self._tablets[number]
        tablet.set_levels(self.files.assign(number, self._state.tablets[number].levels), same_rows=same_rows)
        self._unpicked.setdefault(number)
        self._note_level0(number, tablet.level0_files)

    def _note_level0(self, number: int, files: int) -> None:
        before = self._level0_files.get(number, 0)
        self._level0_files[number] = files
        if files >= self.most_level0_tables:
            self.most_level0_tables = files
        elif before == self.most_level0_tables:
            self.most_level0_tables = max(self._level0_files.values())

    def _note_unremoved(self, error: StorageError) -> None:
        """Called from wherever chores run: it may only set this."""
        self._health.failing[REMOVAL] = error

    def _note_failure(self, kind: str, error: ShardKVError) -> None:
        if self._health.poisoned:
            return
        self.counters.job_failures += 1
        self._retry_at[kind] = self._monotonic() + _RETRY_PAUSE_S
        self._health.failing[kind] = error if isinstance(error, StorageError) else StorageError(str(error))

    def _note_success(self, kind: str) -> None:
        self._health.failing.pop(kind, None)
        self._health.failing.pop(REMOVAL, None)

    def _progress(self) -> None:
        self.schedule()
        if self.on_job_end is not None:
            self.on_job_end()
        if self.on_progress is not None:
            self.on_progress()

    def tables_in_force(self) -> list[TableMeta]:
        """What every open table is. May be called from any thread: the copy is one step of the interpreter."""
        return self.files.metas()

    def table_counts(self) -> Iterator[tuple[int, int, int]]:
        """(level, tables, bytes) over all tablets, for every level in use. A file that several share counts once."""
        depth = max((len(tablet.levels) for tablet in self._state.tablets.values()), default=0)
        for level in range(depth):
            tablets = (tablet.levels[level] for tablet in self._state.tablets.values() if level < len(tablet.levels))
            sizes = {meta.file_name: meta.size for metas in tablets for meta in metas}
            yield level, len(sizes), sum(sizes.values())
