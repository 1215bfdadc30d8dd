"""Puts that take the quick lane: as good as those in a group, and none once something stands in the way."""

from __future__ import annotations

import ctypes
import os
import random
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from shardkv.errors import DiskFull, StoreClosed, StorePoisoned
from shardkv_node.engine import Engine
from shardkv_node.engine import memtable as memtables
from shardkv_node.engine.columns import PUT
from shardkv_node.engine.options import Options
from shardkv_node.engine.quick_lane import CREDIT_BYTES, CREDIT_MS
from shardkv_node.engine.store import Store
from shardkv_node.engine.syncer import Done, InlineSyncer
from shardkv_node.engine.vfs import WritableFile
from shardkv_node.engine.write import Write
from tests.node.engine.crash_vfs import CrashVfs, keep_everything
from tests.node.engine.store_driver import STORE, commit, open_store, scan
from tests.node.engine.test_engine import GatedVfs
from tests.node.engine.test_group_commit import Interrupted, queued
from tests.node.engine.test_store import paused_store

OPTIONS = Options(durability="os", workers=0, disk_reserve_bytes=0, scrub_bytes_per_s=0)


class Lane:
    """A store and its lane, which is open: the last group was one put."""

    def __init__(self, options: Options = OPTIONS, vfs: CrashVfs | None = None) -> None:
        self.vfs = vfs or CrashVfs()
        self.store = open_store(self.vfs, options)
        self.tablet = next(iter(self.store.tablets), 0) or self.store.create_tablet(b"t")
        self.lane = self.store.quick_lane(self.tablet)
        self.group(b"first", b"1")

    def group(self, key: bytes, value: bytes) -> int:
        return commit(self.store, self.tablet, [(key, value)]).version

    def rows(self) -> dict[bytes, bytes]:
        return scan(self.store, self.tablet)


def test_quick_puts_and_groups_are_one_history_across_a_crash_of_the_process() -> None:
    world, chance, expected, versions = Lane(), random.Random(1), {b"first": b"1"}, [0]
    for n in range(400):
        key, value = b"k%02d" % chance.randrange(50), b"%d" % n
        version = world.lane.put(key, value) if n % 7 else 0
        versions.append(version or world.group(key, value))
        expected[key] = value
        assert world.store.get(world.tablet, key) == value
        assert world.store.get_versioned(world.tablet, key) == (value, versions[-1])
    assert versions == sorted(set(versions))
    assert world.rows() == dict(sorted(expected.items()))
    again = open_store(world.vfs.crash(keep_everything), OPTIONS)
    assert scan(again, world.tablet) == dict(sorted(expected.items()))
    assert again.recovery.writes_replayed == 401


def test_what_quick_puts_count_is_what_groups_count() -> None:
    quick, slow = Lane(), Lane()
    for n in range(300):
        key, value = b"key-%02d" % (n % 40), b"v" * (n % 90)
        assert quick.lane.put(key, value) or quick.group(key, value)
        slow.group(key, value)
    counted, expected = quick.store.stats(), slow.store.stats()
    overwritten = 260 * len(b"key-00")  # the lane does not look up which keys are new
    for name in ("memtable_bytes", "memory_bytes"):
        assert expected[name] <= counted.pop(name) <= expected.pop(name) + overwritten
    assert counted.pop("log_bytes") == pytest.approx(expected.pop("log_bytes"), rel=0.1)
    assert counted == expected


def _close(world: Lane) -> None:
    world.store.close()


def _poison(world: Lane) -> None:
    world.store.fail(OSError("a sync failed"))


def _freeze(world: Lane) -> None:
    world.store.flush()


def _snapshot(world: Lane) -> None:
    world.store.snapshot([world.tablet])


def _drop(world: Lane) -> None:
    world.store.drop_tablet(world.tablet)


def _batch(world: Lane) -> None:
    commit(world.store, world.tablet, [(b"a", b"1"), (b"b", b"2")])


def _log_only(world: Lane) -> None:
    world.store.log_group([Write(world.tablet, [b"a"], PUT, [b"1"])])


@pytest.mark.parametrize("event", [_close, _poison, _freeze, _snapshot, _drop, _batch, _log_only])
def test_the_lane_is_shut_after(event: Callable[[Lane], None]) -> None:
    world = Lane()
    assert world.lane.put(b"k", b"v")
    event(world)
    size = {path: world.vfs.size(path) for path in world.vfs.files}
    assert world.lane.put(b"k", b"w") == 0
    assert {path: world.vfs.size(path) for path in world.vfs.files} == size


def test_the_lane_of_a_dropped_tablet_never_opens_again() -> None:
    world = Lane()
    other = world.store.create_tablet(b"other")
    world.store.drop_tablet(world.tablet)
    for n in range(3):
        commit(world.store, other, [(b"%d" % n, b"v")])
        assert world.lane.put(b"k", b"v") == 0


@pytest.mark.parametrize(
    "options",
    [
        replace(OPTIONS, durability="always"),
        replace(OPTIONS, durability="interval"),  # here each sync is at once, so none is to come
        replace(OPTIONS, memtable_bytes_max=1024),
    ],
)
def test_the_lane_stays_shut_when(options: Options) -> None:
    world = Lane(options)
    world.group(b"more", b"v" * 1000)
    assert world.lane.put(b"k", b"v") == 0


def test_the_lane_is_shut_while_flushed_tables_slow_writers_down() -> None:
    world = Lane(replace(OPTIONS, l0_compaction_trigger=3, l0_slow_tables=2, l0_stall_tables=9))
    for n in range(2):
        world.store.flush()
        world.group(b"%d" % n, b"v")
    assert world.store.maintenance.most_level0_tables == 2
    assert world.lane.put(b"k", b"v") == 0
    assert world.store.stats()["slowdowns"] == 1


def test_credit_ends_with_its_bytes_and_with_its_time() -> None:
    now = [1_000_000]
    store = Store.open(
        STORE, OPTIONS, vfs=CrashVfs(), post=lambda call: call(), now_ms=lambda: now[0], syncer=InlineSyncer()
    )
    tablet = store.create_tablet(b"t")
    lane = store.quick_lane(tablet)
    commit(store, tablet, [(b"k", b"v")])
    puts = 0
    while lane.put(b"k%d" % puts, b"v" * 1000):
        puts += 1
    assert CREDIT_BYTES // 1300 < puts < CREDIT_BYTES // 1000
    commit(store, tablet, [(b"k", b"v")])
    now[0] += CREDIT_MS - 1
    assert lane.put(b"k", b"v")
    now[0] += 2
    assert lane.put(b"k", b"v") == 0


def test_a_full_memtable_is_frozen_as_by_groups() -> None:
    with Engine.open("/data/store", vfs=CrashVfs(), durability="os", workers=0, memtable_bytes_max=20_000) as engine:
        for n in range(1000):
            engine.put(b"k%04d" % n, b"v" * 50)
        stats = engine.stats()
        assert stats["writes"] == 1000
        assert stats["flushes"] >= 1000 * 190 // 25_000  # a memtable grows by a quarter while its log is synced
        assert len(list(engine.scan())) == 1000


def test_a_snapshot_between_quick_puts_keeps_what_was_there() -> None:
    with Engine.open("/data/store", vfs=CrashVfs(), durability="os", workers=0) as engine:
        for n in range(50):
            engine.put(b"k%02d" % n, b"before")
        with engine.snapshot() as snapshot:
            for n in range(25, 75):
                engine.put(b"k%02d" % n, b"after")
            assert list(snapshot.scan()) == [(b"k%02d" % n, b"before") for n in range(50)]
            assert snapshot.get(b"k30") == b"before" and snapshot.get(b"k60") is None
        engine.put(b"k99", b"last")
        assert engine.get(b"k30") == b"after" and engine.get(b"k99") == b"last"


def test_a_key_of_an_older_part_of_the_memtable_is_replaced_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memtables, "PART_ROWS", 100)
    monkeypatch.setattr(memtables, "RUN_KEYS", 30)
    with Engine.open("/data/store", vfs=CrashVfs(), durability="os", workers=0) as engine:
        for turn in range(3):
            for n in range(1000):
                engine.put(b"k%04d" % (n * 7 % 1000), b"%d" % turn)
                if n == 500:
                    assert len(list(engine.scan(limit=10))) == 10
        memtable = engine._store._tablets[engine._tablet].active
        assert len(memtable.full_parts) > 1
        assert len(memtable) == 1000
        assert list(engine.scan()) == [(b"k%04d" % n, b"2") for n in range(1000)]


class BrokenVfs(CrashVfs):
    """Writes to the log raise `error`, after the bytes were taken, once it is set."""

    error: BaseException | None = None

    def create(self, path: str) -> WritableFile:
        file = super().create(path)
        write = file.write

        def broken(data: bytes | bytearray | memoryview) -> None:
            write(data)
            if self.error is not None and ".wal" in path:
                raise self.error

        file.write = broken  # type: ignore[method-assign]
        return file


def test_an_interrupt_between_log_and_memtable_poisons() -> None:
    vfs = BrokenVfs()
    engine = Engine.open("/data/store", vfs=vfs, durability="os", workers=0, disk_reserve_bytes=0)
    engine.put(b"a", b"1")
    engine.put(b"b", b"2")
    vfs.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        engine.put(b"c", b"3")
    vfs.error = None
    with pytest.raises(StorePoisoned):
        engine.put(b"d", b"4")
    assert engine.get(b"b") == b"2" and engine.get(b"c") is None
    engine.close()


def test_a_failed_write_poisons_and_what_was_acknowledged_is_there_after_it() -> None:
    vfs = CrashVfs()
    engine = Engine.open("/data/store", vfs=vfs, durability="os", workers=0, disk_reserve_bytes=0)
    for n in range(5):
        engine.put(b"%d" % n, b"v")
    vfs.fail_at(vfs.operations + 1)
    for _ in range(2):
        with pytest.raises(StorePoisoned):
            engine.put(b"5", b"v")
    vfs.fail_at(0)
    engine.close()
    with Engine.open("/data/store", vfs=vfs.crash(keep_everything), workers=0, disk_reserve_bytes=0) as again:
        assert list(again.scan(keys_only=True)) == [b"%d" % n for n in range(5)]


def test_a_disk_that_fills_up_stops_quick_puts_after_their_credit() -> None:
    vfs = CrashVfs()
    engine = Engine.open("/data/store", vfs=vfs, durability="os", workers=0, disk_reserve_bytes=1000)
    engine.put(b"a", b"1")
    vfs.free = 10
    with pytest.raises(DiskFull):
        while True:
            engine.put(b"b", b"2")
    assert engine.get(b"b") == b"2"
    engine.close()


class HeldSyncer:
    """Syncs when it is told to."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Callable[[], None], Done]] = []

    def submit(self, sync: Callable[[], None], done: Done, *, delay_s: float = 0.0) -> None:
        self.waiting.append((sync, done))

    def run(self) -> None:
        sync, done = self.waiting.pop()
        sync()
        done(None)

    def close(self) -> None:
        pass


def test_in_the_interval_mode_no_quick_put_is_without_a_sync_to_come() -> None:
    syncer = HeldSyncer()
    options = replace(OPTIONS, durability="interval")
    store = Store.open(STORE, options, vfs=CrashVfs(), post=lambda call: call(), syncer=syncer)
    tablet = store.create_tablet(b"t")
    lane = store.quick_lane(tablet)

    def group() -> None:
        logged = store.log_group([Write(tablet, [b"g"], PUT, [b"v"])])
        store.sync_group(logged, lambda error: store.apply_group(logged))

    group()
    assert lane.put(b"a", b"1") and syncer.waiting
    syncer.run()
    assert not store._log.needs_sync and not syncer.waiting
    assert lane.put(b"b", b"2") == 0  # nothing would sync it
    group()
    assert lane.put(b"b", b"2") and syncer.waiting


def test_in_the_interval_mode_quick_puts_are_synced_without_more_ado(tmp_path: Path) -> None:
    with Engine.open(tmp_path, durability="interval", sync_interval_ms=1, workers=0) as engine:
        log = engine._store._log
        for n in range(300):
            engine.put(b"%d" % n, b"v")
            if n % 100 == 0:
                with engine._mutex:
                    assert engine._progress.wait_for(lambda: not log.needs_sync, timeout=20)


def gated_engine() -> tuple[GatedVfs, Engine]:
    """An engine whose lane for synced puts is open, and the gate before the next sync shut."""
    vfs = GatedVfs()
    engine = Engine.open("/data/store", vfs=vfs, workers=0, disk_reserve_bytes=0)
    engine.put(b"a", b"0")
    engine.put(b"a", b"1")
    vfs.open.clear()
    return vfs, engine


def test_a_synced_put_is_seen_after_its_sync_and_not_by_a_snapshot_made_during_it() -> None:
    vfs, engine = gated_engine()
    writer = threading.Thread(target=engine.put, args=(b"a", b"2"))
    writer.start()
    assert vfs.waiting.wait(10)
    assert engine.get(b"a") == b"1"
    with engine.snapshot() as snapshot:
        writes = engine.stats()["writes"]
        others = [threading.Thread(target=engine.put, args=(b"%d" % n, b"v")) for n in range(5)]
        flusher = threading.Thread(target=engine.flush)
        for thread in (*others, flusher):
            thread.start()
        flusher.join(0.05)
        assert flusher.is_alive() and engine.get(b"0") is None
        vfs.open.set()
        for thread in (writer, *others, flusher):
            thread.join(10)
            assert not thread.is_alive()
        assert engine.get(b"a") == b"2" and snapshot.get(b"a") == b"1"
        assert list(snapshot.scan()) == [(b"a", b"1")]
    assert engine.stats()["writes"] == writes + 6
    assert engine.stats()["flushes"] == 1
    engine.close()
    with Engine.open("/data/store", vfs=vfs.crash(), workers=0, disk_reserve_bytes=0) as again:
        assert list(again.scan(keys_only=True)) == [*(b"%d" % n for n in range(5)), b"a"]


def test_a_synced_put_whose_sync_fails_is_refused_and_poisons() -> None:
    vfs, engine = gated_engine()
    failed: list[StorePoisoned] = []

    def put() -> None:
        try:
            engine.put(b"a", b"2")
        except StorePoisoned as error:
            failed.append(error)

    writer = threading.Thread(target=put)
    writer.start()
    assert vfs.waiting.wait(10)
    vfs.fail_at(vfs.operations + 1)
    vfs.open.set()
    writer.join(10)
    assert len(failed) == 1 and engine.get(b"a") == b"1"
    with pytest.raises(StorePoisoned):
        engine.put(b"b", b"2")
    engine.close()


def test_an_interrupt_during_the_sync_of_a_put_poisons_and_leaves_nobody_waiting() -> None:
    vfs, engine = gated_engine()
    ends: list[str] = []

    def put(key: bytes) -> None:
        try:
            engine.put(key, b"2")
        except (Interrupted, StorePoisoned) as error:
            ends.append(f"{key.decode()} {type(error).__name__}")

    threads = [threading.Thread(target=put, args=(key,)) for key in (b"a", b"b", b"c")]
    threads[0].start()
    assert vfs.waiting.wait(10)
    for count, thread in enumerate(threads[1:], 1):
        thread.start()
        queued(engine, count)
    ident = ctypes.c_ulong(threads[0].ident or 0)
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(Interrupted)) == 1
    vfs.open.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert sorted(ends) == ["a Interrupted", "b StorePoisoned", "c StorePoisoned"]
    assert engine.get(b"a") == b"1"
    engine.close()


def test_threads_that_put_with_sync_share_versions_without_a_gap(tmp_path: Path) -> None:
    with Engine.open(tmp_path, workers=0) as engine:
        versions: list[int] = [engine.put(b"first", b"v")]

        def put(number: int) -> None:
            for n in range(50):
                versions.append(engine.put(b"%d-%d" % (number, n), b"v"))

        threads = [threading.Thread(target=put, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        for n in range(20):
            versions.append(engine.put(b"last-%d" % n, b"v"))
        assert sorted(versions) == list(range(versions[0], versions[0] + 221))
        assert engine.stats()["writes"] == 221 == engine.stats()["memtable_rows"]


def test_a_put_after_close_or_in_a_forked_child_is_refused(tmp_path: Path) -> None:
    engine = Engine.open(tmp_path, durability="os", workers=0)
    engine.put(b"a", b"1")
    engine.put(b"b", b"2")
    child = os.fork()
    if not child:
        code = 1
        try:
            engine.put(b"c", b"3")
        except StoreClosed:
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    engine.put(b"d", b"4")
    engine.close()
    with pytest.raises(StoreClosed):
        engine.put(b"e", b"5")
    with Engine.open(tmp_path, workers=0) as again:
        assert list(again.scan(keys_only=True)) == [b"a", b"b", b"d"]


def test_a_flush_for_a_split_ends_the_credit_of_a_lane_to_another_tablet() -> None:
    store, runner = paused_store(CrashVfs(), OPTIONS)
    tablet, split = store.create_tablet(b"t"), store.create_tablet(b"split")
    commit(store, split, [(b"k", b"v")])
    lane = store.quick_lane(tablet)
    group = store.log_group([Write(tablet, [b"first"], PUT, [b"1"])])
    store.split_tablet_by_token(split, 1 << 63, (b"left", b"right"))  # it waits for the group
    store.apply_group(group)
    assert runner.waiting
    version = lane.put(b"k", b"1") or commit(store, tablet, [(b"k", b"1")]).version
    runner.run_all()
    assert store.get_versioned(tablet, b"k") == (b"1", version)


def test_versions_of_quick_puts_rise_after_an_import_has_raised_the_term() -> None:
    vfs = CrashVfs()
    for _ in range(3):
        world = Lane(vfs=vfs)
        world.store.flush()
        world.store.close()
    world = Lane(vfs=vfs)
    world.store.flush()
    world.store.export_tablet(world.tablet, "/exports/one")
    files = {path: vfs.read_all(path) for path in vfs.files if path.startswith("/exports/one/")}
    other = Lane()
    other.vfs.make_dirs("/exports/one")
    for path, data in files.items():
        other.vfs.replace(path, data)
    other.store.import_tablet("/exports/one", b"imported")
    versions = [other.group(b"k", b"1"), other.lane.put(b"k", b"2"), other.group(b"k", b"3")]
    assert versions == sorted(versions) and versions[1]
