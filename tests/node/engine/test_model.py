"""Random histories of a store against dicts: writes with and without conditions and times to live, numbers, scans,
snapshots, range deletes, splits, merges, moves, exports, imports, drops, flushes, compactions, restarts, crashes in any
order, while the clock goes on, or back. There may be several tablets; the rules are about one of them at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shardkv.errors import ConditionFailed, InvalidNumber
from shardkv.topology.tokens import hash_token
from shardkv_node.engine.columns import DELETE, PUT, PUT_EXPIRING, pack_u64
from shardkv_node.engine.reads import Reads
from shardkv_node.engine.snapshot import StoreSnapshot
from shardkv_node.engine.store import Store
from shardkv_node.engine.syncer import InlineSyncer
from shardkv_node.engine.write import Write
from tests.node.engine.crash_vfs import CrashVfs, keep_nothing, keep_some
from tests.node.engine.moving import Move
from tests.node.engine.store_driver import STORE, TINY, commit_write

NUMBERS = st.sampled_from([b"n1", b"n2"])
KEYS = st.one_of(st.integers(0, 60).map(b"k%02d".__mod__), st.binary(min_size=1, max_size=3), NUMBERS)
VALUES = st.one_of(st.none(), st.binary(max_size=8), st.integers(0, 400).map(lambda n: b"v" * n))
TTLS = st.one_of(st.just(0), st.just(0), st.integers(1, 60))
OPERATIONS = st.lists(st.tuples(KEYS, VALUES, TTLS), min_size=1, max_size=25)
BOUNDS = st.lists(st.binary(max_size=3), min_size=2, max_size=2).map(sorted)
SNAPSHOTS_MAX = 3
TABLETS_MAX = 4
LABELS = (b"left", b"right")
Operations = list[tuple[bytes, bytes | None, int]]

Row = tuple[bytes, int, int]
"""Value, version, expiry (0: never)."""


class StoreMachine(RuleBasedStateMachine):
    @initialize(
        memtable=st.sampled_from([1024, 4000]),
        trigger=st.integers(1, 3),
        level1=st.sampled_from([1024, 3000]),
        table=st.sampled_from([1024, 1500]),
        cache=st.sampled_from([0, 8192]),
    )
    def begin(self, memtable: int, trigger: int, level1: int, table: int, cache: int) -> None:
        self.options = replace(
            TINY,
            memtable_bytes_max=memtable,
            l0_compaction_trigger=trigger,
            level1_bytes_max=level1,
            level_multiplier=2,
            table_bytes_max=table,
            block_cache_bytes=cache,
        )
        self.now_ms = self.wall_ms = 1_000_000
        self.vfs = CrashVfs()
        self.store = self.open_store()
        self.tablet = self.store.create_tablet(b"t")
        self.rows: dict[bytes, Row] = {}
        """Of the tablet the rules are about."""
        self.others: dict[int, dict[bytes, Row]] = {}
        """Those of the other tablets."""
        self.moves = 0
        self.exports: list[tuple[str, dict[bytes, Row]]] = []
        self.snapshots: list[tuple[StoreSnapshot, int, dict[bytes, Row]]] = []

    def open_store(self) -> Store:
        return Store.open(
            STORE,
            self.options,
            vfs=self.vfs,
            post=lambda call: call(),
            syncer=InlineSyncer(),
            now_ms=lambda: self.wall_ms,
        )

    def live(self) -> dict[bytes, Row]:
        """The rows that have not ended."""
        return {key: row for key, row in self.rows.items() if not row[2] or row[2] > self.now_ms}

    # --- writes ---

    def commit(self, operations: list[tuple[bytes, bytes | None, int]], conditions: list[tuple[bytes, int]]) -> Write:
        expiries = [self.now_ms + ttl if ttl and value is not None else 0 for _, value, ttl in operations]
        kinds = [
            DELETE if value is None else PUT_EXPIRING if expiry else PUT
            for (_, value, _), expiry in zip(operations, expiries, strict=True)
        ]
        write = Write(
            self.tablet,
            [key for key, _, _ in operations],
            bytes(kinds),
            [value or b"" for _, value, _ in operations],
            expiries=pack_u64(expiries) if any(expiries) else 0,
            conditions=conditions,
            want_existed=True,
        )
        commit_write(self.store, write)
        if write.error is not None:
            return write
        rows, existed = self.live(), []
        for (key, value, _), expiry in zip(operations, expiries, strict=True):
            existed.append(key in rows)
            rows.pop(key, None)
            if value is not None:
                rows[key] = (value, write.version, expiry)
        self.rows = rows
        assert write.existed == existed
        return write

    @rule(operations=OPERATIONS)
    def write(self, operations: list[tuple[bytes, bytes | None, int]]) -> None:
        assert self.commit(operations, []).applied

    @rule(operations=OPERATIONS, checked=st.lists(KEYS, max_size=3), wrong=st.sampled_from([0, 0, 1]))
    def write_if(self, operations: list[tuple[bytes, bytes | None, int]], checked: list[bytes], wrong: int) -> None:
        """Conditions that hold, but for a wrong version in the last one."""
        rows = self.live()
        conditions = [(key, rows[key][1] if key in rows else 0) for key in checked]
        if conditions and wrong:
            key, version = conditions[-1]
            conditions[-1] = (key, version + 1)
        write = self.commit(operations, conditions)
        assert write.applied != bool(conditions and wrong)
        assert write.applied or isinstance(write.error, ConditionFailed)

    @rule(key=st.one_of(NUMBERS, KEYS), by=st.integers(-9, 9), ttls=st.lists(TTLS, min_size=1))
    def count(self, key: bytes, by: int, ttls: list[int]) -> None:
        """Several in one group; each sees the ones before."""
        writes = [Write(self.tablet, [key], PUT, [b""], want_existed=True, add=by) for _ in ttls]
        for write, ttl in zip(writes, ttls, strict=True):
            if ttl:
                write.kinds, write.expiries = PUT_EXPIRING, self.now_ms + ttl
        group = self.store.log_group(writes)
        self.store.sync_group(group, lambda error: self.store.apply_group(group))
        self.rows = self.live()
        for write, ttl in zip(writes, ttls, strict=True):
            text, _, expiry = self.rows.get(key, (b"0", 0, 0))
            if not re.fullmatch(rb"0|-?[1-9]\d*", text):
                assert isinstance(write.error, InvalidNumber)
                continue
            assert write.existed == [key in self.rows]
            expiry = self.now_ms + ttl if ttl else expiry
            self.rows[key] = (str(int(text) + by).encode(), write.version, expiry)

    @rule(low=st.integers(0, 60), span=st.integers(1, 30), batch=st.integers(1, 9), stop_after=st.integers(1, 9))
    def delete_range(self, low: int, span: int, batch: int, stop_after: int) -> None:
        """Page by page, as the engine does it, and maybe not to its end."""
        start, stop = b"k%02d" % low, b"k%02d" % (low + span)
        for _ in range(stop_after):
            page = self.store.scan_page([self.tablet], start, stop, limit=batch, keys_only=True)
            if page.keys:
                write = self.commit([(key, None, 0) for key in page.keys], [])
                assert write.existed == [True] * len(page.keys)
            if page.frontier is None:
                assert not [key for key in self.live() if b"k%02d" % low <= key < stop]
                break
            start = page.frontier

    # --- reads ---

    @rule(key=KEYS)
    def get(self, key: bytes) -> None:
        row = self.live().get(key)
        assert self.store.get(self.tablet, key) == (row and row[0])
        assert self.store.get_versioned(self.tablet, key) == (row and row[:2])

    @rule(
        bounds=BOUNDS,
        open_end=st.booleans(),
        reverse=st.booleans(),
        limit=st.one_of(st.none(), st.integers(1, 9)),
        bytes_max=st.sampled_from([1, 100, 1 << 20]),
    )
    def scan(self, bounds: list[bytes], open_end: bool, reverse: bool, limit: int | None, bytes_max: int) -> None:
        stop = None if open_end else bounds[1]
        self.compare_scan(self.store, self.tablet, self.live(), bounds[0], stop, reverse, limit, bytes_max)

    def compare_scan(
        self,
        reads: Reads,
        tablet: int,
        rows: dict[bytes, Row],
        start: bytes,
        stop: bytes | None,
        reverse: bool,
        limit: int | None,
        bytes_max: int,
    ) -> None:
        low, high, found = start, stop, []
        while True:
            page = reads.scan_page([tablet], low, high, reverse=reverse, limit=limit, bytes_max=bytes_max)
            assert limit is None or len(page.keys) <= limit
            found += list(zip(page.keys, page.values, strict=True))
            if page.frontier is None:
                break
            low, high = (low, page.frontier) if reverse else (page.frontier, high)
        expected = sorted((k, row[0]) for k, row in rows.items() if k >= start and (stop is None or k < stop))
        assert found == (expected[::-1] if reverse else expected)

    # --- snapshots ---

    @precondition(lambda self: len(self.snapshots) < SNAPSHOTS_MAX)
    @rule()
    def take_snapshot(self) -> None:
        self.snapshots.append((self.store.snapshot([self.tablet]), self.tablet, self.live()))

    @precondition(lambda self: self.snapshots)
    @rule(which=st.integers(0, SNAPSHOTS_MAX), keys=st.lists(KEYS, max_size=5), bounds=BOUNDS, reverse=st.booleans())
    def read_snapshot(self, which: int, keys: list[bytes], bounds: list[bytes], reverse: bool) -> None:
        snapshot, tablet, rows = self.snapshots[which % len(self.snapshots)]
        assert snapshot.get_many(tablet, keys) == [rows[key][0] if key in rows else None for key in keys]
        for key in keys:
            assert snapshot.get_versioned(tablet, key) == (rows[key][:2] if key in rows else None)
        self.compare_scan(snapshot, tablet, rows, bounds[0], bounds[1], reverse, None, 100)
        self.compare_scan(snapshot, tablet, rows, b"", None, reverse, None, 1000)

    @precondition(lambda self: self.snapshots)
    @rule(which=st.integers(0, SNAPSHOTS_MAX))
    def close_snapshot(self, which: int) -> None:
        self.snapshots.pop(which % len(self.snapshots))[0].close()

    # --- whole tablets ---

    @precondition(lambda self: self.others)
    @rule(which=st.integers(0, TABLETS_MAX))
    def turn_to(self, which: int) -> None:
        """Go on with another tablet, which must be as it was left."""
        self.others[self.tablet] = self.rows
        self.tablet = sorted(self.others)[which % len(self.others)]
        self.rows = self.others.pop(self.tablet)
        self.compare_scan(self.store, self.tablet, self.live(), b"", None, False, None, 1 << 20)
        for key, row in self.live().items():
            assert self.store.get_versioned(self.tablet, key) == row[:2]

    def replace_by(self, halves: tuple[int, int], is_right: Callable[[bytes], bool]) -> None:
        rows, (left, right) = self.live(), halves
        assert self.tablet < left < right
        self.others[right] = {key: row for key, row in rows.items() if is_right(key)}
        self.tablet, self.rows = left, {key: row for key, row in rows.items() if not is_right(key)}
        self.turn_to(0)
        self.turn_to(0)

    @precondition(lambda self: len(self.others) < TABLETS_MAX)
    @rule(at_key=st.one_of(KEYS, st.none()))
    def split(self, at_key: bytes | None) -> None:
        self.store.flush()
        at_key = at_key or self.store.middle_key(self.tablet) or b"k30"
        before = self.store.tablet_size(self.tablet)
        halves = self.store.split_tablet(self.tablet, at_key, LABELS)
        sizes = [self.store.tablet_size(half) for half in halves]
        assert all(0 <= size.stored_bytes <= before.stored_bytes + 1 for size in sizes)
        self.replace_by(halves, lambda key: key >= at_key)

    @precondition(lambda self: len(self.others) < TABLETS_MAX)
    @rule(quarter=st.integers(0, 4))
    def split_by_token(self, quarter: int) -> None:
        token = quarter << 62
        split = self.store.split_tablet_by_token(self.tablet, token, LABELS)
        assert isinstance(split.outcome, tuple)
        self.replace_by(split.outcome, lambda key: hash_token(key) >= token)

    @rule(cut=st.one_of(KEYS, st.integers(0, 3).map(lambda quarter: quarter << 62)), back=st.booleans())
    def split_and_merge(self, cut: bytes | int, back: bool) -> None:
        """Split with the whole kept; take that back, or drop the whole and merge the halves again."""
        if isinstance(cut, bytes):
            self.store.fence_tablet(self.tablet)
            self.store.flush()
            halves = self.store.split_tablet(self.tablet, cut, LABELS, keep_whole=True)
        else:
            halves = self.store.split_tablet_by_token(self.tablet, cut, LABELS, keep_whole=True).outcome  # type: ignore[assignment]
        left, right = halves
        if back:
            self.store.drop_tablet(left)
            self.store.drop_tablet(right)
            self.store.lift_fence(self.tablet)
        else:
            self.store.drop_tablet(self.tablet)
            merge = self.store.merge_tablets(left, right, cut, b"merged")
            assert isinstance(merge.outcome, tuple)
            (self.tablet,) = merge.outcome
            self.store.drop_tablet(left)
            self.store.drop_tablet(right)
        self.compare_scan(self.store, self.tablet, self.live(), b"", None, False, None, 1 << 20)

    @rule(before=OPERATIONS, after=OPERATIONS, rounds=st.integers(1, 2))
    def move_to_another_tablet(self, before: Operations, after: Operations, rounds: int) -> None:
        """As if it were another store's: pinned, shipped, written to meanwhile, adopted."""
        self.moves += 1
        move = Move(self.vfs, self.store, self.tablet, self.store, f"/data/move{self.moves}")
        for _ in range(rounds):
            self.commit(before, [])
            move.begin_round()
            self.commit(after, [])
            move.step()
        move.settle()
        self.tablet = move.adopt()
        self.compare_scan(self.store, self.tablet, self.live(), b"", None, False, None, 1 << 20)
        for key, row in self.live().items():
            assert self.store.get_versioned(self.tablet, key) == row[:2]

    @precondition(lambda self: len(self.exports) < TABLETS_MAX)
    @rule(place=st.sampled_from(["/data", "/elsewhere"]))
    def export(self, place: str) -> None:
        self.store.flush()
        directory = f"{place}/export{len(self.exports)}"
        self.store.export_tablet(self.tablet, directory)
        self.exports.append((directory, self.live()))

    @precondition(lambda self: self.exports and len(self.others) < TABLETS_MAX)
    @rule(which=st.integers(0, TABLETS_MAX))
    def import_one(self, which: int) -> None:
        directory, rows = self.exports[which % len(self.exports)]
        self.others[self.tablet], self.rows = self.rows, dict(rows)
        self.tablet = self.store.import_tablet(directory, b"imported")
        newest = max((row[1] for row in rows.values()), default=0)
        assert self.commit([(b"k00", b"v", 0)], []).version > newest

    @precondition(lambda self: self.others)
    @rule()
    def drop(self) -> None:
        self.store.drop_tablet(self.tablet)
        self.tablet, self.rows = self.others.popitem()

    # --- time, files, ends ---

    @rule(ms=st.integers(-50, 50))
    def pass_time(self, ms: int) -> None:
        """The wall clock may go back; the time that counts does not, once it was looked at."""
        self.wall_ms += ms
        self.now_ms = max(self.now_ms, self.wall_ms)
        assert self.store.time_ms() == self.now_ms

    @rule()
    def flush(self) -> None:
        self.store.flush()

    @rule()
    def compact(self) -> None:
        self.store.flush()
        self.store.request_compaction()

    @rule()
    def reopen(self) -> None:
        self.snapshots.clear()
        self.store.close()
        self.store = self.open_store()
        assert self.store.recovery.torn_tails == []
        assert self.store.time_ms() == self.now_ms

    @rule(seed=st.integers(0, 99), percent=st.sampled_from([0, 50, 100]))
    def crash(self, seed: int, percent: int) -> None:
        self.snapshots.clear()
        self.wall_ms = self.now_ms  # time that was looked at but not logged is forgotten with a crash
        self.vfs = self.vfs.crash(keep_some(seed, percent) if percent else keep_nothing)
        self.store = self.open_store()

    @invariant()
    def nothing_is_left_lying_about(self) -> None:
        if not hasattr(self, "store"):
            return
        tables = {path.rsplit("/")[-1] for path in self.vfs.files if path.startswith(f"{STORE}/tables/")}
        pinned = {name for snapshot, _, _ in self.snapshots for name in snapshot.table_names}
        assert self.store.tablets.keys() == {self.tablet, *self.others}
        assert tables == self.store._state.table_names() | pinned
        assert not [path for path in self.vfs.files if path.endswith(".tmp")]


StoreMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_any_history = StoreMachine.TestCase
