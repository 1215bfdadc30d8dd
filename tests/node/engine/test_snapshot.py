"""Snapshots: every read gives what it gave at their moment, whatever is written, flushed or compacted since."""

from __future__ import annotations

import os
import random
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkv import WriteBatch
from shardkv.errors import InvalidArgument, StoreClosed
from shardkv_node.engine import Engine
from shardkv_node.engine.columns import PUT
from shardkv_node.engine.memtable import Memtable, cell_value
from shardkv_node.engine.memtable_view import MemtableView
from shardkv_node.engine.reads import Reads
from tests.node.engine.crash_vfs import CrashVfs
from tests.node.engine.store_driver import TINY, commit, open_store, random_operations, scan


def table_files(vfs: CrashVfs) -> set[str]:
    return {os.path.basename(path) for path in vfs.files if path.endswith(".sst")}


def read_all(reads: Reads, tablet: int, *, reverse: bool = False) -> dict[bytes, bytes]:
    rows: dict[bytes, bytes] = {}
    low, high = b"", None
    while True:
        page = reads.scan_page([tablet], low, high, reverse=reverse, limit=5)
        rows.update(zip(page.keys, page.values, strict=True))
        if page.frontier is None:
            return rows
        low, high = (low, page.frontier) if reverse else (page.frontier, high)


def test_snapshots_of_any_moment_stay_as_they_were() -> None:
    chance = random.Random(7)
    vfs = CrashVfs()
    store = open_store(vfs, replace(TINY, memtable_bytes_max=4000))
    tablet = store.create_tablet(b"t")
    now: dict[bytes, bytes] = {}
    live = []
    for step in range(400):
        operations = random_operations(chance)
        commit(store, tablet, operations)
        for key, value in operations:
            now.pop(key, None)
            if value is not None:
                now[key] = value
        if chance.random() < 0.1:
            live.append((store.snapshot([tablet]), dict(now)))
        if len(live) > 4:
            live.pop(chance.randrange(len(live)))[0].close()
        if step % 97 == 0:
            store.flush()
            store.request_compaction()
        for snapshot, rows in live if step % 10 == 0 else []:
            assert read_all(snapshot, tablet) == rows == read_all(snapshot, tablet, reverse=True)
            keys = [b"k%02d" % n for n in range(40)]
            assert snapshot.get_many(tablet, keys) == [rows.get(key) for key in keys]
    assert store.maintenance.counters.compactions > 3 and store.stats()["snapshots"] == len(live) > 0
    assert scan(store, tablet) == now
    for snapshot, _ in live:
        snapshot.close()
        snapshot.close()
    assert table_files(vfs) == store._state.table_names() and store.stats()["snapshots"] == 0
    store.close()


def test_files_a_snapshot_reads_stay_until_it_is_closed_even_those_of_a_dropped_tablet() -> None:
    vfs = CrashVfs()
    store = open_store(vfs)
    tablet = store.create_tablet(b"t")
    commit(store, tablet, [(b"a", b"1"), (b"b", b"2")])
    store.flush()
    commit(store, tablet, [(b"b", b"3")])
    version = store.get_versioned(tablet, b"b")
    first, second = store.snapshot([tablet]), store.snapshot([tablet])
    pinned = table_files(vfs)
    store.drop_tablet(tablet)
    assert table_files(vfs) == pinned
    first.close()
    assert table_files(vfs) == pinned
    assert read_all(second, tablet) == {b"a": b"1", b"b": b"3"} and second.get_versioned(tablet, b"b") == version
    with pytest.raises(StoreClosed, match="snapshot is closed"):
        first.get(tablet, b"a")
    with pytest.raises(InvalidArgument, match="no tablet 99"):
        second.get(99, b"a")
    second.close()
    assert table_files(vfs) == set()
    store.close()


def test_files_of_a_snapshot_never_closed_are_swept_at_the_next_open() -> None:
    vfs = CrashVfs()
    store = open_store(vfs)
    tablet = store.create_tablet(b"t")
    commit(store, tablet, [(b"a", b"1")])
    store.flush()
    snapshot = store.snapshot([tablet])
    commit(store, tablet, [(b"a", b"2")])
    store.flush()
    store.request_compaction()
    store.close()
    with pytest.raises(StoreClosed, match="store of this snapshot is closed"):
        snapshot.get(tablet, b"a")
    snapshot.close()
    assert table_files(vfs) > store._state.table_names()
    store = open_store(vfs)
    assert table_files(vfs) == store._state.table_names() and scan(store, tablet) == {b"a": b"2"}
    store.close()


KEYS = st.sampled_from([b"a", b"b", b"c", b"d"])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(KEYS, st.just("open"), st.integers(0, 3)), max_size=40), st.booleans())
def test_views_of_a_memtable_hold_what_it_held(steps: list[bytes | str | int], ordered: bool) -> None:
    memtable, now = Memtable(ordered=ordered), {}
    views: list[tuple[MemtableView, dict[bytes, bytes]]] = []
    for version, step in enumerate(steps, 1):
        if isinstance(step, bytes):
            now[step] = b"%d" % version
            memtable.apply([step, step], PUT, version, [b"first", now[step]])
        elif step == "open":
            views.append((MemtableView(memtable), dict(now)))
        elif views:
            views.pop(int(step) % len(views))[0].close()
        for view, rows in views:
            cells = {key: view.get(key) for key in (b"a", b"b", b"c", b"d")}
            assert {key: cell_value(cell, lambda: 0) for key, cell in cells.items() if cell is not None} == rows
            chunks = list(view.chunks(b"", None, reverse=False))
            assert [key for chunk in chunks for key in chunk.keys] == sorted(rows)
            assert [value for chunk in chunks for value in chunk.values] == [rows[key] for key in sorted(rows)]
    for view, _ in views:
        view.close()
    assert memtable.newest_view is None


def test_a_snapshot_of_the_embedded_engine_is_one_moment_for_all_its_reads(tmp_path: Path) -> None:
    with Engine.open(tmp_path, memtable_bytes_max=64 * 1024, l0_compaction_trigger=2, durability="os") as engine:
        engine.put_many({b"%03d" % n: b"0" for n in range(500)})
        stop = threading.Event()

        def write() -> None:
            round_number = 0
            while not stop.is_set():
                round_number += 1
                engine.put_many({b"%03d" % n: b"%d" % round_number for n in range(500)})

        writer = threading.Thread(target=write)
        writer.start()
        try:
            for _ in range(20):
                with engine.snapshot() as snapshot:
                    values = {value for _, value in snapshot.scan()}
                    assert len(values) == 1 and snapshot.count() == 500
                    assert set(snapshot.get_many([b"000", b"499"])) == values
                    assert {value for _, value in snapshot.scan(b"100", b"200", reverse=True)} == values
        finally:
            stop.set()
            writer.join()
        with pytest.raises(StoreClosed):
            snapshot.get("000")
        with engine.snapshot() as snapshot:
            engine.close()
            with pytest.raises(StoreClosed):
                snapshot.get("000")


def test_a_range_is_deleted_in_batches_and_counted(tmp_path: Path) -> None:
    with Engine.open(tmp_path, durability="os", workers=0) as engine:
        engine.put_many({b"%05d" % n: b"v" for n in range(5000)})
        assert engine.count() == 5000 and engine.count("01000", "01500") == 500 and engine.count(prefix="012") == 100
        with engine.snapshot() as before:
            assert engine.delete_range("01000", "04000") == 3000
            assert engine.delete_range("01000", "04000") == 0
            assert engine.count() == 2000 and before.count() == 5000
        assert engine.delete_range(prefix="00", limit=10) == 10
        assert next(engine.scan(keys_only=True)) == b"00010"
        assert engine.delete_range() == 1990 and list(engine.scan()) == []
        batch = WriteBatch()
        batch.put("a", "1")
        assert engine.write(batch) > 0
