"""The stores that are compared, each behind the same `Handle`, with the same durability, codec, filter and memory.

What "equal" means here:
  durability    sync: acknowledged after fdatasync of the log; otherwise after write(), never before
  codec         the fast byte codec each has (lz4; LevelDB knows only snappy), or none at all
  filter        10 bits per key
  memory        two memtables of `memtable_bytes` (one filling, one being flushed) and a block cache of `cache_bytes`
  back-pressure compaction at 4 tables in level 0, writers stopped at 12

Everything else (block and table size, shape of the levels, threads) is what each one has by default. LMDB and SQLite
know none of these but the cache; they are shown for orientation and set no bar.
"""

from __future__ import annotations

import importlib.util
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from itertools import islice
from typing import Any

OURS = "shardkv"
PEERS = ("leveldb", "rocksdb")
"""The bars are ratios to the better of these."""
MODULES = {OURS: "shardkv_node", "leveldb": "plyvel", "rocksdb": "rocksdict", "lmdb": "lmdb", "sqlite": "sqlite3"}
CONTENDERS = tuple(MODULES)

FILTER_BITS = 10
L0_TRIGGER = 4
L0_STOP = 12
_POLL_S = 0.01
_QUIET_S = 0.3
"""LevelDB does not say when it compacts: its directory must have been still for so long."""

Row = tuple[bytes, bytes]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a store may use. Bytes."""

    memtable_bytes: int
    cache_bytes: int
    codec: str = "lz4"
    sync: bool = False


@dataclass
class Handle:
    """An open store, as plain functions so that no call of ours stands between loop and store."""

    put: Callable[[bytes, bytes], Any]
    write_batch: Callable[[Sequence[bytes], Sequence[bytes]], Any]
    get: Callable[[bytes], bytes | None]
    get_many: Callable[[list[bytes]], list[Any]]
    scan: Callable[[], Iterable[Row]]
    forward: Callable[[bytes, int], Iterable[Row]]
    """So many rows from this key on, upwards."""
    backward: Callable[[bytes, int], Iterable[Row]]
    """So many rows from the one before this key on, downwards."""
    settle: Callable[[], float]
    """Flush, wait until no compaction runs or is due; returns the `time.perf_counter` at which that was so."""
    compact: Callable[[], Any]
    close: Callable[[], Any]
    version: str
    store: Any = None


def installed(name: str) -> bool:
    return importlib.util.find_spec(MODULES[name]) is not None


def open_store(name: str, directory: str, budget: Budget) -> Handle:
    """Open the store of this contender, making it if there is none."""
    os.makedirs(directory, exist_ok=True)
    return _OPENERS[name](directory, budget)


def _open_ours(directory: str, budget: Budget) -> Handle:
    from shardkv.write_batch import WriteBatch
    from shardkv_node.engine import Engine

    engine = Engine.open(
        directory,
        durability="always" if budget.sync else "os",
        memtable_bytes_max=budget.memtable_bytes,
        frozen_memtables_max=1,
        block_cache_bytes=budget.cache_bytes,
        upper_compression=budget.codec,
        bottom_compression=budget.codec,
        filter_bits_per_key=FILTER_BITS,
        l0_compaction_trigger=L0_TRIGGER,
        l0_stall_tables=L0_STOP,
    )

    def write_batch(keys: Sequence[bytes], values: Sequence[bytes]) -> None:
        batch = WriteBatch()
        put = batch.put
        for key, value in zip(keys, values, strict=True):
            put(key, value)
        engine.write(batch)

    def settle() -> float:
        engine.flush()
        while True:
            with engine._mutex:
                if engine._store.maintenance.idle:
                    return time.perf_counter()
            time.sleep(_POLL_S)

    return Handle(
        put=engine.put,
        write_batch=write_batch,
        get=engine.get,
        get_many=engine.get_many,
        scan=engine.scan,
        forward=lambda key, rows: engine.scan(key, limit=rows),
        backward=lambda key, rows: engine.scan(stop=key, limit=rows, reverse=True),
        settle=settle,
        compact=engine.compact,
        close=engine.close,
        version=version("shardkv"),
        store=engine,
    )


def _open_leveldb(directory: str, budget: Budget) -> Handle:
    plyvel: Any = import_module("plyvel")  # comes without types
    db = plyvel.DB(
        directory,
        create_if_missing=True,
        compression=None if budget.codec == "none" else "snappy",
        bloom_filter_bits=FILTER_BITS,
        write_buffer_size=budget.memtable_bytes,
        lru_cache_size=budget.cache_bytes,
        max_open_files=1000,
    )
    sync = budget.sync

    def write_batch(keys: Sequence[bytes], values: Sequence[bytes]) -> None:
        batch = db.write_batch(sync=sync)
        put = batch.put
        for key, value in zip(keys, values, strict=True):
            put(key, value)
        batch.write()

    def settle() -> float:
        # A compaction of an empty range behind all keys does one thing: it flushes.
        db.compact_range(start=b"\xff" * 32, stop=b"\xff" * 33)
        return _quiet_since(directory)

    get = db.get
    return Handle(
        put=(lambda key, value: db.put(key, value, sync=True)) if sync else db.put,
        write_batch=write_batch,
        get=get,
        get_many=lambda keys: [get(key) for key in keys],
        scan=db.iterator,
        forward=lambda key, rows: islice(db.iterator(start=key), rows),
        backward=lambda key, rows: islice(db.iterator(stop=key, reverse=True), rows),
        settle=settle,
        compact=db.compact_range,
        close=db.close,
        version=f"{plyvel.__leveldb_version__} (plyvel {plyvel.__version__})",
    )


def _open_rocksdb(directory: str, budget: Budget) -> Handle:
    rocks: Any = import_module("rocksdict")
    options = rocks.Options(raw_mode=True)
    options.create_if_missing(True)
    options.set_write_buffer_size(budget.memtable_bytes)
    options.set_max_write_buffer_number(2)
    options.set_compression_type(getattr(rocks.DBCompressionType, budget.codec)())
    options.set_level_zero_file_num_compaction_trigger(L0_TRIGGER)
    options.set_level_zero_slowdown_writes_trigger(L0_STOP)
    options.set_level_zero_stop_writes_trigger(L0_STOP)
    tables = rocks.BlockBasedOptions()
    tables.set_block_cache(rocks.Cache(budget.cache_bytes))
    tables.set_bloom_filter(FILTER_BITS, False)
    options.set_block_based_table_factory(tables)
    # The options must be named for the column family too: on reopening it would forget filter and cache otherwise.
    db = rocks.Rdict(directory, options, column_families={"default": options})
    if budget.sync:
        durable = rocks.WriteOptions()
        durable.sync = True
        db.set_write_options(durable)

    def write_batch(keys: Sequence[bytes], values: Sequence[bytes]) -> None:
        batch = rocks.WriteBatch(raw_mode=True)
        put = batch.put
        for key, value in zip(keys, values, strict=True):
            put(key, value)
        db.write(batch)

    busy = [
        "rocksdb.num-running-flushes",
        "rocksdb.num-running-compactions",
        "rocksdb.mem-table-flush-pending",
        "rocksdb.compaction-pending",
    ]

    def settle() -> float:
        db.flush()
        while any(map(db.property_int_value, busy)):
            time.sleep(_POLL_S)
        return time.perf_counter()

    def backward(key: bytes, rows: int) -> Iterable[Row]:
        return islice(db.items(backwards=True, from_key=key), rows)

    return Handle(
        put=db.put,
        write_batch=write_batch,
        get=db.get,
        get_many=db.get,
        scan=db.items,
        forward=lambda key, rows: islice(db.items(from_key=key), rows),
        backward=backward,
        settle=settle,
        compact=lambda: db.compact_range(None, None),
        close=db.close,
        version=f"rocksdict {version('rocksdict')}",
    )


def _open_lmdb(directory: str, budget: Budget) -> Handle:
    lmdb: Any = import_module("lmdb")
    env = lmdb.open(directory, map_size=1 << 38, sync=budget.sync, metasync=budget.sync, max_readers=256)

    def put(key: bytes, value: bytes) -> None:
        with env.begin(write=True) as change:
            change.put(key, value)

    def write_batch(keys: Sequence[bytes], values: Sequence[bytes]) -> None:
        with env.begin(write=True) as change:
            for key, value in zip(keys, values, strict=True):
                change.put(key, value)

    def get(key: bytes) -> bytes | None:
        with env.begin() as view:
            found: bytes | None = view.get(key)
            return found

    def get_many(keys: list[bytes]) -> list[bytes | None]:
        with env.begin() as view:
            return list(map(view.get, keys))

    def scan() -> Iterable[Row]:
        with env.begin() as view:
            yield from view.cursor()

    def forward(key: bytes, rows: int) -> Iterable[Row]:
        with env.begin() as view:
            cursor = view.cursor()
            if cursor.set_range(key):
                yield from islice(cursor, rows)

    def backward(key: bytes, rows: int) -> Iterable[Row]:
        with env.begin() as view:
            cursor = view.cursor()
            found = cursor.prev() if cursor.set_range(key) else cursor.last()
            if found:
                yield from islice(cursor.iterprev(), rows)

    def settle() -> float:
        env.sync(True)
        return time.perf_counter()

    return Handle(
        put=put,
        write_batch=write_batch,
        get=get,
        get_many=get_many,
        scan=scan,
        forward=forward,
        backward=backward,
        settle=settle,
        compact=settle,
        close=env.close,
        version=".".join(map(str, lmdb.version())),
    )


def _open_sqlite(directory: str, budget: Budget) -> Handle:
    import sqlite3

    db = sqlite3.connect(os.path.join(directory, "db"), isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA journal_mode=WAL")
    db.execute(f"PRAGMA synchronous={'FULL' if budget.sync else 'NORMAL'}")
    db.execute(f"PRAGMA cache_size=-{budget.cache_bytes // 1024}")
    db.execute("CREATE TABLE IF NOT EXISTS kv (k BLOB PRIMARY KEY, v BLOB) WITHOUT ROWID")
    lock = threading.Lock()
    put_sql = "INSERT INTO kv VALUES (?, ?) ON CONFLICT (k) DO UPDATE SET v = excluded.v"

    def put(key: bytes, value: bytes) -> None:
        with lock:
            db.execute(put_sql, (key, value))

    def write_batch(keys: Sequence[bytes], values: Sequence[bytes]) -> None:
        db.execute("BEGIN")
        db.executemany(put_sql, zip(keys, values, strict=True))
        db.execute("COMMIT")

    def get(key: bytes) -> bytes | None:
        row = db.execute("SELECT v FROM kv WHERE k = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def get_many(keys: list[bytes]) -> list[bytes | None]:
        found = dict(db.execute(f"SELECT k, v FROM kv WHERE k IN ({','.join('?' * len(keys))})", keys))
        return list(map(found.get, keys))

    def settle() -> float:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        return time.perf_counter()

    def compact() -> None:
        db.execute("VACUUM")
        settle()

    return Handle(
        put=put,
        write_batch=write_batch,
        get=get,
        get_many=get_many,
        scan=lambda: db.execute("SELECT k, v FROM kv ORDER BY k"),
        forward=lambda key, rows: db.execute("SELECT k, v FROM kv WHERE k >= ? ORDER BY k LIMIT ?", (key, rows)),
        backward=lambda key, rows: db.execute("SELECT k, v FROM kv WHERE k < ? ORDER BY k DESC LIMIT ?", (key, rows)),
        settle=settle,
        compact=compact,
        close=db.close,
        version=sqlite3.sqlite_version,
    )


_OPENERS: dict[str, Callable[[str, Budget], Handle]] = {
    OURS: _open_ours,
    "leveldb": _open_leveldb,
    "rocksdb": _open_rocksdb,
    "lmdb": _open_lmdb,
    "sqlite": _open_sqlite,
}


def directory_bytes(directory: str) -> int:
    """Sizes of all files, summed. A file that goes meanwhile counts nothing."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.path.getsize(os.path.join(folder, name))
            except FileNotFoundError:
                continue
    return total


def _quiet_since(directory: str) -> float:
    """The time of the last change in a directory, once there was none for `_QUIET_S`."""
    changed, before = time.perf_counter(), None
    while time.perf_counter() - changed < _QUIET_S:
        now = _signature(directory)
        if now != before:
            changed, before = time.perf_counter(), now
        time.sleep(_POLL_S)
    return changed


def _signature(directory: str) -> list[tuple[str, int]]:
    found = []
    with os.scandir(directory) as entries:
        for entry in entries:
            try:
                found.append((entry.name, entry.stat().st_size))
            except FileNotFoundError:
                continue
    return sorted(found)
