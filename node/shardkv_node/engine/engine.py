"""`Engine`: the storage engine for use inside a program: one ordered map of bytes to bytes, for many threads.

    with Engine.open("data") as engine:
        engine.put("user:1", "Alice")
        engine.get("user:1")                       # b"Alice"
        for key, value in engine.scan(prefix="user:"):
            ...

Invariants: a call that returned is durable as the `durability` option says; the store is touched only under the
mutex; a child made by `os.fork` can use nothing of it, since log and lock belong to the parent.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

from shardkv.errors import ConfigError, InvalidArgument, StoreClosed
from shardkv.write_batch import Text, WriteBatch
from shardkv_node.engine import forks
from shardkv_node.engine.arguments import (
    check_amount,
    check_columns,
    check_limit,
    check_ttl,
    pack_bounds,
    pack_condition,
    pack_path,
    pack_value,
    pair_columns,
)
from shardkv_node.engine.columns import DELETE, PUT, PUT_EXPIRING
from shardkv_node.engine.group_commit import WAIT_S, GroupCommit, closed_error
from shardkv_node.engine.health import COMPACTION, FLUSH
from shardkv_node.engine.options import Options
from shardkv_node.engine.reader import Reader
from shardkv_node.engine.recovery import RecoveryReport
from shardkv_node.engine.snapshot_reader import Snapshot
from shardkv_node.engine.store import Store
from shardkv_node.engine.vfs import Vfs
from shardkv_node.engine.write import Write

LABEL = b"default"
SYNCS_BEFORE_FREEZE = 4
"""Each covers what was written during the one before; a disk slower than the writers would never get there."""
RANGE_BATCH_KEYS = 1000
"""Keys that `delete_range` removes with one write."""


class Engine(Reader):
    """Made by `Engine.open`. Keys and values are str (stored as UTF-8) or bytes; results are bytes."""

    @classmethod
    def open(cls, directory: str | os.PathLike[str], *, vfs: Vfs | None = None, **options: Any) -> Engine:
        """Open the store in `directory`, making it if there is none. Options: see `Options`.

        Raises `ConfigError`, `StoreLocked`, `Corruption`, `UnsupportedFormat`, `StorageError`.
        """
        unknown = sorted(set(options) - set(Options.__dataclass_fields__))
        if unknown:
            known = ", ".join(sorted(Options.__dataclass_fields__))
            raise ConfigError([f"{name}: there is no such option; known are {known}." for name in unknown])
        return cls(pack_path(directory), Options(**options), vfs)

    def __init__(self, directory: str, options: Options, vfs: Vfs | None) -> None:
        self.directory = directory
        self._mutex = threading.RLock()
        self._progress = threading.Condition(self._mutex)
        """Notified when background work ended."""
        self._pid = os.getpid()
        self._closed = self._in_child = False
        self._key_bytes_max = options.key_bytes_max
        self._value_bytes_max = options.value_bytes_max
        with self._mutex:
            self._store = Store.open(directory, options, post=self._post, vfs=vfs)
            self._store.on_progress = self._progress.notify_all
        self._reads = self._store
        self._tablet = self._find_tablet()
        with self._mutex:
            self._commits = GroupCommit(self._store, self._tablet, self._mutex, self._progress)
            self._rows = self._store.row_cache(self._tablet)
        self._known = self._rows.values.get
        forks.watch(self)

    def _find_tablet(self) -> int:
        """The one tablet of an embedded store, made when there is none. If it cannot be made, the store is closed."""
        store = self._store
        try:
            with self._mutex:
                label_to_tablet = {label: number for number, label in store.tablets.items()}
                return label_to_tablet[LABEL] if LABEL in label_to_tablet else store.create_tablet(LABEL)
        except BaseException:
            store.stop_background()  # without the mutex, as in `close`
            with self._mutex:
                store.close()
            raise

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- writing ---

    def put(
        self,
        key: Text,
        value: Text,
        *,
        ttl_ms: int | None = None,
        if_absent: bool = False,
        if_version: int | None = None,
    ) -> int:
        """Store the value under the key, replacing what was there. Returns its version (see `get_versioned`).

        `ttl_ms`: the key reads as absent so many milliseconds from now; without it the key stays. `if_absent`,
        `if_version`: write only when the key does not exist, or has this version (0: does not exist).
        Raises `ConditionFailed` when it is otherwise.
        """
        if (
            type(key) is type(value) is bytes
            and ttl_ms is None
            and if_version is None
            and not if_absent
            and 0 < len(key) <= self._key_bytes_max
            and len(value) <= self._value_bytes_max
            and not self._in_child
        ):
            version = self._commits.put(key, value)
            if version:
                return version
        packed = self._pack(key)
        write = Write(self._tablet, [packed], PUT, [pack_value(value, self._value_bytes_max)])
        if ttl_ms is not None:
            self._expire(write, ttl_ms)
        if if_absent or if_version is not None:
            write.conditions = [pack_condition(packed, if_version, if_absent=if_absent)]
        self._submit(write)
        return write.version

    def delete(self, key: Text, *, if_version: int | None = None) -> bool:
        """Remove the key. Returns whether it existed. `if_version`: as in `put`."""
        write = Write(self._tablet, [self._pack(key)], DELETE, [b""], want_existed=True)
        if if_version is not None:
            write.conditions = [pack_condition(write.keys[0], if_version)]
        self._submit(write)
        return bool(write.existed and write.existed[0])

    def incr(self, key: Text, by: int = 1, *, ttl_ms: int | None = None) -> int:
        """Add to the number that is the value of the key, in one step, and return the sum.

        A number is decimal text of a signed 64-bit whole number, as `str(number)` makes it; a key that does not exist
        counts from 0. The key ends when it would have ended, or so many milliseconds from now with `ttl_ms`.
        Raises `InvalidNumber` when the value is no such number or the sum would be none.
        """
        check_amount(by)
        write = Write(self._tablet, [self._pack(key)], PUT, [b""], want_existed=True, add=by)
        if ttl_ms is not None:
            self._expire(write, ttl_ms)
        self._submit(write)
        return int(write.values[0])

    def write(self, batch: WriteBatch, *, if_versions: Mapping[Any, int] | None = None) -> int:
        """Apply all operations of the batch, in order, or none. Returns their version. The batch stays as it is.

        `if_versions`: write only when each of these keys, in the batch or not, has this version just before
        (0: does not exist); else `ConditionFailed` is raised. An empty batch checks nothing and returns 0.
        """
        if not isinstance(batch, WriteBatch):
            raise InvalidArgument(f"A WriteBatch is expected, not {type(batch).__name__}.")
        if if_versions is not None and not isinstance(if_versions, Mapping):
            raise InvalidArgument(f"if_versions is a dict of keys and versions, not {type(if_versions).__name__}.")
        if not len(batch):
            self._check_usable()
            return 0
        keys, values = list(batch.keys), list(batch.values)
        check_columns(keys, values, self._key_bytes_max, self._value_bytes_max)
        write = Write(self._tablet, keys, batch.kinds, values)
        if if_versions:
            write.conditions = [pack_condition(self._pack(key), version) for key, version in if_versions.items()]
        self._submit(write)
        return write.version

    def put_many(self, items: Iterable[tuple[Text, Text]] | dict[Any, Any], *, ttl_ms: int | None = None) -> int:
        """Store all pairs as one atomic batch. Returns their version. `ttl_ms`: as in `put`, for all of them."""
        batch = WriteBatch()
        if isinstance(items, dict):
            batch.put_many(items.keys(), items.values())
        else:
            batch.put_many(*pair_columns(items))
        if ttl_ms is None or not len(batch):
            return self.write(batch)
        check_columns(batch.keys, batch.values, self._key_bytes_max, self._value_bytes_max)
        write = Write(self._tablet, batch.keys, PUT, batch.values)
        self._expire(write, ttl_ms)
        self._submit(write)
        return write.version

    def _expire(self, write: Write, ttl_ms: int) -> None:
        """Have all operations of the write, which are puts, end so many milliseconds from now."""
        check_ttl(ttl_ms)
        self._check_usable()
        with self._mutex:
            write.expiries = self._store.time_ms() + ttl_ms
        write.kinds = PUT_EXPIRING

    def delete_range(
        self, start: Text = b"", stop: Text | None = None, *, prefix: Text | None = None, limit: int | None = None
    ) -> int:
        """Remove the keys of [start, stop), at most `limit` of them. Returns how many existed and were removed.

        Not atomic: done in batches of at most `RANGE_BATCH_KEYS` keys, ascending, each atomic and as durable as any
        write. When it raises, or the process dies, what is left is a range with fewer keys: call it again to go on.
        A key that is written meanwhile may or may not be removed.
        """
        low, high = pack_bounds(start, stop, prefix)
        check_limit(limit)
        removed = 0
        for page in self._pages(low, high, limit, reverse=False, keys_only=True):
            for first in range(0, len(page.keys), RANGE_BATCH_KEYS):
                keys = page.keys[first : first + RANGE_BATCH_KEYS]
                write = Write(self._tablet, keys, DELETE, [b""] * len(keys), want_existed=True)
                self._submit(write)
                removed += sum(write.existed or ())
        return removed

    # --- reading ---

    def snapshot(self) -> Snapshot:
        """Everything as it is now, for reading: `with engine.snapshot() as s: s.get(key)`, `s.scan(...)`.

        Writes, flushes and compactions go on. Close it after use: until then it keeps the files and memtables it reads.
        """
        self._check_usable()
        with self._mutex:
            return Snapshot(
                self._store.snapshot((self._tablet,)),
                self._mutex,
                self._tablet,
                key_bytes_max=self._key_bytes_max,
                check_usable=self._check_usable,
            )

    # --- maintenance ---

    @property
    def recovery(self) -> RecoveryReport:
        """What opening found: torn tails, replayed writes, swept files."""
        return self._store.recovery

    def flush(self) -> None:
        """Write what is in memory to tables, and wait for it. Raises `StorageError` when that fails."""
        self._check_usable()
        with self._mutex:
            self._flush()

    def compact(self) -> None:
        """Flush, then merge all tables into one level, and wait for it: frees what overwritten and deleted rows hold.

        Raises `StorageError` when that fails.
        """
        self._check_usable()
        with self._mutex:
            self._flush()
            self._store.request_compaction()
            self._wait_for(lambda: not self._store.maintenance.full_compaction_pending, COMPACTION)

    def stats(self) -> dict[str, int]:
        """Facts for people and metrics."""
        self._check_usable()
        with self._mutex:
            return self._store.stats()

    def close(self) -> None:
        """Finish the writes under way, sync, and release the directory. Safe to call twice, from any thread."""
        if self._in_child:
            return
        with self._mutex:
            if self._closed:
                return
            self._closed = True
            self._rows.clear()
            self._commits.close()
        self._store.stop_background()
        with self._mutex:
            self._rows.clear()  # a read that had begun may have put a row there
            self._store.close()

    def forked(self) -> None:
        """This is a child of the process that opened the store, and has nothing to do with it."""
        self._in_child = True
        self._rows.values.clear()
        self._store.forked()

    # --- inside ---

    def _post(self, call: Callable[[], None]) -> None:
        with self._mutex:
            call()
            self._progress.notify_all()

    def _submit(self, write: Write) -> None:
        self._check_usable()
        self._commits.submit(write)

    def _flush(self) -> None:
        """Freeze between two groups, then wait until what was frozen is in tables.

        Freezing syncs what is left of the log, and nobody reads or writes meanwhile: so most of it is synced before,
        in the background.
        """
        store = self._store
        frozen = store.maintenance.frozen
        # With an interval little is unsynced, and the next sync may be set for later.
        syncs_left = SYNCS_BEFORE_FREEZE if store.options.durability == "os" else 0
        while True:
            with self._commits.paused():
                self._check_usable()
                room = not (frozen and store.memory_rows)  # never more frozen than the options allow
                if room and (store.freeze_is_cheap() or not syncs_left):
                    store.flush()
                    last = frozen[-1] if frozen else None
                    break
                syncs_left -= room
            self._wait_for(lambda: not frozen and not store.syncing, FLUSH)
        self._wait_for(lambda: last not in frozen, FLUSH)

    def _wait_for(self, met: Callable[[], bool], kind: str) -> None:
        """Wait for background work of this kind. Raises why it will not come to an end."""
        store = self._store
        while not met():
            if self._closed:
                raise closed_error(self.directory)
            problem = store.write_refusal() or store.health.failing.get(kind)
            if problem is not None:
                raise problem
            self._progress.wait(WAIT_S)

    def _check_usable(self) -> None:
        if self._closed:
            raise closed_error(self.directory)
        if self._in_child:
            raise StoreClosed(
                f"The store at {self.directory} was opened by process {self._pid}; a forked child cannot use it.",
                hint="Open it after the fork, in one process only, or run a node and use a client.",
            )
