"""The long battery: what test_crash.py samples is enumerated here. Every operation, every byte, nothing left out."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest

from shardkv.errors import Corruption, StoreMismatch, UnsupportedFormat
from shardkv_node.engine import filenames
from tests.node.engine import test_change_crash as changes
from tests.node.engine import test_tablet_crash as tablets
from tests.node.engine.crash_vfs import CrashVfs, keep_everything, keep_nothing, keep_some
from tests.node.engine.store_driver import STORE, TINY, Driver, Rows, commit, open_store, run_failing, scan
from tests.node.engine.test_crash import SnapshotVfs, check, run_workload

LARGER = replace(TINY, memtable_bytes_max=1 << 20, l0_compaction_trigger=9, manifest_bytes_max=1 << 20)

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("percent", [0, 30, 70, 100])
def test_a_crash_before_every_operation(percent: int) -> None:
    drivers: list[Driver] = []
    crashes = 0

    def look(vfs: SnapshotVfs) -> None:
        nonlocal crashes
        crashes += 1
        driver = (
            Driver(drivers[0].store, drivers[0].tablet, drivers[0].states[:], drivers[0].acked) if drivers else None
        )
        survivor = vfs.crash(keep_some(vfs.operations, percent))
        check(survivor, driver, context=f"crash before operation {vfs.operations + 1}, {percent} % kept")

    run_workload(SnapshotVfs(look), drivers.append)
    assert crashes > 250


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EMFILE])
@pytest.mark.parametrize("sticky", [False, True])
@pytest.mark.parametrize("keep", [keep_everything, keep_nothing])
def test_every_operation_fails_once_or_from_then_on(code: int, sticky: bool, keep: object) -> None:
    clean = CrashVfs()
    run_workload(clean)
    for n in range(1, clean.operations + 1):
        vfs, driver = run_failing(run_workload, n, code, sticky=sticky)
        survivor = vfs.crash(keep_everything if keep is keep_everything else keep_nothing)
        check(survivor, driver, context=f"operation {n} failed: {clean.journal[n - 1]}")


@pytest.mark.parametrize("percent", [0, 30, 70, 100])
def test_a_crash_before_every_operation_on_whole_tablets(percent: int) -> None:
    crashes: list[str] = []

    def seen(vfs: CrashVfs, driver: tablets.TabletDriver | None, context: str) -> None:
        crashes.append(context)
        tablets.check(vfs, driver, context=context)

    tablets.crashes_of_workload(percent, seen)
    assert len(crashes) > 250


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("sticky", [False, True])
@pytest.mark.parametrize("keep", [keep_everything, keep_nothing])
def test_every_operation_on_whole_tablets_fails_once_or_from_then_on(code: int, sticky: bool, keep: object) -> None:
    clean = CrashVfs()
    tablets.run_workload(clean)
    for n in range(1, clean.operations + 1):
        vfs, driver = run_failing(tablets.run_workload, n, code, sticky=sticky)
        survivor = vfs.crash(keep_everything if keep is keep_everything else keep_nothing)
        tablets.check(survivor, driver, context=f"operation {n} failed: {clean.journal[n - 1]}")


@pytest.mark.parametrize("percent", [0, 30, 70, 100])
def test_a_crash_before_every_operation_on_tablets_that_come_part_and_join(percent: int) -> None:
    crashes: list[str] = []

    def seen(vfs: CrashVfs, driver: tablets.TabletDriver | None, context: str) -> None:
        crashes.append(context)
        tablets.check(vfs, driver, context=context)

    changes.crashes_of_workload(percent, seen)
    assert len(crashes) > 250


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("sticky", [False, True])
@pytest.mark.parametrize("keep", [keep_everything, keep_nothing])
def test_every_operation_on_tablets_that_come_part_and_join_fails_once_or_from_then_on(
    code: int, sticky: bool, keep: object
) -> None:
    clean = CrashVfs()
    changes.run_workload(clean)
    for n in range(1, clean.operations + 1):
        vfs, driver = run_failing(changes.run_workload, n, code, sticky=sticky)
        survivor = vfs.crash(keep_everything if keep is keep_everything else keep_nothing)
        tablets.check(survivor, driver, context=f"operation {n} failed: {clean.journal[n - 1]}")


@pytest.mark.parametrize("kind", ["log", "table", "manifest", "pointer and identity"])
def test_every_bit_of_every_file_flipped_is_named_or_harmless(kind: str) -> None:
    vfs, tablet, rows = store_with_a_log()
    image = {path: bytes(inode.data) for path, inode in vfs.files.items() if kind_of(path) == kind}
    assert image
    named = 0
    for path, data in image.items():
        for offset in range(len(data)):
            for bit in range(8):
                damaged = vfs.crash(keep_everything)
                flipped = bytearray(data)
                flipped[offset] ^= 1 << bit
                damaged.replace(path, bytes(flipped))
                context = f"{path} at {offset}, bit {bit}"
                try:
                    store = open_store(damaged, LARGER)
                    tails = store.recovery.torn_tails
                    found = scan(store, tablet)
                    store.close()
                except (Corruption, UnsupportedFormat, StoreMismatch) as error:
                    named += 1
                    assert path in str(error) or STORE in str(error), context
                else:
                    assert found == rows, f"{context}: {len(found)} rows instead of {len(rows)}"
                    # Only the mark at the very end may read as a tail that was dropped, and then that is said.
                    dropped = [tail for tail in tails if tail.path == path]
                    assert all(tail.offset <= offset < tail.offset + tail.bytes for tail in dropped), context
    assert named > 0.9 * 8 * sum(map(len, image.values())) or kind == "log"


def store_with_a_log() -> tuple[CrashVfs, int, Rows]:
    """Several tables, a manifest with edits behind its snapshot, a log of a dozen groups no table holds; closed."""
    vfs = CrashVfs()
    driver = run_workload(vfs)
    store = open_store(vfs, LARGER)
    rows = dict(driver.states[-1])
    for number in range(24):
        key, value = b"k%02d" % number, b"%d" % number * 9
        commit(store, driver.tablet, [(key, value), (b"more%02d" % number, value)])
        rows.update({key: value, b"more%02d" % number: value})
        if number in (5, 11):
            store.flush()
    store.close()
    return vfs, driver.tablet, rows


def kind_of(path: str) -> str:
    if path.endswith(".wal"):
        return "log"
    if path.endswith(".sst"):
        return "table"
    return "manifest" if filenames.parse_manifest_name(path.rsplit("/", 1)[-1]) is not None else "pointer and identity"
