"""Random histories of a store against a dict: writes, scans, flushes, compactions, restarts, crashes in any order."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.node.engine.crash_vfs import CrashVfs, keep_nothing, keep_some
from tests.node.engine.store_driver import TINY, commit, open_store

KEYS = st.one_of(st.integers(0, 60).map(b"k%02d".__mod__), st.binary(min_size=1, max_size=3))
VALUES = st.one_of(st.none(), st.binary(max_size=8), st.integers(0, 400).map(lambda n: b"v" * n))


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
        self.vfs = CrashVfs()
        self.store = open_store(self.vfs, self.options)
        self.tablet = self.store.create_tablet(b"t")
        self.model: dict[bytes, bytes] = {}

    @rule(operations=st.lists(st.tuples(KEYS, VALUES), min_size=1, max_size=25))
    def write(self, operations: list[tuple[bytes, bytes | None]]) -> None:
        write = commit(self.store, self.tablet, operations)
        existed = []
        for key, value in operations:
            existed.append(key in self.model)
            self.model.pop(key, None)
            if value is not None:
                self.model[key] = value
        assert write.existed == existed

    @rule(low=st.integers(0, 60), span=st.integers(1, 30))
    def delete_range(self, low: int, span: int) -> None:
        self.write([(b"k%02d" % n, None) for n in range(low, low + span)])

    @rule(key=KEYS)
    def get(self, key: bytes) -> None:
        assert self.store.get(self.tablet, key) == self.model.get(key)

    @rule(
        bounds=st.lists(st.binary(max_size=3), min_size=2, max_size=2).map(sorted),
        open_end=st.booleans(),
        reverse=st.booleans(),
        limit=st.one_of(st.none(), st.integers(1, 9)),
        bytes_max=st.sampled_from([1, 100, 1 << 20]),
    )
    def scan(self, bounds: list[bytes], open_end: bool, reverse: bool, limit: int | None, bytes_max: int) -> None:
        start, stop = bounds[0], None if open_end else bounds[1]
        low, high, found = start, stop, []
        while True:
            page = self.store.scan_page([self.tablet], low, high, reverse=reverse, limit=limit, bytes_max=bytes_max)
            assert limit is None or len(page.keys) <= limit
            found += list(zip(page.keys, page.values, strict=True))
            if page.frontier is None:
                break
            low, high = (low, page.frontier) if reverse else (page.frontier, high)
        expected = sorted((k, v) for k, v in self.model.items() if k >= start and (stop is None or k < stop))
        assert found == (expected[::-1] if reverse else expected)

    @rule()
    def flush(self) -> None:
        self.store.flush()

    @rule()
    def compact(self) -> None:
        self.store.flush()
        self.store.request_compaction()

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = open_store(self.vfs, self.options)
        assert self.store.recovery.torn_tails == []

    @rule(seed=st.integers(0, 99), percent=st.sampled_from([0, 50, 100]))
    def crash(self, seed: int, percent: int) -> None:
        self.vfs = self.vfs.crash(keep_some(seed, percent) if percent else keep_nothing)
        self.store = open_store(self.vfs, self.options)

    @invariant()
    def nothing_is_left_lying_about(self) -> None:
        if not hasattr(self, "store"):
            return
        tables = {path.rsplit("/")[-1] for path in self.vfs.files if path.endswith(".sst")}
        assert tables == self.store._state.table_names()
        assert not [path for path in self.vfs.files if path.endswith(".tmp")]


StoreMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_any_history = StoreMachine.TestCase
