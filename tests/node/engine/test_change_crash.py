"""Power loss at every operation, and any operation failing, while a tablet comes from another store, is split with the
whole kept, and its halves are merged again, in both ways."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable

import pytest

from shardkv.errors import StorageError
from shardkv.topology.tokens import hash_token
from shardkv_node.engine.columns import PUT
from shardkv_node.engine.store import Store
from shardkv_node.engine.syncer import InlineSyncer
from shardkv_node.engine.write import Write
from tests.node.engine.crash_vfs import CrashVfs, keep_everything, keep_nothing, keep_some
from tests.node.engine.moving import ADOPTED, STAGED, Move
from tests.node.engine.store_driver import Rows, commit, commit_write, open_store, run_failing, scan
from tests.node.engine.test_crash import SnapshotVfs
from tests.node.engine.test_tablet_crash import CUT, OPTIONS, TOKEN, TabletDriver, check

SOURCE = "/data/source"
LANE = b"L" * 16


class ChangeDriver(TabletDriver):
    """A driver whose store takes a tablet from another one."""

    def __init__(self, store: Store, vfs: CrashVfs) -> None:
        super().__init__(store)
        self.source = Store.open(SOURCE, OPTIONS, vfs=vfs, post=lambda call: call(), syncer=InlineSyncer())
        self.tablet = self.source.create_tablet(b"7")
        self.move = Move(vfs, self.source, self.tablet, store, "/data/store/incoming")

    def theirs(self) -> Rows:
        return scan(self.source, self.tablet)

    def begin_round(self) -> None:
        self.change({**self.states[-1], STAGED: self.theirs()}, self.move.begin_round)

    def stage(self) -> None:
        self.change({**self.states[-1], STAGED: self.theirs()}, self._stage)

    def _stage(self) -> None:
        self.move.step(1 << 20)
        told: list[StorageError | None] = []
        self.store.sync_log(told.append)
        if told != [None]:
            raise told[0] or AssertionError("why?")

    def adopt(self) -> None:
        after = {label: rows for label, rows in self.states[-1].items() if label != STAGED}
        number = self.number(STAGED)
        self.change({**after, ADOPTED: self.states[-1][STAGED]}, lambda: self.store.adopt_staging(number, ADOPTED))

    def token(self, label: bytes, key: bytes, number: int) -> None:
        rows = {**self.states[-1][label], key: b"t"}
        write = Write(self.number(label), [key], PUT, [b"t"], token=(LANE, number))
        after = {**self.states[-1], label: dict(sorted(rows.items()))}
        self.change(after, lambda: commit_write(self.store, write))

    def split_beside(self, whole: bytes, halves: tuple[bytes, bytes], *, by_token: bool) -> None:
        rows, after = self.states[-1][whole], dict(self.states[-1])
        for half, name in enumerate(halves):
            after[name] = {
                key: value
                for key, value in rows.items()
                if half == (hash_token(key) >= TOKEN if by_token else key >= CUT)
            }
        self.change(after, lambda: self._split_beside(self.number(whole), halves, by_token=by_token))

    def _split_beside(self, number: int, halves: tuple[bytes, bytes], *, by_token: bool) -> None:
        if by_token:
            split = self.store.split_tablet_by_token(number, TOKEN, halves, keep_whole=True)
            split.cancel()
            self._require(split.outcome)
            return
        self.store.fence_tablet(number)
        self.store.flush()
        if not self.store.in_tables(number):
            raise self.store.write_refusal() or self.store.health.background or AssertionError("why?")
        self.store.split_tablet(number, CUT, halves, keep_whole=True)

    def merge(self, left: bytes, right: bytes, label: bytes, *, by_token: bool) -> None:
        rows = self.states[-1][left] | self.states[-1][right]
        after = {**self.states[-1], label: dict(sorted(rows.items()))}
        self.change(after, lambda: self._merge(left, right, label, by_token=by_token))

    def _merge(self, left: bytes, right: bytes, label: bytes, *, by_token: bool) -> None:
        boundary: bytes | int = TOKEN if by_token else CUT
        merge = self.store.merge_tablets(self.number(left), self.number(right), boundary, label)
        merge.cancel()  # it has ended, or waits for a flush that failed
        self._require(merge.outcome)

    def _require(self, outcome: object) -> None:
        if not isinstance(outcome, tuple):
            raise StorageError(str(outcome))

    def create(self, *labels: bytes) -> None:
        for label in labels:
            self.change({**self.states[-1], label: {}}, lambda label=label: self.store.create_tablet(label))  # type: ignore[misc]

    def drop(self, *labels: bytes) -> None:
        for label in labels:
            after = {name: rows for name, rows in self.states[-1].items() if name != label}
            self.change(after, lambda label=label: self.store.drop_tablet(self.number(label)))  # type: ignore[misc]


def run_workload(vfs: CrashVfs, made: Callable[[TabletDriver], None] = lambda driver: None) -> ChangeDriver:
    chance = random.Random(5)
    driver = ChangeDriver(open_store(vfs, OPTIONS), vfs)
    made(driver)

    def operations() -> list[tuple[bytes, bytes | None]]:
        return [
            (b"k%02d" % chance.randrange(40), None if chance.random() < 0.2 else chance.randbytes(50))
            for _ in range(chance.choice((1, 2, 5)))
        ]

    def writes_there(count: int) -> None:
        for _ in range(count):
            commit(driver.source, driver.tablet, operations())

    writes_there(12)
    driver.begin_round()
    writes_there(2)
    driver.stage()
    writes_there(2)
    driver.begin_round()
    writes_there(3)
    token = Write(driver.tablet, [b"k30"], PUT, [b"t"], token=(LANE, 1))
    commit_write(driver.source, token)
    driver.stage()
    driver.adopt()
    driver.write(ADOPTED, operations())
    driver.split_beside(ADOPTED, (b"a", b"b"), by_token=False)
    driver.drop(b"a", b"b")
    driver.store.lift_fence(driver.number(ADOPTED))
    driver.write(ADOPTED, operations())
    driver.split_beside(ADOPTED, (b"c", b"d"), by_token=True)
    driver.drop(ADOPTED)
    for label in (b"c", b"d"):
        side = label == b"d"
        key = next(key for n in range(40) if (hash_token(key := b"k%02d" % n) >= TOKEN) == side)
        driver.token(label, key, 2 + side)
    driver.merge(b"c", b"d", b"e", by_token=True)
    driver.drop(b"c", b"d")
    driver.write(b"e", operations())
    driver.create(b"f", b"g")
    for number in (1, 3, 15):
        driver.token(b"f", b"k%02d" % number, 3 + number)
        driver.token(b"g", b"k%02d" % (20 + number), 4 + number)
    driver.merge(b"f", b"g", b"h", by_token=False)
    driver.drop(b"f", b"g")
    driver.write(b"h", operations())
    driver.store.close()
    driver.source.close()
    return driver


def crashes_of_workload(percent: int, seen: Callable[[CrashVfs, TabletDriver | None, str], None]) -> ChangeDriver:
    """As that of test_tablet_crash."""
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
    assert set(whole.states[-1]) == {b"e", b"h"} and len(whole.states[-1][b"e"]) > 10
    assert len(crashes) > 250
    for vfs, driver, context in crashes[percent % 7 :: 7]:
        check(vfs, driver, context=context)


@pytest.mark.parametrize(("code", "sticky"), [(errno.EIO, False), (errno.ENOSPC, True)])
def test_any_operation_may_fail_and_tablets_are_whole(code: int, sticky: bool) -> None:
    clean = CrashVfs()
    run_workload(clean)
    for n in range(1 + sticky, clean.operations, 13):
        vfs, driver = run_failing(run_workload, n, code, sticky=sticky)
        survivor = vfs.crash(keep_everything if n % 4 < 2 else keep_nothing)
        check(survivor, driver, context=f"operation {n} failed: {clean.journal[n - 1]}")
