"""`Engine`: the storage engine for use inside a program: one ordered map of bytes to bytes, for many threads.

    with Engine.open("data") as engine:
        engine.put("user:1", "Alice")
        engine.get("user:1")                       # b"Alice"
        for key, value in engine.scan(prefix="user:"):
            ...

Group commit by leader: a thread that wants to write queues its write; if nobody leads, it logs and syncs everything
queued, for all. The mutex is free during the sync, so that others read and queue meanwhile.

Invariants: a call that returned is durable as the `durability` option says; the store is touched only under the
mutex; a child made by `os.fork` can use nothing of it, since log and lock belong to the parent.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Literal, overload

from shardkv.errors import ConfigError, InvalidArgument, ShardKVError, StoreClosed
from shardkv.write_batch import Text, WriteBatch
from shardkv_node.engine.arguments import (
    check_columns,
    check_limit,
    check_ttl,
    pack_bounds,
    pack_condition,
    pack_key,
    pack_value,
)
from shardkv_node.engine.columns import DELETE, PUT, PUT_EXPIRING
from shardkv_node.engine.options import Options
from shardkv_node.engine.recovery import RecoveryReport
from shardkv_node.engine.source import Page
from shardkv_node.engine.store import Store
from shardkv_node.engine.syncer import attempt
from shardkv_node.engine.vfs import Vfs
from shardkv_node.engine.write import Write

LABEL = b"default"
GROUP_BYTES_MAX = 16 * 1024 * 1024
"""A leader takes no more than this into one group, unless one write alone is larger."""
PAGE_BYTES = 256 * 1024
"""What a scan reads at a time."""
_WAIT_S = 0.5
"""How often a waiting writer looks whether the store takes writes at all."""


class Engine:
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
        return cls(os.fspath(directory), Options(**options), vfs)

    def __init__(self, directory: str, options: Options, vfs: Vfs | None) -> None:
        self.directory = directory
        self._mutex = threading.RLock()
        self._changed = threading.Condition(self._mutex)
        self._pid = os.getpid()
        self._queue: list[Write] = []
        self._leading = False
        self._closed = False
        self._interval = options.durability == "interval"
        self._key_bytes_max = options.key_bytes_max
        self._value_bytes_max = options.value_bytes_max
        with self._mutex:
            self._store = Store.open(directory, options, post=self._post, vfs=vfs)
            self._store.on_progress = self._changed.notify_all
            label_to_tablet = {label: number for number, label in self._store.tablets.items()}
            found = label_to_tablet.get(LABEL)
            self._tablet = self._store.create_tablet(LABEL) if found is None else found

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
        packed = self._key(key)
        write = Write(self._tablet, [packed], PUT, [pack_value(value, self._value_bytes_max)])
        if ttl_ms is not None:
            self._expire(write, ttl_ms)
        if if_absent or if_version is not None:
            write.conditions = [pack_condition(packed, if_version, if_absent=if_absent)]
        self._submit(write)
        return write.version

    def delete(self, key: Text, *, if_version: int | None = None) -> bool:
        """Remove the key. Returns whether it existed. `if_version`: as in `put`."""
        write = Write(self._tablet, [self._key(key)], DELETE, [b""], want_existed=True)
        if if_version is not None:
            write.conditions = [pack_condition(write.keys[0], if_version)]
        self._submit(write)
        return bool(write.existed and write.existed[0])

    def write(self, batch: WriteBatch, *, if_versions: Mapping[Any, int] | None = None) -> int:
        """Apply all operations of the batch, in order, or none. Returns their version. The batch stays as it is.

        `if_versions`: write only when each of these keys, in the batch or not, has this version just before
        (0: does not exist); else `ConditionFailed` is raised. An empty batch checks nothing and returns 0.
        """
        if not isinstance(batch, WriteBatch):
            raise InvalidArgument(f"A WriteBatch is expected, not {type(batch).__name__}.")
        if not len(batch):
            self._check_usable()
            return 0
        keys, kinds, values = list(batch.keys), bytes(batch.kinds), list(batch.values)
        check_columns(keys, values, self._key_bytes_max, self._value_bytes_max)
        write = Write(self._tablet, keys, kinds[0] if len(set(kinds)) == 1 else kinds, values)
        if if_versions:
            write.conditions = [pack_condition(self._key(key), version) for key, version in if_versions.items()]
        self._submit(write)
        return write.version

    def put_many(self, items: Iterable[tuple[Text, Text]] | dict[Any, Any], *, ttl_ms: int | None = None) -> int:
        """Store all pairs as one atomic batch. Returns their version. `ttl_ms`: as in `put`, for all of them."""
        batch = WriteBatch()
        for key, value in items.items() if isinstance(items, dict) else items:
            batch.put(key, value)
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

    # --- reading ---

    def get(self, key: Text) -> bytes | None:
        """The value, or None when the key does not exist."""
        packed = self._key(key)
        self._check_usable()
        with self._mutex:
            return self._store.get(self._tablet, packed)

    def get_versioned(self, key: Text) -> tuple[bytes, int] | None:
        """(value, version), or None when the key does not exist.

        A version is a whole number above 0. Each write has one, the same for all keys of a batch; later writes have
        greater ones. Give it to `put`, `delete` or `write` to write only if nobody else has meanwhile.
        """
        packed = self._key(key)
        self._check_usable()
        with self._mutex:
            return self._store.get_versioned(self._tablet, packed)

    def get_many(self, keys: Iterable[Text]) -> list[bytes | None]:
        """A value or None for each key, in the order asked; all from one moment."""
        packed = [self._key(key) for key in keys]
        self._check_usable()
        with self._mutex:
            return self._store.get_many(self._tablet, packed)

    @overload
    def scan(
        self,
        start: Text = b"",
        stop: Text | None = None,
        *,
        prefix: Text | None = None,
        limit: int | None = None,
        reverse: bool = False,
        keys_only: Literal[False] = False,
    ) -> Iterator[tuple[bytes, bytes]]: ...

    @overload
    def scan(
        self,
        start: Text = b"",
        stop: Text | None = None,
        *,
        prefix: Text | None = None,
        limit: int | None = None,
        reverse: bool = False,
        keys_only: Literal[True],
    ) -> Iterator[bytes]: ...

    def scan(
        self,
        start: Text = b"",
        stop: Text | None = None,
        *,
        prefix: Text | None = None,
        limit: int | None = None,
        reverse: bool = False,
        keys_only: bool = False,
    ) -> Iterator[tuple[bytes, bytes]] | Iterator[bytes]:
        """(key, value) pairs, or keys, of [start, stop) in key order; `prefix` narrows it, `limit` bounds the count.

        Read in pages: a key that exists for the whole scan is given exactly once; one that is written meanwhile
        may or may not be. Raises `InvalidRange` when `stop` is before `start`.
        """
        low, high = pack_bounds(start, stop, prefix)
        check_limit(limit)
        self._check_usable()
        pages = self._pages(low, high, limit, reverse=reverse, keys_only=keys_only)
        if keys_only:
            return (key for page in pages for key in page.keys)
        return (pair for page in pages for pair in zip(page.keys, page.values, strict=True))

    def _pages(
        self, start: bytes, stop: bytes | None, limit: int | None, *, reverse: bool, keys_only: bool
    ) -> Iterator[Page]:
        while limit is None or limit > 0:
            self._check_usable()
            while not self._ready_to_scan():
                pass
            with self._mutex:
                page = self._store.scan_page(
                    (self._tablet,),
                    start,
                    stop,
                    reverse=reverse,
                    limit=limit,
                    bytes_max=PAGE_BYTES,
                    keys_only=keys_only,
                )
            yield page
            if page.frontier is None:
                return
            limit = None if limit is None else limit - len(page.keys)
            start, stop = (start, page.frontier) if reverse else (page.frontier, stop)

    def _ready_to_scan(self) -> bool:
        with self._mutex:
            return self._store.ready_to_scan((self._tablet,))

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
            self._wait_for(lambda: not self._store.maintenance.full_compaction_pending)

    def stats(self) -> dict[str, int]:
        """Facts for people and metrics."""
        self._check_usable()
        with self._mutex:
            return self._store.stats()

    def close(self) -> None:
        """Finish the writes under way, sync, and release the directory. Safe to call twice, from any thread."""
        if os.getpid() != self._pid:
            return
        with self._mutex:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
            while self._leading:
                self._changed.wait()
        self._store.stop_background()
        with self._mutex:
            self._store.close()

    # --- inside ---

    def _post(self, call: Callable[[], None]) -> None:
        with self._mutex:
            call()
            self._changed.notify_all()

    def _submit(self, write: Write) -> None:
        """Queue the write and see it through, as leader or by waiting for one."""
        self._check_usable()
        with self._mutex:
            self._queue.append(write)
            try:
                while not (write.applied or write.error):
                    if self._leading:
                        self._changed.wait()
                    else:
                        self._lead()
            except BaseException:  # an interrupted caller takes back what no group has taken yet
                if write in self._queue:
                    self._queue.remove(write)
                raise
        if write.error is not None:
            raise write.error

    def _lead(self) -> None:
        """Log, sync and apply what is queued, up to a bound. Every write taken gets its outcome."""
        self._leading = True
        taken: list[Write] = []
        try:
            self._wait_for_room()
            taken = self._take()
            self._commit(taken)
        except ShardKVError as error:
            for write in taken or self._take():
                write.error = error
        except BaseException as error:  # an interrupt between log and apply: what the log holds is not known
            for write in taken:
                write.error = write.error or self._store.fail(error)
            raise
        finally:
            self._leading = False
            self._changed.notify_all()

    def _wait_for_room(self) -> None:
        """Return when the store does not stall, which `log_group` leaves to its caller. Raises why it will not end."""
        store = self._store
        while store.stalled:
            refusal = store.write_refusal()
            if refusal is not None:
                raise refusal
            self._changed.wait(_WAIT_S)
            if self._closed:
                break
        if self._closed:
            raise self._closed_error()

    def _take(self) -> list[Write]:
        queue = self._queue
        if len(queue) > 1:
            size = 0
            for count, write in enumerate(queue):
                size += sum(map(len, write.keys)) + sum(map(len, write.values))
                if count and size > GROUP_BYTES_MAX:
                    self._queue = queue[count:]
                    return queue[:count]
        self._queue = []
        return queue

    def _commit(self, writes: list[Write]) -> None:
        """One group through all its stages. The mutex is free while the disk syncs."""
        store = self._store
        group = store.log_group(writes)
        if store.sync_due():
            target = store.sync_target()
            self._mutex.release()
            try:
                problem = attempt(target.sync)
            finally:
                self._mutex.acquire()
            if problem is not None:
                raise store.fail(problem)
            store.synced(target)
        elif self._interval:
            store.schedule_sync()
        store.apply_group(group)

    def _flush(self) -> None:
        """Freeze between two groups, then wait until what was frozen is in tables."""
        while self._leading:
            self._changed.wait()
        self._check_usable()
        store = self._store
        while store.maintenance.frozen and store.memory_rows:
            self._wait_for(lambda: not store.maintenance.frozen)  # never more frozen than the options allow
            while self._leading:
                self._changed.wait()
        store.flush()
        frozen = store.maintenance.frozen
        last = frozen[-1] if frozen else None
        self._wait_for(lambda: last not in frozen)

    def _wait_for(self, met: Callable[[], bool]) -> None:
        """Wait for background work. Raises why it will not come to an end."""
        store = self._store
        while not met():
            if self._closed:
                raise self._closed_error()
            problem = store.write_refusal() or store.health.background
            if problem is not None:
                raise problem
            self._changed.wait(_WAIT_S)

    def _check_usable(self) -> None:
        if self._closed:
            raise self._closed_error()
        if os.getpid() != self._pid:
            raise StoreClosed(
                f"The store at {self.directory} was opened by process {self._pid}; a forked child cannot use it.",
                hint="Open it after the fork, in one process only, or run a node and use a client.",
            )

    def _closed_error(self) -> StoreClosed:
        return StoreClosed(f"The store at {self.directory} is closed.", hint="Open it again to use it.")

    def _key(self, key: Text) -> bytes:
        return pack_key(key, self._key_bytes_max)
