"""Power loss at every operation, and any operation failing, while tablets are split, exported, imported and dropped."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from shardkv.errors import InvalidArgument, StorageError
from shardkv.topology.tokens import hash_token
from shardkv_node.engine.store import Store
from shardkv_node.engine.tools.verify import verify_store
from tests.node.engine.crash_vfs import CrashVfs, keep_everything, keep_nothing, keep_some
from tests.node.engine.store_driver import STORE, TINY, Rows, commit, open_store, run_failing, scan
from tests.node.engine.test_crash import SnapshotVfs

TOKEN = 1 << 63
CUT = b"k20"
NEAR, FAR = "/data/export", "/elsewhere/export"
OPTIONS = replace(TINY, compaction_bytes_max=1024)

State = dict[bytes, Rows]
"""Rows by label; labels are given once."""


@dataclass
class TabletDriver:
    """A store of several tablets beside dicts. `states[n]` is what it holds after n changes."""

    store: Store
    states: list[State] = field(default_factory=lambda: [{}])
    acked: int = 0
    exported: dict[str, Rows] = field(default_factory=dict)
    """By directory, once the export was acknowledged."""

    def number(self, label: bytes) -> int:
        return next(number for number, name in self.store.tablets.items() if name == label)

    def change(self, after: State, do: Callable[[], object]) -> None:
        """`do` brings the store to this state; raises what the store raises."""
        self.states.append(after)
        do()
        self.acked = len(self.states) - 1

    def write(self, label: bytes, operations: list[tuple[bytes, bytes | None]]) -> None:
        rows = dict(self.states[-1][label])
        for key, value in operations:
            rows.pop(key, None)
            if value is not None:
                rows[key] = value
        after = {**self.states[-1], label: dict(sorted(rows.items()))}
        self.change(after, lambda: commit(self.store, self.number(label), operations))

    def split(self, whole: bytes, halves: tuple[bytes, bytes], *, by_token: bool) -> None:
        after = dict(self.states[-1])
        rows = after.pop(whole)
        for half, name in enumerate(halves):
            after[name] = {
                key: value
                for key, value in rows.items()
                if half == (hash_token(key) >= TOKEN if by_token else key >= CUT)
            }
        self.change(after, lambda: self._split(self.number(whole), halves, by_token=by_token))

    def _split(self, number: int, halves: tuple[bytes, bytes], *, by_token: bool) -> None:
        if not by_token:
            self.store.flush()
            if not self.store.in_tables(number):
                raise self.store.write_refusal() or self.store.health.background or AssertionError("why?")
            self.store.split_tablet(number, CUT, halves)
            return
        split = self.store.split_tablet_by_token(number, TOKEN, halves)
        split.cancel()  # it has ended, or waits for a flush that failed
        if not isinstance(split.outcome, tuple):
            raise StorageError(str(split.outcome))

    def export(self, label: bytes, directory: str) -> None:
        self.store.flush()
        if self.store.in_tables(self.number(label)):
            self.store.export_tablet(self.number(label), directory)
            self.exported[directory] = self.states[-1][label]

    def import_(self, directory: str, label: bytes) -> None:
        if directory in self.exported:
            after = {**self.states[-1], label: self.exported[directory]}
            self.change(after, lambda: self.store.import_tablet(directory, label))

    def frozen(self) -> TabletDriver:
        """As it is now, for a check that comes later."""
        return TabletDriver(self.store, self.states[:], self.acked, dict(self.exported))


def run_workload(vfs: CrashVfs, made: Callable[[TabletDriver], None] = lambda driver: None) -> TabletDriver:
    chance = random.Random(7)
    driver = TabletDriver(open_store(vfs, OPTIONS))
    made(driver)

    def writes(count: int, *labels: bytes) -> None:
        for number in range(count):
            operations = [
                (b"k%02d" % chance.randrange(40), None if chance.random() < 0.2 else chance.randbytes(50))
                for _ in range(chance.choice((1, 2, 5)))
            ]
            label = labels[number % len(labels)]
            if label in driver.states[-1]:  # else its export failed
                driver.write(label, operations)

    def drop(label: bytes) -> None:
        after = {name: rows for name, rows in driver.states[-1].items() if name != label}
        driver.change(after, lambda: driver.store.drop_tablet(driver.number(label)))

    driver.change({b"whole": {}}, lambda: driver.store.create_tablet(b"whole"))
    writes(14, b"whole")
    driver.split(b"whole", (b"a", b"b"), by_token=False)
    writes(6, b"a", b"b")
    driver.split(b"b", (b"c", b"d"), by_token=True)
    writes(4, b"a", b"c", b"d")
    driver.export(b"a", NEAR)
    driver.export(b"d", FAR)
    writes(2, b"a", b"d")
    driver.import_(NEAR, b"e")
    driver.import_(FAR, b"f")
    writes(4, b"e", b"f")
    drop(b"a")
    driver.store.flush()
    driver.store.request_compaction()
    writes(2, b"c", b"e")
    driver.store.close()
    return driver


def check(vfs: CrashVfs, driver: TabletDriver | None, *, context: str) -> None:
    """The store opens with exactly what was acknowledged, or one change more; it goes on, and nothing lies about."""
    allowed: list[State] = [{}] if driver is None else driver.states[driver.acked :]
    store = open_store(vfs, OPTIONS)
    numbers = {label: number for number, label in store.tablets.items()}
    found = {label: scan(store, number) for label, number in numbers.items()}
    assert found in allowed, f"{context}: {sorted(found)} is none of {[sorted(state) for state in allowed]}"
    tables = {path for path in vfs.files if path.startswith(f"{STORE}/tables/")}
    assert tables == {f"{STORE}/tables/{name}" for name in store._state.table_names()}, context
    for label, number in numbers.items():
        newest = max((store.get_versioned(number, key) or (b"", 0))[1] for key in (b"", *found[label]))
        assert commit(store, number, [(b"after", b"crash"), (b"k01", None)]).version > newest, context
        found[label].pop(b"k01", None)
        found[label][b"after"] = b"crash"
    for directory in (NEAR, FAR):
        _check_export(store, driver, directory, context)
    store.close()
    assert verify_store(vfs, STORE).problems == [], context
    store = open_store(vfs, OPTIONS)
    for label, number in numbers.items():
        assert scan(store, number) == dict(sorted(found[label].items())), context
    store.close()


def _check_export(store: Store, driver: TabletDriver | None, directory: str, context: str) -> None:
    """An export is whole, or does not pass for one; an acknowledged one is whole."""
    acknowledged = driver is not None and directory in driver.exported
    try:
        number = store.import_tablet(directory, b"taken in")
    except InvalidArgument:
        assert not acknowledged, context
        return
    assert driver is not None, context
    rows = scan(store, number)
    assert rows == driver.exported[directory] if acknowledged else rows in driver.states[-1].values(), context
    store.drop_tablet(number)


def crashes_of_workload(percent: int, seen: Callable[[CrashVfs, TabletDriver | None, str], None]) -> TabletDriver:
    """Run the workload; `seen` gets what a crash just before each operation would leave."""
    drivers: list[TabletDriver] = []

    def look(vfs: SnapshotVfs) -> None:
        last = vfs.journal[-1] if vfs.journal else "the start"
        context = f"crash after operation {vfs.operations} ({last}), {percent} % kept"
        seen(vfs.crash(keep_some(vfs.operations, percent)), drivers[0].frozen() if drivers else None, context)

    return run_workload(SnapshotVfs(look), drivers.append)


@pytest.mark.parametrize("percent", [0, 50, 100])
def test_a_crash_before_any_operation_leaves_what_was_acknowledged_or_one_whole_change_more(percent: int) -> None:
    crashes: list[tuple[CrashVfs, TabletDriver | None, str]] = []
    whole = crashes_of_workload(percent, lambda *crash: crashes.append(crash))
    assert set(whole.states[-1]) == {b"c", b"d", b"e", b"f"} and set(whole.exported) == {NEAR, FAR}
    assert len(crashes) > 250
    for vfs, driver, context in crashes[percent % 3 :: 3]:
        check(vfs, driver, context=context)


@pytest.mark.parametrize(("code", "sticky"), [(errno.EIO, False), (errno.ENOSPC, True)])
def test_any_operation_may_fail_and_tablets_are_whole(code: int, sticky: bool) -> None:
    clean = CrashVfs()
    run_workload(clean)
    for n in range(1 + sticky, clean.operations, 5):
        vfs, driver = run_failing(run_workload, n, code, sticky=sticky)
        survivor = vfs.crash(keep_everything if n % 4 < 2 else keep_nothing)
        check(survivor, driver, context=f"operation {n} failed: {clean.journal[n - 1]}")
