"""Many tablets in one store: compactions take turns, and the one that holds up writers goes first."""

from __future__ import annotations

from dataclasses import replace

from shardkv_node.engine.job import CompactionJob, FlushJob
from shardkv_node.engine.store import Store
from tests.node.engine.crash_vfs import CrashVfs
from tests.node.engine.store_driver import TINY, commit, open_store, scan
from tests.node.engine.test_store import PausedRunner, paused_store

ROOMY = replace(TINY, memtable_bytes_max=1 << 20, level1_bytes_max=1 << 20, compaction_bytes_max=1 << 20)


def flush(store: Store, runner: PausedRunner, tablets: list[int], number: int) -> None:
    """A write to each of the tablets, and the flush of them; a compaction that is asked for waits."""
    for tablet in tablets:
        commit(store, tablet, [(b"a", b"%d" % number), (b"%d" % number, b"v"), (b"z", b"%d" % number)])
    store.flush()
    for job in [waiting for waiting in runner.waiting if isinstance(waiting[0], FlushJob)]:
        runner.waiting.remove(job)
        runner.waiting.insert(0, job)
        runner.run_next()


def test_no_tablet_waits_for_ever_while_others_are_compacted() -> None:
    store, runner = paused_store(CrashVfs(), ROOMY)
    tablets = [store.create_tablet(b"%d" % n) for n in range(3)]
    for number in range(20):
        flush(store, runner, tablets, number)
        if runner.waiting:
            runner.run_next()  # a compaction, for three tablets that would each like one
        assert store.maintenance.most_level0_tables <= 5, number


def test_the_tablet_that_slows_writers_down_is_compacted_first() -> None:
    store, runner = paused_store(CrashVfs(), ROOMY)
    first, second, third = (store.create_tablet(b"%d" % n) for n in range(3))
    flush(store, runner, [first], 0)
    flush(store, runner, [first], 1)
    (waiting,) = runner.waiting
    assert isinstance(waiting[0], CompactionJob) and waiting[0].tablet == first
    for number in range(2, 11):
        flush(store, runner, [third] if number % 3 else [second, third], number)
    assert store.maintenance.most_level0_tables == 9 > store.options.l0_slow_tables
    runner.run_next()
    job = runner.waiting[0][0]
    assert isinstance(job, CompactionJob) and job.tablet == third
    runner.run_all()
    assert store.maintenance.most_level0_tables < 2


def test_hundreds_of_tablets_are_flushed_compacted_split_and_opened_again() -> None:
    vfs = CrashVfs()
    options = replace(ROOMY, open_files_max=16)
    store = open_store(vfs, options)
    tablets = [store.create_tablet(b"%d" % n) for n in range(150)]
    for number in range(3):
        for tablet in tablets:
            commit(store, tablet, [(b"k%d" % number, b"%d" % tablet), (b"same", b"%d" % number)])
        store.flush()
    for tablet in tablets[::3]:
        store.split_tablet(tablet, b"l", (b"left", b"right"))
    store.close()
    store = open_store(vfs, options)
    assert len(store.tablets) == 200 and store.stats()["memtable_rows"] == 0
    rows = [(label, scan(store, number)) for number, label in store.tablets.items()]
    assert sorted(len(found) for _, found in rows) == [1] * 50 + [3] * 50 + [4] * 100
    assert all(found == {b"same": b"2"} for label, found in rows if label == b"right")
