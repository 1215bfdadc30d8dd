"""The store by hand: stages of a write, tablets, versions, stalls, refusals, damage met while running."""

from __future__ import annotations

import errno
import random
from dataclasses import replace

import pytest

from shardkv.errors import ConfigError, DiskFull, InvalidArgument, StorageError, StoreClosed, StoreLocked, StorePoisoned
from shardkv_node.engine.columns import DELETE, PUT
from shardkv_node.engine.job_runner import JobRunner
from shardkv_node.engine.options import Options
from shardkv_node.engine.store import Store
from shardkv_node.engine.syncer import InlineSyncer
from shardkv_node.engine.vfs import storage_error
from shardkv_node.engine.write import Write
from tests.node.engine.crash_vfs import CrashVfs, keep_everything
from tests.node.engine.store_driver import STORE, TINY, commit, open_store, scan

ROOMY = replace(TINY, memtable_bytes_max=1 << 20)


def put(tablet: int, key: bytes, value: bytes = b"v") -> Write:
    return Write(tablet, [key], PUT, [value])


def test_a_write_is_seen_only_after_it_was_applied() -> None:
    store = open_store(CrashVfs(), ROOMY)
    tablet = store.create_tablet(b"t")
    done: list[Write] = []
    write = Write(tablet, [b"k"], PUT, [b"v"], done=done.append)
    group = store.log_group([write])
    assert store.get(tablet, b"k") is None and not done and not write.applied
    with pytest.raises(RuntimeError, match="in flight"):
        store.log_group([put(tablet, b"x")])
    target = store.sync_target()
    target.sync()
    store.synced(target)
    store.apply_group(group)
    assert store.get(tablet, b"k") == b"v" and done == [write] and write.applied


def test_existed_sees_what_is_applied_and_what_stands_earlier_in_the_group() -> None:
    store = open_store(CrashVfs(), ROOMY)
    one, two = store.create_tablet(b"one"), store.create_tablet(b"two")
    commit(store, one, [(b"a", b"1"), (b"b", b"1"), (b"b", None)])
    store.flush()
    first = Write(one, [b"a", b"b", b"c"], DELETE, [b""] * 3, want_existed=True)
    quiet = put(one, b"c")
    second = Write(one, [b"a", b"c", b"c"], bytes((PUT, DELETE, DELETE)), [b"2", b"", b""], want_existed=True)
    elsewhere = Write(two, [b"a"], DELETE, [b""], want_existed=True)
    group = store.log_group([first, quiet, second, elsewhere])
    store.apply_group(group)
    assert first.existed == [True, False, False]
    assert second.existed == [False, True, False]
    assert elsewhere.existed == [False]
    assert quiet.existed is None


def test_versions_rise_per_tablet_and_the_term_rises_at_each_open() -> None:
    vfs = CrashVfs()
    store = open_store(vfs)
    tablet = store.create_tablet(b"t")
    versions = [commit(store, tablet, [(b"k", b"%d" % n)]).version for n in range(30)]
    assert versions == list(range(versions[0], versions[0] + 30))
    assert store.get_versioned(tablet, b"k") == (b"29", versions[-1])
    assert commit(store, tablet, [(b"k", None)]).version == versions[-1] + 1
    assert store.get_versioned(tablet, b"k") is None
    store.close()
    again = open_store(vfs)
    assert again.term == store.term + 1
    assert commit(again, tablet, [(b"k", b"new")]).version == (again.term << 40) | (versions[-1] + 2 & (1 << 40) - 1)
    again.flush()
    assert again.get_versioned(tablet, b"k") == (b"new", again.get_versioned(tablet, b"k")[1])  # type: ignore[index]


def test_a_write_to_a_tablet_that_does_not_exist_gets_its_own_error() -> None:
    store = open_store(CrashVfs(), ROOMY)
    tablet = store.create_tablet(b"t")
    done: list[Write] = []
    lost = Write(99, [b"k"], PUT, [b"v"], done=done.append)
    store.apply_group(store.log_group([lost, put(tablet, b"k")]))
    assert isinstance(lost.error, InvalidArgument) and done == [lost]
    assert store.get(tablet, b"k") == b"v"
    with pytest.raises(InvalidArgument, match="no tablet 99"):
        store.get(99, b"k")


def test_a_dropped_tablet_never_comes_back() -> None:
    vfs = CrashVfs()
    store = open_store(vfs)
    keep, drop = store.create_tablet(b"keep"), store.create_tablet(b"drop")
    for number in range(30):
        commit(store, keep, [(b"k%d" % number, b"v")])
        commit(store, drop, [(b"k%d" % number, b"v" * 30)])
    files = len(vfs.files)
    store.drop_tablet(drop)
    assert store.tablets == {keep: b"keep"} and len(vfs.files) < files
    again = store.create_tablet(b"drop")
    assert again > drop and scan(store, again) == {}
    commit(store, again, [(b"new", b"life")])
    survivor = open_store(vfs.crash(keep_everything))
    assert survivor.tablets == {keep: b"keep", again: b"drop"}
    assert scan(survivor, again) == {b"new": b"life"} and len(scan(survivor, keep)) == 30
    store.flush()
    store.close()
    store = open_store(vfs)
    assert scan(store, again) == {b"new": b"life"} and len(scan(store, keep)) == 30


def test_one_scan_merges_several_tablets() -> None:
    store = open_store(CrashVfs())
    tablets = [store.create_tablet(b"%d" % n) for n in range(3)]
    for number in range(90):
        commit(store, tablets[number % 3], [(b"k%02d" % number, b"%d" % number)])
    page = store.scan_page(tablets, b"k10", b"k80", limit=50)
    assert page.keys == [b"k%02d" % n for n in range(10, 60)] and page.frontier is not None
    page = store.scan_page(tablets, b"k10", b"k20", reverse=True, keys_only=True)
    assert page.keys == [b"k%02d" % n for n in range(19, 9, -1)] and page.values == [] and page.frontier is None


def test_the_first_scan_of_many_rows_gets_ready_in_steps() -> None:
    store = open_store(CrashVfs(), replace(TINY, memtable_bytes_max=1 << 24))
    tablet = store.create_tablet(b"t")
    keys = [b"%05d" % (n * 7919 % 30_011) for n in range(30_011)]
    commit(store, tablet, [(key, key) for key in keys])
    steps = 1
    while not store.ready_to_scan([tablet]):
        steps += 1
    assert steps >= 30_011 // 4096
    assert store.scan_page([tablet], b"", None, limit=3).keys == sorted(keys)[:3]
    commit(store, tablet, [(b"new", b"1")])
    assert store.ready_to_scan([tablet])


def test_deletes_above_older_levels_survive_every_compaction() -> None:
    store = open_store(CrashVfs(), replace(TINY, level1_bytes_max=1024, level_multiplier=2))
    tablet = store.create_tablet(b"t")
    chance = random.Random(1)
    for number in range(150):
        commit(store, tablet, [(b"k%03d" % number, chance.randbytes(100))])
    store.flush()
    stats = store.stats()
    assert sum(stats[name] for name in stats if name[-7:] == "_tables" and name > "level2") > 4  # the puts lie deep
    work = stats["compactions"] + stats["moves"]
    for number in range(150):
        commit(store, tablet, [(b"k%03d" % number, None)])
        assert store.get(tablet, b"k%03d" % number) is None
        if number % 30 == 29:
            store.flush()
            assert len(scan(store, tablet)) == 149 - number
    assert store.stats()["compactions"] + store.stats()["moves"] > work
    store.flush()
    store.request_compaction()
    stats = store.stats()
    assert scan(store, tablet) == {} and sum(stats[name] for name in stats if name.endswith("_tables")) == 0


class PausedRunner(JobRunner):
    """Keeps jobs until `run_next` or `run_all`."""

    def __init__(self, vfs: CrashVfs) -> None:
        super().__init__(0, lambda call: call(), vfs=vfs)
        self.waiting: list[tuple[object, object]] = []

    def submit(self, job, done) -> None:  # type: ignore[no-untyped-def]
        self.waiting.append((job, done))

    def run_next(self) -> None:
        super().submit(*self.waiting.pop(0))  # type: ignore[arg-type]

    def run_all(self) -> None:
        while self.waiting:
            self.run_next()


def paused_store(vfs: CrashVfs, options: Options = TINY) -> tuple[Store, PausedRunner]:
    store = open_store(vfs, options)
    runner = PausedRunner(vfs)
    store.maintenance._runner = runner
    return store, runner


def test_a_store_stalls_when_flushes_are_behind_and_goes_on_after_them() -> None:
    store, runner = paused_store(CrashVfs())
    tablet = store.create_tablet(b"t")
    progress: list[int] = []
    store.on_progress = lambda: progress.append(1)
    written = 0
    while not store.stalled:
        commit(store, tablet, [(b"k%04d" % written, b"v" * 50)])
        written += 1
        assert written < 1000
    assert store.stats()["frozen_memtables"] == TINY.frozen_memtables_max
    assert len(scan(store, tablet)) == written  # reads go on
    runner.run_all()
    assert progress and not store.stalled and store.stats()["frozen_memtables"] == 0
    assert len(scan(store, tablet)) == written
    commit(store, tablet, [(b"more", b"v")])


def test_a_segment_damaged_while_the_memtable_lives_is_flushed_from_memory() -> None:
    vfs = CrashVfs()
    store, runner = paused_store(vfs, ROOMY)
    tablet = store.create_tablet(b"t")
    for number in range(50):
        commit(store, tablet, [(b"k%02d" % (number % 30), b"%d" % number)])
    commit(store, tablet, [(b"k00", None)])
    before = scan(store, tablet)
    store.flush()
    path = next(path for path in sorted(vfs.files) if path.endswith(".wal"))
    data = bytearray(vfs.files[path].data)
    data[len(data) // 2] ^= 1
    vfs.replace(path, bytes(data))
    runner.run_all()
    assert store.stats()["flushes_from_memory"] == 1 and store.stats()["level0_tables"] >= 1
    assert scan(store, tablet) == before
    store.close()
    assert scan(open_store(vfs, ROOMY), tablet) == before


def test_writes_are_refused_below_the_disk_reserve_and_resume_by_themselves() -> None:
    vfs, now = CrashVfs(), [100.0]
    options = replace(ROOMY, disk_reserve_bytes=1000)
    store = Store.open(
        STORE, options, vfs=vfs, post=lambda call: call(), syncer=InlineSyncer(), monotonic=lambda: now[0]
    )
    tablet = store.create_tablet(b"t")
    commit(store, tablet, [(b"k", b"v")])
    vfs.free = 999
    now[0] += 1
    assert isinstance(store.write_refusal(), DiskFull)
    with pytest.raises(DiskFull, match="999 bytes free"):
        commit(store, tablet, [(b"k", b"w")])
    assert store.get(tablet, b"k") == b"v"
    vfs.free = 1001
    now[0] += 1
    assert store.write_refusal() is None
    commit(store, tablet, [(b"k", b"w")])


@pytest.mark.parametrize("durability", ["always", "interval", "os"])
def test_each_durability_syncs_when_it_says(durability: str) -> None:
    vfs = CrashVfs()
    store = open_store(vfs, replace(ROOMY, durability=durability))
    tablet = store.create_tablet(b"t")
    vfs.journal.clear()
    commit(store, tablet, [(b"k", b"v")])
    synced = [line for line in vfs.journal if line.startswith("sync") and ".wal" in line]
    assert bool(synced) == (durability != "os")
    assert store.sync_due() is False


def test_a_failing_job_is_retried_and_the_writes_are_safe_meanwhile() -> None:
    vfs, now = CrashVfs(), [0.0]
    store = Store.open(STORE, ROOMY, vfs=vfs, post=lambda call: call(), syncer=InlineSyncer(), monotonic=lambda: now[0])
    tablet = store.create_tablet(b"t")
    commit(store, tablet, [(b"k", b"v")])
    freeze_operations = len(["sync", "create", "write", "sync", "rename", "sync the directory"])
    vfs.fail_at(vfs.operations + freeze_operations + 4)
    store.flush()
    stats = store.stats()
    assert stats["job_failures"] == 1 and stats["frozen_memtables"] == 1 and not stats["poisoned"]
    assert store.get(tablet, b"k") == b"v"
    commit(store, tablet, [(b"k2", b"v")])
    now[0] += 2
    commit(store, tablet, [(b"k3", b"v")])
    assert store.stats()["frozen_memtables"] == 0 and len(scan(store, tablet)) == 3


def test_a_compaction_that_succeeds_does_not_hide_that_flushes_fail() -> None:
    now = [0.0]
    store = Store.open(
        STORE, ROOMY, vfs=CrashVfs(), post=lambda call: call(), syncer=InlineSyncer(), monotonic=lambda: now[0]
    )
    tablet = store.create_tablet(b"t")
    runner = store.maintenance._runner = PausedRunner(store._vfs)  # type: ignore[arg-type]
    for value in (b"1", b"2", b"3"):
        commit(store, tablet, [(b"k", value)])
        store.flush()
        if value < b"3":
            runner.run_next()
    compaction, flush = runner.waiting
    runner.waiting.clear()
    flush[1](StorageError("The disk will not."))  # type: ignore[operator]
    runner.waiting.append(compaction)
    runner.run_next()
    assert store.stats()["compactions"] == 1 and not runner.waiting, "a flush waits before it is tried again"
    assert store.health.background is not None
    now[0] += 2
    store.tick()
    runner.run_all()
    assert store.health.background is None and store.maintenance.idle
    assert store.get(tablet, b"k") == b"3"


def test_a_second_open_is_refused_and_the_lock_is_released_by_close_and_by_a_failed_open() -> None:
    vfs = CrashVfs()
    store = open_store(vfs)
    with pytest.raises(StoreLocked):
        open_store(vfs)
    store.close()
    store.close()
    with pytest.raises(StoreClosed):
        store.get(1, b"k")
    assert isinstance(store.write_refusal(), StoreClosed)
    good = bytes(vfs.files[f"{STORE}/CURRENT"].data)
    vfs.replace(f"{STORE}/CURRENT", b"?")
    with pytest.raises(Exception, match="Damaged pointer"):
        open_store(vfs)
    vfs.replace(f"{STORE}/CURRENT", good)
    open_store(vfs).close()


def test_nothing_is_done_to_a_log_that_failed_in_a_close() -> None:
    vfs = CrashVfs()
    store = open_store(vfs, replace(ROOMY, durability="os"))
    tablet = store.create_tablet(b"t")
    commit(store, tablet, [(b"k", b"v")])
    vfs.fail_at(vfs.operations + 2)  # the mark behind the sync
    with pytest.raises(StorePoisoned):
        store.close()
    assert vfs.operations == vfs._fail_at
    assert scan(open_store(vfs), tablet) == {b"k": b"v"}


def test_a_poisoned_store_still_reads_and_says_what_to_do() -> None:
    vfs = CrashVfs()
    store = open_store(vfs, ROOMY)
    tablet = store.create_tablet(b"t")
    commit(store, tablet, [(b"k", b"v")])
    vfs.fail_at(vfs.operations + 1)
    for _ in range(2):
        with pytest.raises(StorePoisoned, match="open it again"):
            commit(store, tablet, [(b"k", b"w")])
    with pytest.raises(StorePoisoned):
        store.create_tablet(b"another")
    assert store.get(tablet, b"k") == b"v"
    store.close()


def test_a_store_that_a_full_disk_poisoned_says_one_thing_and_what_to_do() -> None:
    vfs = CrashVfs()
    store = open_store(vfs, ROOMY)
    full = storage_error("write", "store/wal/000001.wal", OSError(errno.ENOSPC, "No space left on device"))
    said = str(store.health.poison(full))
    assert "No space left on device" in said and "Free space on this disk first, then close it and open it" in said
    assert "until it is closed and opened again" in said and "by themselves" not in said
    store.close()


def test_restarts_without_writes_do_not_pile_up_segments() -> None:
    vfs = CrashVfs()
    store = open_store(vfs, ROOMY)
    tablet = store.create_tablet(b"t")
    commit(store, tablet, [(b"k", b"v")])
    for _ in range(40):
        store = open_store(vfs := vfs.crash(keep_everything), ROOMY)
    assert store.get(tablet, b"k") == b"v"
    assert len([path for path in vfs.files if path.endswith(".wal")]) < 12
    assert len([path for path in vfs.files if "MANIFEST" in path]) == 1


def test_every_wrong_option_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        open_store(CrashVfs(), replace(TINY, durability="never", memtable_bytes_max=5, workers=3))
    assert len(caught.value.problems) == 3
    with pytest.raises(ConfigError, match="l0_stall_tables"):
        replace(TINY, l0_stall_tables=2, l0_compaction_trigger=2).validate()


def test_the_log_clock_does_not_go_back_when_the_wall_clock_does() -> None:
    vfs = CrashVfs()

    def run(now_ms: int) -> int:
        store = Store.open(
            STORE, ROOMY, vfs=vfs, post=lambda call: call(), syncer=InlineSyncer(), now_ms=lambda: now_ms
        )
        tablet = next(iter(store.tablets), 0) or store.create_tablet(b"t")
        commit(store, tablet, [(b"k", b"v")])
        reading = store._log.hlc
        store.close()
        return reading

    readings = [run(5_000_000), run(4_000_000), run(4_500_000)]
    assert readings == sorted(set(readings))


def test_a_write_of_no_operations_is_nothing_the_next_open_stumbles_over() -> None:
    vfs = CrashVfs()
    store = open_store(vfs, ROOMY)
    tablet, other = store.create_tablet(b"t"), store.create_tablet(b"other")
    commit(store, tablet, [])
    commit(store, other, [(b"k", b"v")])
    store.flush()  # the segment with the empty write goes
    commit(store, tablet, [(b"k", b"v")])
    store.close()
    assert scan(open_store(vfs, ROOMY), tablet) == {b"k": b"v"}
