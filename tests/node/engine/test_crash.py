"""Power loss at every operation, every operation failing once, and every byte damaged: what the store makes of it."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from dataclasses import replace

import google_crc32c
import pytest

from shardkv.errors import Corruption, StorageError, StoreMismatch, UnsupportedFormat
from shardkv_node.engine.columns import PUT
from shardkv_node.engine.identity import identity_text
from shardkv_node.engine.store import Store
from shardkv_node.engine.write import Write
from tests.node.engine.crash_vfs import SECTOR_BYTES, CrashVfs, keep_everything, keep_nothing, keep_some
from tests.node.engine.store_driver import (
    STORE,
    TINY,
    Driver,
    Rows,
    commit,
    open_store,
    random_operations,
    run_failing,
    scan,
)

WRITES = 45
TINY_OS = replace(TINY, durability="os")


class SnapshotVfs(CrashVfs):
    """Shows what a crash just before each operation would leave, to `look`."""

    def __init__(self, look: Callable[[SnapshotVfs], None]) -> None:
        super().__init__()
        self.look = look

    def operate(self, what: str, path: str) -> None:
        if what not in ("read", "open"):
            self.look(self)
        super().operate(what, path)


def run_workload(vfs: CrashVfs, driver_made: Callable[[Driver], None] = lambda driver: None) -> Driver:
    chance = random.Random(7)
    driver = Driver(open_store(vfs))
    driver_made(driver)
    for number in range(WRITES):
        driver.write(random_operations(chance))
        if number == 30:
            driver.store.flush()
            driver.store.request_compaction()
    driver.store.close()
    return driver


def check(vfs: CrashVfs, driver: Driver | None, *, context: str) -> None:
    """The store opens and holds exactly the acknowledged writes, or one more; and it goes on working."""
    allowed: list[Rows] = [{}] if driver is None else driver.states[driver.acked :]
    store = open_store(vfs)
    tablet = next(iter(store.tablets), 0)
    if not tablet:
        assert driver is None or driver.acked == 0, context
        tablet = store.create_tablet(b"t")
    rows = scan(store, tablet)
    assert rows in allowed, f"{context}: {sorted(rows)} is none of {len(allowed)} allowed states"
    assert all(store.get(tablet, b"k%02d" % n) == rows.get(b"k%02d" % n) for n in range(40)), context
    commit(store, tablet, [(b"after", b"crash"), (b"k01", None)])
    store.close()
    store = open_store(vfs)
    expected = {**rows, b"after": b"crash"}
    expected.pop(b"k01", None)
    assert scan(store, tablet) == expected, context
    store.close()


@pytest.mark.parametrize("percent", [0, 30, 70, 100])
def test_a_crash_before_any_operation_keeps_every_acknowledged_write_and_no_half_batch(percent: int) -> None:
    drivers: list[Driver] = []
    crashes: list[tuple[CrashVfs, Driver | None, str]] = []

    def look(vfs: SnapshotVfs) -> None:
        keep = keep_some(vfs.operations, percent)
        driver = drivers[0] if drivers else None
        frozen = None
        if driver is not None:
            frozen = Driver(driver.store, driver.tablet, driver.states[:], driver.acked)
        last = vfs.journal[-1] if vfs.journal else "the start"
        crashes.append((vfs.crash(keep), frozen, f"crash after operation {vfs.operations} ({last}), {percent} % kept"))

    whole = run_workload(SnapshotVfs(look), drivers.append)
    stats = whole.store.stats()
    assert stats["flushes"] > 3 and stats["compactions"] > 1  # the workload goes through everything
    assert len(crashes) > 250
    for vfs, driver, context in crashes[percent % 3 :: 3] if 0 < percent < 100 else crashes:
        check(vfs, driver, context=context)


def test_a_crash_during_recovery_loses_nothing_however_often() -> None:
    vfs = CrashVfs()
    driver = Driver(open_store(vfs))
    chance = random.Random(3)
    for _ in range(20):
        driver.write(random_operations(chance))
    vfs = vfs.crash(keep_nothing)
    for attempt in range(1, 60):
        vfs.fail_at(vfs.operations + 2 * attempt, sticky=True)
        with pytest.raises(StorageError):
            open_store(vfs)
        vfs = vfs.crash(keep_some(attempt, 50))
    check(vfs, driver, context="after all")


@pytest.mark.parametrize(("code", "sticky"), [(errno.EIO, False), (errno.ENOSPC, False), (errno.EIO, True)])
def test_any_operation_may_fail_and_no_acknowledged_write_is_lost(code: int, sticky: bool) -> None:
    clean = CrashVfs()
    run_workload(clean)
    for n in range(1 + sticky, clean.operations, 2):
        vfs, driver = run_failing(run_workload, n, code, sticky=sticky)
        keep = keep_everything if n % 4 < 2 else keep_nothing
        check(vfs.crash(keep), driver, context=f"operation {n} failed: {clean.journal[n - 1]}")


def test_a_failed_sync_is_never_repeated_and_nothing_is_written_afterwards() -> None:
    vfs = CrashVfs()
    driver = Driver(open_store(vfs))
    driver.write([(b"a", b"1")])
    vfs.fail_at(vfs.operations + 2)  # write, sync
    with pytest.raises(StorageError, match="no more writes"):
        driver.write([(b"b", b"2")])
    seen = vfs.operations
    with pytest.raises(StorageError, match="Close it and open it again"):
        driver.write([(b"c", b"3")])
    assert driver.store.get(driver.tablet, b"a") == b"1"
    assert driver.store.get(driver.tablet, b"b") is None
    driver.store.close()
    assert vfs.operations == seen
    check(vfs.crash(keep_nothing), driver_before(driver), context="after a failed sync")


def driver_before(driver: Driver) -> Driver:
    """Only what was tried up to the failure."""
    return Driver(driver.store, driver.tablet, driver.states[: driver.acked + 2], driver.acked)


def store_with_everything() -> tuple[CrashVfs, Store, int, Rows]:
    """Tables, a log with several groups, a manifest with edits; closed."""
    vfs = CrashVfs()
    driver = run_workload(vfs)
    return vfs, driver.store, driver.tablet, driver.states[-1]


def test_a_flipped_bit_anywhere_is_named_or_harmless_and_never_a_wrong_value() -> None:
    vfs, _, tablet, rows = store_with_everything()
    image = {path: bytes(inode.data) for path, inode in vfs.files.items()}
    chance = random.Random(11)
    named = 0
    for path in image:
        data = image[path]
        for offset in sorted(chance.sample(range(len(data)), min(len(data), 90))):
            damaged = vfs.crash(keep_everything)
            flipped = bytearray(data)
            flipped[offset] ^= 1 << chance.randrange(8)
            damaged.replace(path, bytes(flipped))
            context = f"{path} at {offset}"
            try:
                store = open_store(damaged)
                found = scan(store, tablet)
                store.close()
            except (Corruption, UnsupportedFormat, StoreMismatch) as error:
                named += 1
                assert path in str(error) or "store" in str(error), context
            else:
                assert found == rows, f"{context}: {len(found)} rows instead of {len(rows)}"
    assert named > 300


@pytest.mark.parametrize("kind", ["wal/", "MANIFEST", "CURRENT", "IDENTITY", ".sst"])
def test_a_missing_file_is_named_and_the_others_stay_as_they_are(kind: str) -> None:
    vfs, _, _, _ = store_with_everything()
    path = next(path for path in sorted(vfs.files) if kind in path)
    vfs.remove(path)
    before = {path: bytes(inode.data) for path, inode in vfs.files.items()}
    with pytest.raises(Corruption) as caught:
        open_store(vfs)
    assert caught.value.path.startswith(STORE)
    assert {path: bytes(inode.data) for path, inode in vfs.files.items()} == before


def test_an_older_copy_of_a_file_or_anothers_file_does_not_pass() -> None:
    vfs, _, _, _ = store_with_everything()
    other, _, _, _ = store_with_everything()
    for path in sorted(vfs.files):
        if "wal/" in path or ".sst" in path or "MANIFEST" in path:
            theirs = next(
                p for p in sorted(other.files) if p.rsplit(".")[-1] == path.rsplit(".")[-1] or "MANIFEST" in p
            )
            damaged = vfs.crash(keep_everything)
            damaged.replace(path, bytes(other.files[theirs].data))
            with pytest.raises((Corruption, StoreMismatch)):
                store = open_store(damaged)
                for number in store.tablets:
                    scan(store, number)


def test_a_torn_tail_is_dropped_and_reported_and_damage_before_it_is_refused() -> None:
    vfs = CrashVfs()
    driver = Driver(open_store(vfs, TINY_OS))
    for number in range(5):
        driver.write([(b"k%d" % number, b"v")])
    log = next(path for path in vfs.files if path.endswith(".wal"))
    data = bytes(vfs.files[log].data)
    for length in range(len(data) - 1, 56, -1):
        torn = vfs.crash(keep_everything)
        torn.replace(log, data[:length])
        store = open_store(torn, TINY_OS)
        assert scan(store, driver.tablet) in driver.states
        tails = store.recovery.torn_tails
        assert [tail.path for tail in tails] in ([], [log])
        assert all(tail.offset + tail.bytes == length for tail in tails)
        store.close()
    assert open_store(torn).recovery.torn_tails == []


def test_garbage_and_other_formats_are_refused_with_a_sentence() -> None:
    vfs, _, _, _ = store_with_everything()
    identity = f"{STORE}/IDENTITY"
    newer = identity_text(bytes(16)).replace(b" 1 ", b" 9 ")
    words = newer.split()
    checked = b" ".join(words[:3])
    vfs.replace(identity, checked + b" %08x\n" % google_crc32c.value(checked))
    with pytest.raises(UnsupportedFormat, match="format 9; this program knows format 1"):
        open_store(vfs)
    vfs.replace(identity, b"garbage")
    with pytest.raises(Corruption):
        open_store(vfs)


@pytest.mark.parametrize("keep", [keep_nothing, keep_everything])
def test_what_a_log_has_reserved_is_seen_after_a_crash_and_gone_after_a_close(keep: Callable[[], bool]) -> None:
    vfs = CrashVfs()
    options = replace(TINY, memtable_bytes_max=1 << 20)
    driver = Driver(open_store(vfs, options))
    for number in range(20):
        driver.write([(b"k%d" % number, b"v")])
    segment = next(path for path in vfs.files if path.endswith(".wal"))
    assert vfs.size(segment) > driver.store._log.offset
    after = vfs.crash(keep)
    assert after.size(segment) > driver.store._log.offset
    again = open_store(after, options)
    assert scan(again, driver.tablet) == dict(sorted(driver.states[-1].items()))
    assert again.recovery.torn_tails == []
    log = again._log
    again.close()
    assert after.size(log.path) == log.offset


def test_a_mark_that_was_lost_before_a_kept_group_is_no_damage() -> None:
    options = replace(TINY, memtable_bytes_max=1 << 20)
    for size in range(SECTOR_BYTES - 180, SECTOR_BYTES - 80):  # so that the mark lies across the end of a sector
        vfs = CrashVfs()
        driver = Driver(open_store(vfs, options))
        driver.write([(b"k", b"v" * size)])
        driver.store.log_group([Write(driver.tablet, [b"x"], PUT, [b"y"])])
        for keep in (keep_everything, keep_nothing, keep_some(1, 50), keep_some(2, 50)):
            assert scan(open_store(vfs.crash(keep)), driver.tablet)[b"k"] == b"v" * size
