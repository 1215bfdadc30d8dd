"""Writers are slowed, then stopped, and stats say so; a freeze does not sync megabytes in its caller's time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from shardkv.errors import StorageError
from shardkv_node.engine.backpressure import Backpressure
from shardkv_node.engine.options import MIB, Options
from shardkv_node.engine.store import Store
from tests.node.engine.crash_vfs import CrashVfs, keep_everything
from tests.node.engine.store_driver import STORE, TINY, Driver, open_store, scan

Done = Callable[[StorageError | None], None]


class LateSyncer:
    """Syncs when it is told to."""

    def __init__(self) -> None:
        self.asked: list[tuple[Callable[[], None], Done]] = []

    def submit(self, sync: Callable[[], None], done: Done, *, delay_s: float = 0.0) -> None:
        self.asked.append((sync, done))

    def run(self) -> None:
        sync, done = self.asked.pop(0)
        sync()
        done(None)

    def close(self) -> None:
        self.asked.clear()


def test_a_group_costs_more_the_further_compaction_is_behind() -> None:
    now = [100.0]
    pressure = Backpressure(Options(), lambda: now[0])
    pressure.note_group(MIB, 7)
    assert pressure.delay_s(7) == 0 and pressure.slowdowns == 0
    pressure.note_group(MIB, 8)
    assert pressure.delay_s(8) == 1 / 16
    assert pressure.delay_s(7) == 0, "over as soon as compaction has caught up"
    pressure.note_group(MIB, 11)
    assert pressure.delay_s(11) == 5 / 16
    now[0] += 5 / 16 - 0.0005
    assert pressure.delay_s(11) == 0, "what no clock can wait for is saved up"
    assert (pressure.slowdowns, pressure.slowed_s) == (2, 5 / 16)


def test_a_stall_is_one_however_often_it_is_asked_and_is_timed() -> None:
    now = [0.0]
    pressure = Backpressure(Options(), lambda: now[0])
    for second in range(3):
        now[0] = float(second)
        pressure.note_stall(stalled=True)
    assert (pressure.stalls, pressure.stalled_s) == (1, 2.0)
    now[0] = 5.0
    pressure.note_stall(stalled=False)
    now[0] = 9.0
    pressure.note_stall(stalled=True)
    assert (pressure.stalls, pressure.stalled_s) == (2, 5.0)


def test_a_store_that_is_behind_slows_its_writers_and_says_so() -> None:
    store = open_store(CrashVfs(), replace(TINY, l0_slow_tables=1, memtable_bytes_max=8 * MIB))
    driver = Driver(store)
    driver.write([(b"k", b"v")])
    store.flush()
    assert store.write_delay_s() == 0 and store.stats()["slowdowns"] == 0
    driver.write([(b"k", b"v" * 100_000)])
    assert 0 < store.write_delay_s() < 0.1
    assert store.stats()["slowdowns"] == 1 and store.stats()["stalls"] == 0
    store.close()


def late_store(vfs: CrashVfs) -> tuple[Store, LateSyncer]:
    syncer = LateSyncer()
    options = replace(TINY, durability="os", memtable_bytes_max=8000)
    return Store.open(STORE, options, vfs=vfs, post=lambda call: call(), syncer=syncer), syncer


def log_syncs(vfs: CrashVfs) -> int:
    return sum(line.startswith("sync /data/store/wal/") for line in vfs.journal)


def test_a_freeze_waits_for_a_sync_in_the_background() -> None:
    vfs = CrashVfs()
    store, syncer = late_store(vfs)
    driver = Driver(store)
    while not syncer.asked:
        driver.write([(b"k%04d" % len(driver.states), b"v" * 200)])
    segment = store.stats()["log_segment"]
    before = log_syncs(vfs)
    driver.write([(b"more", b"v")])
    assert store.stats()["log_segment"] == segment and log_syncs(vfs) == before, "it goes on while the sync is due"
    syncer.run()
    driver.write([(b"last", b"v")])
    assert store.stats()["log_segment"] == segment + 1
    assert scan(store, driver.tablet) == driver.states[-1]
    store.close()


def test_a_sync_that_never_comes_does_not_let_memory_grow() -> None:
    vfs = CrashVfs()
    store, syncer = late_store(vfs)
    driver = Driver(store)
    segment = store.stats()["log_segment"]
    while store.stats()["log_segment"] == segment:
        driver.write([(b"k%04d" % len(driver.states), b"v" * 200)])
        assert store.stats()["memtable_bytes"] < 8000 * 5 // 4 + 500
    survivor = vfs.crash(keep_everything)
    again = open_store(survivor)
    assert scan(again, driver.tablet) == driver.states[-1]
    again.close()
    if syncer.asked:
        syncer.run()
    store.close()
