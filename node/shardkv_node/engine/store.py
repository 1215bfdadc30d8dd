"""`Store`: the storage engine itself, without loop, threads or locks of its own. One owner at a time calls it.

The owner's duties, for each group of writes:
    1. `group = log_group(writes)`   sequences and logs them with one write; at most one group is in flight
    2. `sync_group(group, done)`     calls `done(None)` once the group is as durable as the options ask; or, by hand:
       when `sync_due()`, `target = sync_target()`, `target.sync()` in any thread, then `synced(target)`, or
       `fail(error)` when the sync raised, and never another sync
    3. `apply_group(group)`          now reads see the writes, and they may be acknowledged
  - before 1, ask `write_refusal()`, wait `write_delay_s()`, and wait for `on_progress` while `stalled`;
  - a result of a background job arrives through `post`, which must run it in the owner's context.

Invariants:
  - log first, then apply: a memtable never holds what the log does not;
  - reads see applied writes only;
  - a generation is frozen only between groups, together with its log segment;
  - after any failed write or sync of log or manifest the store is poisoned: reads go on, nothing is written.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from shardkv.errors import InvalidArgument, StorageError, StoreClosed
from shardkv.hybrid_clock import HybridClock
from shardkv_node.engine import filenames
from shardkv_node.engine.backpressure import Backpressure
from shardkv_node.engine.chores import InlineChores, ThreadChores
from shardkv_node.engine.columns import TERM_MAX, make_version
from shardkv_node.engine.dismantling import Dismantler
from shardkv_node.engine.health import Health
from shardkv_node.engine.identity import make_store_directory
from shardkv_node.engine.job_runner import JobRunner
from shardkv_node.engine.log_writer import LogWriter
from shardkv_node.engine.maintenance import Generation, Maintenance
from shardkv_node.engine.options import Options
from shardkv_node.engine.puts import Puts, apply_puts
from shardkv_node.engine.quick_lane import CREDIT_BYTES, QuickLane
from shardkv_node.engine.recovery import Recovered, RecoveryReport, recover
from shardkv_node.engine.row_cache import RowCache
from shardkv_node.engine.scrub import Scrub
from shardkv_node.engine.sequencing import sequence, taken_apart
from shardkv_node.engine.snapshot import StoreSnapshot
from shardkv_node.engine.store_moves import StoreMoves
from shardkv_node.engine.syncer import InlineSyncer, Syncer, ThreadSyncer
from shardkv_node.engine.tablet import Tablet
from shardkv_node.engine.vfs import Lock, OsVfs, Vfs
from shardkv_node.engine.write import Group, Write

Post = Callable[[Callable[[], None]], None]

RECOVERED_SEGMENTS_MAX = 8
"""More closed segments than this after an open are flushed, so that restarts do not pile them up."""

MARK_DELAY_S = 0.02
"""A log that stands still for so long after a sync gets its mark. One put after the other needs none between them: the
next group says the same, and the second write would cost a synced put 15 %."""

FREEZE_UNSYNCED_BYTES = 1024 * 1024
"""With more than this unsynced, a segment is synced in the background before it is closed."""

RESERVE_BYTES = 1024 * 1024
"""Of the log, taken ahead when each group is synced; less with a small memtable."""


@dataclass(slots=True, eq=False)
class SyncTarget:
    """What one sync covers: everything in the log up to `offset`."""

    log: LogWriter
    offset: int

    def sync(self) -> None:
        """Blocks on the disk; may run in any thread. Raises `StorageError`, after which `Store.fail` is due."""
        self.offset = self.log.offset  # what was written while this waited for its turn is covered too
        self.log.sync()


class Store(StoreMoves):
    """Made by `Store.open`. What it does with whole tablets is in `StoreTablets` and `StoreMoves`."""

    @classmethod
    def open(
        cls,
        directory: str,
        options: Options,
        *,
        post: Post,
        vfs: Vfs | None = None,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        monotonic: Callable[[], float] = time.monotonic,
        random_bytes: Callable[[int], bytes] = os.urandom,
        syncer: Syncer | None = None,
    ) -> Store:
        """Open the store in `directory`, making it when the directory is empty or absent.

        `post` runs a callable in the owner's context: it is called from a worker's thread, or, with `workers` = 0,
        from inside this store's own methods. `syncer`: a thread unless given; with one given, sync marks are written at
        once, else by a thread of their own.
        Raises `ConfigError`, `StoreLocked`, `Corruption`, `UnsupportedFormat`, `StoreMismatch`,
        `StorageError`; then nothing of the old state was changed.
        """
        options.validate()
        vfs = vfs if vfs is not None else OsVfs()
        make_store_directory(vfs, directory)
        lock = vfs.lock(filenames.lock_path(directory))
        clock = HybridClock()
        try:
            found = recover(vfs, directory, now_hlc=clock.tick(now_ms()), random_bytes=random_bytes)
            marker: Syncer = ThreadSyncer(post) if syncer is None else InlineSyncer()
            syncer = syncer if syncer is not None else ThreadSyncer(post)
            store = cls(directory, options, found, lock, post, vfs, now_ms, monotonic, random_bytes, syncer, marker)
            store._start()
        except BaseException:
            lock.release()
            raise
        return store

    def __init__(
        self,
        directory: str,
        options: Options,
        found: Recovered,
        lock: Lock,
        post: Post,
        vfs: Vfs,
        now_ms: Callable[[], int],
        monotonic: Callable[[], float],
        random_bytes: Callable[[int], bytes],
        syncer: Syncer,
        marker: Syncer,
    ) -> None:
        self.directory = directory
        self.options = options
        self.store_id = found.store_id
        """16 random bytes, for good."""
        self.term = found.state.term
        self.recovery: RecoveryReport = found.report
        self._state = found.state
        self._log = found.log
        self._lock = lock
        self._vfs = vfs
        self._now_ms = now_ms
        self._monotonic = monotonic
        self._random_bytes = random_bytes
        self._clock = HybridClock(found.log.hlc)
        self._tablets = {
            number: Tablet(
                number,
                tablet.label,
                found.last_seqnos[number],
                found.memtables[number],
                clock=self.time_ms,
                records_of=tablet.records_of,
            )
            for number, tablet in found.state.tablets.items()
        }
        self._join_records(self._tablets.values())
        self._splits = {}
        self._pins = {}
        self._between_groups = []
        self._sync_waiters: list[tuple[LogWriter, int, Callable[[StorageError | None], None]]] = []
        """What is to be called once so much of a log is on disk."""
        self._closed_segments = found.segments
        self._active_bytes = sum(memtable.resident_bytes for memtable in found.memtables.values())
        self._syncer = syncer
        self._marker = marker
        self._mark_pending = False
        self._in_flight: Group | None = None
        self._syncing: LogWriter | None = None
        self._snapshots = 0
        self._chores = ThreadChores() if options.workers else InlineChores()
        self._dismantler = Dismantler(self._chores)
        self.backpressure = Backpressure(options, monotonic)
        self._writes = 0
        self._quick: QuickLane | None = None
        self.closed = False
        self.health = Health(vfs, directory, reserve_bytes=options.disk_reserve_bytes, monotonic=monotonic)
        self.health.on_poison = self._end_quick_puts
        self.maintenance = Maintenance(
            vfs,
            directory,
            options,
            state=found.state,
            manifest=found.manifest,
            tablets=self._tablets,
            health=self.health,
            runner=JobRunner(options.workers, post, vfs=vfs),
            dismantler=self._dismantler,
            chores=self._chores,
            clock=self._tick,
            monotonic=monotonic,
            random_bytes=random_bytes,
        )
        self.maintenance.on_job_end = self._advance_splits
        self.scrub = Scrub(
            vfs, directory, bytes_per_s=options.scrub_bytes_per_s, tables=self.maintenance.tables_in_force
        )

    def _start(self) -> None:
        try:
            self.maintenance.open_tables()
            self.recovery.swept = self.maintenance.sweep()
            if self.term > TERM_MAX:
                raise StorageError(f"The store at {self.directory} was opened {TERM_MAX} times, its limit.")
            if len(self._closed_segments) > RECOVERED_SEGMENTS_MAX:
                self._freeze()
            self.maintenance.schedule()
            self.scrub.start()
            self._reserve_log()
        except BaseException:
            self.stop_background()
            self._close_files()
            raise

    # --- writing ---

    @property
    def on_progress(self) -> Callable[[], None] | None:
        """Called after each flush or compaction that ended: a stall may be over."""
        return self.maintenance.on_progress

    @on_progress.setter
    def on_progress(self, callback: Callable[[], None] | None) -> None:
        self.maintenance.on_progress = callback

    @property
    def stalled(self) -> bool:
        """Writers must wait: flush or compaction is behind, and taking more would use memory or files without bound."""
        frozen_full = self._memtable_full and not self._may_freeze
        stalled = frozen_full or self.maintenance.most_level0_tables >= self.options.l0_stall_tables
        if stalled or self.backpressure.stalling:
            self.backpressure.note_stall(stalled=stalled)
        if stalled:
            self.maintenance.schedule()
        return stalled

    def write_delay_s(self) -> float:
        """How long to wait before the next group, so that compaction keeps up; 0 while it does."""
        return self.backpressure.delay_s(self.maintenance.most_level0_tables)

    def write_refusal(self) -> StorageError | None:
        """Why a write cannot be taken now (closed, poisoned, disk nearly full, background work failing), or None."""
        if self.closed:
            return StoreClosed(f"The store at {self.directory} is closed.")
        return self.health.refusal(stalled=self.health.background is not None and self.stalled)

    def log_group(self, writes: Sequence[Write | Puts]) -> Group:
        """Sequence the writes and log them as one group. Not yet synced, not yet visible.

        A write to an unknown tablet, one whose conditions do not hold, or one that was made before, by its token, is
        left out; `apply_group` tells it.
        Raises what `write_refusal` says, or `StorageError` when the log failed (the store is poisoned then), or
        `InvalidArgument` for a group too large.
        Requires: the group before is applied, or was failed.
        """
        refusal = self.write_refusal()
        if refusal is not None:
            raise refusal
        self._require_idle()
        self._end_quick_puts()
        self._make_room()
        writes = taken_apart(writes, self._tablets)
        accepted, refused, repeated, entries = sequence(
            writes, self._tablets, self.term, self.time_ms, self._make_records
        )
        if entries:
            before = self._log.offset
            try:
                self._log.append(entries, self._tick())
            except StorageError as error:
                raise self.health.poison(error) from error
            if self.maintenance.most_level0_tables >= self.options.l0_slow_tables:
                self.backpressure.note_group(self._log.offset - before, self.maintenance.most_level0_tables)
        for one in accepted:
            if isinstance(one, Puts):
                for tablet in one.tablets:
                    tablet.last_seqno += 1
            else:
                write, tablet = one
                tablet.last_seqno += 1
                write.version = make_version(self.term, tablet.last_seqno)
        group = Group(writes, accepted, refused, repeated, self._log.offset)
        self._in_flight = group
        return group

    def apply_group(self, group: Group) -> None:
        """Make the group visible and call each write's `done`. Requires: synced, if `sync_due()` said so."""
        self._in_flight = None
        for one in group.accepted:
            if isinstance(one, Puts):
                self._writes += len(one)
                self._active_bytes += apply_puts(one)
                continue
            write, tablet = one
            self._writes += 0 if tablet.records_of else 1
            memtable = tablet.active
            before = memtable.resident_bytes
            if tablet.rows is not None and tablet.rows.values:
                tablet.rows.forget(write.keys)
            memtable.apply(write.keys, write.kinds, write.version, write.values, write.expiries)
            self._active_bytes += memtable.resident_bytes - before
            write.applied = True
        if self._pins:
            self._feed_tails(group.accepted)
        for write, error in group.refused:
            write.error = error
        for write in group.repeated:
            write.applied = True
        for told in group.writes:
            if told.done is not None:
                told.done(told)  # type: ignore[arg-type]  # each has one for its own kind
        if self._quick is not None and len(group.accepted) == 1 == len(group.writes) and len(group.writes[0].keys) == 1:
            self._grant_quick_puts(self._quick)
        if self._splits:
            self._advance_splits()
        if self._between_groups:
            self._run_between_groups()

    def quick_lane(self, tablet: int) -> QuickLane:
        """A way in for single puts, open while the last group left room for more. For one tablet of a store.

        Calls of the lane obey the duties of the owner, like those of the store: none while a group is in flight.
        """
        self._quick = QuickLane(self._tablet(tablet), self.term, self._log, self._clock, self._now_ms, self.health)
        return self._quick

    def _grant_quick_puts(self, lane: QuickLane) -> None:
        """Let puts go on without the looks that `log_group` takes, for as long as these would find no obstacle."""
        durability, bytes_max = self.options.durability, self.options.memtable_bytes_max
        if self._syncing is not None and self._memtable_full and self._may_freeze:
            bytes_max = bytes_max * 5 // 4  # as `freeze_is_cheap` allows until that sync has ended
        credit = min(CREDIT_BYTES, bytes_max - self._active_bytes, 2 * bytes_max - self._log.offset)
        if not (
            credit <= 0
            or (durability == "interval" and self._syncing is None)
            or self.maintenance.most_level0_tables >= self.options.l0_slow_tables
            or self.health.background is not None
            or self.write_refusal() is not None
            or lane.fenced
            or (durability != "always" and (lane.watched or lane.tablet in self._pins))
        ):
            lane.grant(self._log, self.term, credit, synced=durability == "always")

    def apply_quick_put(self, lane: QuickLane, key: bytes, value: bytes, version: int) -> None:
        """Make a put visible that went by `lane.log` and is synced."""
        self._active_bytes += lane.apply(key, value, version)
        self._writes += 1
        if self._pins:
            self._feed_quick_put(lane.tablet, key, value, version)

    def _end_quick_puts(self) -> None:
        """Due before anything is looked at or changed that quick puts change, or depend on."""
        if self._quick is not None:
            puts, taken = self._quick.revoke()
            self._writes += puts
            self._active_bytes += taken

    def _close_quick_lane(self, number: int) -> None:
        """The tablet is about to go: no put may reach it by the lane any more."""
        self._end_quick_puts()
        if self._quick is not None and self._quick.tablet == number:
            self._quick = None

    def sync_group(self, group: Group, done: Callable[[StorageError | None], None]) -> None:
        """See the group synced as the durability mode asks, then call `done`, maybe before this returns.

        `done(None)`: the group may be applied. `done(error)`: the store is poisoned and the group is given up.
        """
        durability = self.options.durability
        if durability == "always" and group.accepted:
            target = self.sync_target()
            self._syncer.submit(target.sync, lambda error: done(self._sync_ended(target, error)))
            return
        if durability == "interval":
            self.schedule_sync()
        done(None)

    def schedule_sync(self) -> None:
        """Have the log synced once the interval has passed, and again as long as something is not."""
        if self._syncing is None and self._log.needs_sync:
            target = self.sync_target()

            def ended(error: StorageError | None) -> None:
                if self._sync_ended(target, error) is None:
                    self.schedule_sync()

            self._syncer.submit(target.sync, ended, delay_s=self.options.sync_interval_ms / 1000)

    def sync_log(self, done: Callable[[StorageError | None], None]) -> None:
        """Have all that was logged so far on disk, whatever the durability mode asks for, as soon as possible.

        `done(None)` is called once it is, maybe before this returns; `done(error)`: it never will be.
        """
        refusal = self.write_refusal() if self.closed or self.health.poisoned else None
        if refusal is not None or not self._log.needs_sync:
            done(refusal)
            return
        self._sync_waiters.append((self._log, self._log.offset, done))
        if self._syncing is None:
            self._sync_for_waiters()
        else:
            self._syncer.hurry()

    def _sync_for_waiters(self) -> None:
        target = self.sync_target()

        def ended(error: StorageError | None) -> None:
            if self._sync_ended(target, error) is None and self.options.durability == "interval":
                self.schedule_sync()

        self._syncer.submit(target.sync, ended)

    def _answer_sync_waiters(self, error: StorageError | None) -> None:
        """Call those that need not wait any more, and begin a sync for the others."""
        log, synced = self._log, self._log.synced_offset
        answered = [one for one in self._sync_waiters if error is not None or one[0] is not log or one[1] <= synced]
        self._sync_waiters = [one for one in self._sync_waiters if one not in answered]
        for _, _, done in answered:
            done(error)
        if self._sync_waiters and self._syncing is None:
            self._sync_for_waiters()

    def _sync_ended(self, target: SyncTarget, error: StorageError | None) -> StorageError | None:
        if error is None:
            self.synced(target)
            return None
        return self.fail(error)

    def fail(self, error: BaseException) -> StorageError:
        """A sync failed: poison the store and give up the group in flight. Returns the error its writes should get."""
        self._in_flight = None
        poisoned = self.health.poison(error)
        self._advance_splits()
        self._run_between_groups()
        self._answer_sync_waiters(poisoned)
        return poisoned

    @property
    def syncing(self) -> bool:
        """A sync of the log is under way, or set for later."""
        return self._syncing is not None

    def sync_due(self) -> bool:
        """Whether the durability mode asks for a sync before the group in flight is applied."""
        return self.options.durability == "always" and self._log.needs_sync

    def sync_target(self) -> SyncTarget:
        """The sync to run now. At most one at a time."""
        self._syncing = self._log
        return SyncTarget(self._log, self._log.offset)

    def synced(self, target: SyncTarget) -> None:
        """A sync ended well: note it, and see that it is marked in the log unless writes go on, which say so, too."""
        if self.options.durability == "interval":
            self._end_quick_puts()  # they went by without a look at whether a sync is to come
        self._syncing = None
        log = target.log
        log.note_synced(target.offset)
        if log is not self._log:
            log.close()
        elif log.offset == target.offset and not self._mark_pending:
            self._mark_when_quiet()
        if self._sync_waiters:
            self._answer_sync_waiters(None)

    def _mark_when_quiet(self) -> None:
        """Mark the log once nothing was written to it for `MARK_DELAY_S`."""
        self._mark_pending = True
        log, offset = self._log, self._log.offset

        def look(_: StorageError | None) -> None:
            self._mark_pending = False
            if self.closed or self.health.poisoned or self._log.needs_sync:
                return  # in the last case a sync is to come, and then this again
            if self._log is log and log.offset == offset:
                self._mark()
            else:
                self._mark_when_quiet()

        self._marker.submit(lambda: None, look, delay_s=MARK_DELAY_S)

    def _mark(self) -> None:
        """Say in the log that all of it is synced. The mark itself need not be: it carries nothing."""
        try:
            self._log.mark(self._tick())
        except StorageError as error:
            self.health.poison(error)

    # --- reading ---

    def time_ms(self) -> int:
        """Milliseconds since 1970, by the clock that expiries are judged by: it never goes back, nor behind the log."""
        return self._clock.time_ms(self._now_ms())

    def get(self, tablet: int, key: bytes) -> bytes | None:
        """As `Reads.get`, with the tablet found on the way."""
        found = self._tablets.get(tablet)
        if found is None or self.closed:
            found = self._tablet(tablet)
        return found.get(key)

    def row_cache(self, tablet: int) -> RowCache:
        """The values that were read before: any thread may look there first."""
        self._tablet(tablet)
        return self.maintenance.row_cache(tablet)

    def snapshot(self, tablets: Sequence[int]) -> StoreSnapshot:
        """These tablets as they are now, for reading; what is not applied yet is not in it. Close it after use."""
        self._end_quick_puts()
        snapshot = StoreSnapshot(
            {number: self._tablet(number) for number in tablets},
            self.time_ms(),
            store_closed=lambda: self.closed,
            on_close=self._release,
        )
        self.maintenance.files.pin(snapshot.table_names)
        self._snapshots += 1
        return snapshot

    def _release(self, snapshot: StoreSnapshot) -> None:
        self._snapshots -= 1
        snapshot.release(self._dismantler)
        if not self.closed and not self.health.poisoned:  # else the next open sweeps what is left
            self.maintenance.files.unpin(snapshot.table_names)

    # --- maintenance and end ---

    def flush(self) -> None:
        """Freeze what is in memory and have it written to tables. `maintenance.frozen` is empty once that is done."""
        refusal = self.write_refusal()
        if refusal is not None:
            raise refusal
        self._require_idle()
        if self.memory_rows:
            self._freeze()
        else:
            self.maintenance.schedule()

    def tick(self) -> None:
        """Retry background work that failed, once its pause is over. Call it every second or so; it is cheap."""
        self.maintenance.schedule()
        self._advance_splits()

    def request_compaction(self, tablets: Iterable[int] | None = None) -> None:
        """Have these tablets, or all, merged into one level each; `maintenance.idle` once that is done.

        After a split at a key it gives a half files of its own, without the rows of the other one.
        """
        self._require_open()
        wanted = self._tablets if tablets is None else [self._tablet(number).number for number in tablets]
        self.maintenance.request_full_compaction(wanted)

    @property
    def memory_rows(self) -> int:
        """Rows not yet handed to a flush."""
        return sum(len(tablet.active) for tablet in self._tablets.values())

    def stats(self) -> dict[str, int]:
        """Facts for people and metrics; plain ints."""
        self._end_quick_puts()
        maintenance, counters = self.maintenance, self.maintenance.counters
        frozen_bytes = sum(generation.resident_bytes for generation in maintenance.frozen)
        found = {
            "tablets": len(self.tablets),
            "writes": self._writes,
            "snapshots": self._snapshots,
            "stalls": self.backpressure.stalls,
            "stalled_ms": int(self.backpressure.stalled_s * 1000),
            "slowdowns": self.backpressure.slowdowns,
            "slowed_ms": int(self.backpressure.slowed_s * 1000),
            "memtable_bytes": self._active_bytes,
            "memtable_rows": self.memory_rows,
            "frozen_memtables": len(maintenance.frozen),
            "frozen_bytes": frozen_bytes,
            "log_bytes": self._log.offset,
            "log_segment": self._log.number,
            "flushes": counters.flushes,
            "flushes_from_memory": counters.flushes_from_memory,
            "compactions": counters.compactions,
            "moves": counters.moves,
            "job_failures": counters.job_failures,
            "bytes_flushed": counters.bytes_flushed,
            "bytes_compacted": counters.bytes_compacted,
            "memory_bytes": self._active_bytes + frozen_bytes + maintenance.cache.charged_bytes,
            "memory_bytes_max": self.options.memory_bytes_max,
            "cache_bytes": maintenance.cache.charged_bytes,
            "cache_hits": maintenance.cache.hits,
            "cache_misses": maintenance.cache.misses,
            "poisoned": int(self.health.poisoned),
            **self.scrub.stats(),
        }
        for level, tables, size in maintenance.table_counts():
            found[f"level{level}_tables"] = tables
            found[f"level{level}_bytes"] = size
        return found

    def stop_background(self) -> None:
        """End threads and worker. An owner whose `post` takes a lock calls it without the lock, then `close`."""
        self.maintenance.close()
        self._syncer.close()
        self._marker.close()
        self.scrub.close()
        self._chores.close()

    def close(self) -> None:
        """Sync the log, end the workers, release the lock. Safe to call twice. Raises `StorageError` if the log fails.

        A group still in flight stays in the log, not acknowledged. After a poisoning nothing is written.
        """
        if self.closed:
            return
        self.closed = True
        self._end_quick_puts()
        try:
            self.stop_background()
            if not self.health.poisoned:
                self._sync_to_the_end()
        finally:
            self._close_files()
            self._lock.release()

    def forked(self) -> None:
        """This is a child of the process that opened the store: it must not keep others out when that is gone."""
        self._lock.leave()

    def _sync_to_the_end(self) -> None:
        try:
            self._log.sync()
            self._log.note_synced(self._log.offset)
            self._log.mark(self._tick())
            self._log.trim()
            self._log.sync()
            self.maintenance.note_closed((self._log.number, self._log.offset))
        except StorageError as error:
            raise self.health.poison(error) from error

    def _close_files(self) -> None:
        self.maintenance.close_files()
        self._log.close()
        if self._syncing is not None:  # a segment that is done, and whose sync was still to come
            self._syncing.close()

    # --- inside ---

    @property
    def _memtable_full(self) -> bool:
        """Memory, or the log that recovery would have to read, has reached its bound."""
        bytes_max = self.options.memtable_bytes_max
        return self._active_bytes >= bytes_max or self._log.offset >= 2 * bytes_max

    @property
    def _may_freeze(self) -> bool:
        return len(self.maintenance.frozen) < self.options.frozen_memtables_max

    def _make_room(self) -> None:
        if self._memtable_full and self._may_freeze:
            if self.freeze_is_cheap():
                self._freeze()
        elif self.health.background is not None:
            self.maintenance.schedule()

    def freeze_is_cheap(self) -> bool:
        """Whether little of the segment is unsynced, so that closing it does not hold up the caller.

        Else a sync is begun in the background, unless one is under way, and the memtable grows on meanwhile, by a
        quarter at most.
        """
        log, bytes_max = self._log, self.options.memtable_bytes_max
        unsynced_max = min(FREEZE_UNSYNCED_BYTES, bytes_max // 8)
        if self.options.durability == "always" or log.offset - log.synced_offset <= unsynced_max:
            return True
        if self._active_bytes >= bytes_max * 5 // 4 or log.offset >= bytes_max * 5 // 2:
            return True
        if self._syncing is None:
            target = self.sync_target()

            def ended(error: StorageError | None) -> None:
                self._sync_ended(target, error)
                self._advance_splits()  # one may have wanted this freeze

            self._syncer.submit(target.sync, ended)
        return log.offset - log.synced_offset <= unsynced_max

    def _freeze(self) -> None:
        """Close the segment, start the next, and hand the memtables to a flush. A failure poisons the store."""
        self._end_quick_puts()
        old = self._log
        try:
            old.trim()
            if old is not self._syncing:
                old.sync()
                old.note_synced(old.offset)
            else:
                old.sync()
            self._log = LogWriter.create(
                self._vfs,
                filenames.segment_path(self.directory, old.number + 1),
                store_id=self.store_id,
                number=old.number + 1,
                previous=(old.number, old.offset),
                hlc=self._tick(),
            )
            if old is not self._syncing:
                old.close()
        except StorageError as error:
            raise self.health.poison(error) from error
        self._reserve_log()
        segments = [*self._closed_segments, (old.number, old.offset)]
        self._closed_segments = []
        written = [tablet for tablet in self._tablets.values() if len(tablet.active)]
        flushed = {number: tablet.flushed_seqno for number, tablet in self._state.tablets.items()}
        generation = Generation(
            segments=segments,
            next_segment=self._log.number,
            # Of all that logged anything, also writes that left no row: the segments go, and with them the seqnos.
            upto={n: tablet.last_seqno for n, tablet in self._tablets.items() if tablet.last_seqno > flushed[n]},
            memtables={tablet.number: tablet.freeze() for tablet in written},
            resident_bytes=self._active_bytes,
        )
        self._active_bytes = 0
        self.maintenance.add_frozen(generation)

    def _reserve_log(self) -> None:
        if self.options.durability == "always":
            self._log.reserve_ahead(min(RESERVE_BYTES, self.options.memtable_bytes_max // 4))

    def _tick(self) -> int:
        return self._clock.tick(self._now_ms())

    def _tablet(self, number: int) -> Tablet:
        tablet = self._tablets.get(number)
        if tablet is None or self.closed:
            self._require_open()
            raise InvalidArgument(f"This store has no tablet {number}.", detail={"tablet": number})
        return tablet

    def _require_open(self) -> None:
        if self.closed:
            raise StoreClosed(f"The store at {self.directory} is closed.", hint="Open it again to use it.")

    def _require_idle(self) -> None:
        if self._in_flight is not None:
            raise RuntimeError("A group is in flight: apply it, or fail it, before this call.")
