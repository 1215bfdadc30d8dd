"""`compact_store`: opens a store nobody uses and merges every tablet into one level, telling how far it is."""

from __future__ import annotations

import queue
from collections.abc import Callable
from dataclasses import dataclass

from shardkv.errors import StorageError
from shardkv_node.engine import filenames
from shardkv_node.engine.options import Options
from shardkv_node.engine.store import Store
from shardkv_node.engine.tools.places import table_names
from shardkv_node.engine.vfs import Vfs

_LOOK_S = 0.2

Progress = Callable[[int, int], None]
"""(bytes written, bytes there were at the start). What is written is usually less."""


@dataclass(frozen=True, slots=True)
class CompactReport:
    bytes_before: int
    """Of all tables and log segments."""
    bytes_after: int
    compactions: int


def compact_store(vfs: Vfs, store: str, progress: Progress, options: Options | None = None) -> CompactReport:
    """Flush the log and compact everything. An interrupt or failure leaves the store as good as it was.

    Raises `StoreLocked`, `Corruption`, `DiskFull` and the other errors of an open and of a compaction.
    """
    posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
    before = _bytes_of(vfs, store)
    options = options if options is not None else Options()
    opened = Store.open(store, options, post=posted.put, vfs=vfs)
    try:
        inputs = set(table_names(vfs, store))
        opened.flush()
        _run(opened, posted, lambda: not opened.maintenance.frozen, lambda: None)
        opened.request_compaction()
        _run(
            opened,
            posted,
            lambda: opened.maintenance.idle,
            lambda: progress(_table_bytes(vfs, store, except_for=inputs), before),
        )
        compactions = opened.stats()["compactions"]
    finally:
        opened.close()
    after = _bytes_of(vfs, store)
    progress(before, before)
    return CompactReport(before, after, compactions)


def _run(
    store: Store, posted: queue.SimpleQueue[Callable[[], None]], met: Callable[[], bool], look: Callable[[], None]
) -> None:
    """Be the owner of the store until `met`. Raises what keeps the work from its end."""
    while not met():
        problem: StorageError | None = store.write_refusal() or store.health.background
        if problem is not None:
            raise problem
        look()
        try:
            posted.get(timeout=_LOOK_S)()
        except queue.Empty:
            store.tick()


def _bytes_of(vfs: Vfs, store: str) -> int:
    directory = filenames.wal_directory(store)
    logs = sum(vfs.size(f"{directory}/{name}") for name in vfs.list(directory)) if vfs.exists(directory) else 0
    return logs + _table_bytes(vfs, store, except_for=set())


def _table_bytes(vfs: Vfs, store: str, *, except_for: set[str]) -> int:
    size = 0
    for name in set(table_names(vfs, store)) - except_for:
        path = filenames.table_path(store, name)
        if vfs.exists(path):
            try:
                size += vfs.size(path)
            except StorageError:
                continue  # a compaction removed it between the two looks
    return size
