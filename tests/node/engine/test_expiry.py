"""Time to live: what has ended reads as absent everywhere, stays a delete on its way down, and leaves the disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkv.errors import ConditionFailed, InvalidArgument
from shardkv_node.engine import Engine
from shardkv_node.engine.columns import DELETE, PUT, PUT_EXPIRING, Columns, pack_u64
from shardkv_node.engine.expiry import end_expired
from shardkv_node.engine.store import Store
from shardkv_node.engine.syncer import InlineSyncer
from shardkv_node.engine.write import Write
from tests.node.engine.crash_vfs import CrashVfs
from tests.node.engine.store_driver import STORE, TINY, commit, commit_write, scan

START_MS = 1_700_000_000_000


class Clock:
    def __init__(self) -> None:
        self.now_ms = START_MS

    def __call__(self) -> int:
        return self.now_ms


def open_at(vfs: CrashVfs, clock: Clock) -> Store:
    options = replace(TINY, l0_compaction_trigger=10)
    return Store.open(STORE, options, vfs=vfs, post=lambda call: call(), syncer=InlineSyncer(), now_ms=clock)


def put_until(store: Store, tablet: int, key: bytes, expiry_ms: int, value: bytes = b"v") -> None:
    commit_write(store, Write(tablet, [key], PUT_EXPIRING, [value], expiries=expiry_ms))


@pytest.mark.parametrize("where", ["memory", "table", "bottom", "replayed", "flushed late"])
def test_what_has_ended_reads_as_absent_wherever_it_lies(where: str) -> None:
    vfs, clock = CrashVfs(), Clock()
    store = open_at(vfs, clock)
    tablet = store.create_tablet(b"t")
    commit(store, tablet, [(b"old", b"below"), (b"stays", b"1")])
    if where == "bottom":
        store.flush()
    put_until(store, tablet, b"old", START_MS + 100)
    put_until(store, tablet, b"short", START_MS + 100)
    put_until(store, tablet, b"long", START_MS + 500)
    if where in ("table", "bottom"):
        store.flush()
    if where == "bottom":
        store.request_compaction()
    if where == "replayed":
        vfs = vfs.crash()
        store = open_at(vfs, clock)
    clock.now_ms = START_MS + 99
    assert scan(store, tablet) == {b"long": b"v", b"old": b"v", b"short": b"v", b"stays": b"1"}
    clock.now_ms = START_MS + 100
    if where == "flushed late":
        store.flush()
    assert scan(store, tablet) == {b"long": b"v", b"stays": b"1"}
    assert store.get_many(tablet, [b"old", b"short", b"long"]) == [None, None, b"v"]
    assert store.get_versioned(tablet, b"short") is None
    write = commit(store, tablet, [(b"old", None), (b"short", b"again"), (b"long", b"x")])
    assert write.existed == [False, False, True]
    store.close()


def test_an_ended_row_hides_what_is_below_it_until_it_reaches_the_bottom_and_then_is_gone() -> None:
    vfs, clock = CrashVfs(), Clock()
    store = open_at(vfs, clock)
    tablet = store.create_tablet(b"t")
    commit(store, tablet, [(b"a", b"below"), (b"b", b"1")])
    store.flush()
    store.request_compaction()
    put_until(store, tablet, b"a", START_MS + 10, b"x" * 300)
    clock.now_ms += 10
    store.flush()
    above, below = store._state.tablets[tablet].levels[0][0], store._state.tablets[tablet].levels[1][0]
    assert (above.count, above.tombstones, above.expiring) == (1, 1, 0)
    assert below.count == 2 and scan(store, tablet) == {b"b": b"1"}
    store.request_compaction()
    metas = [meta for level in store._state.tablets[tablet].levels for meta in level]
    assert [(meta.count, meta.tombstones, meta.expiring) for meta in metas] == [(1, 0, 0)]
    store.close()


def test_a_full_compaction_clears_what_ended_since_the_last_one() -> None:
    vfs, clock = CrashVfs(), Clock()
    store = open_at(vfs, clock)
    tablet = store.create_tablet(b"t")
    put_until(store, tablet, b"a", START_MS + 10)
    commit(store, tablet, [(b"b", b"1")])
    store.flush()
    store.request_compaction()
    assert [meta.expiring for level in store._state.tablets[tablet].levels for meta in level] == [1]
    clock.now_ms += 10
    store.request_compaction()
    assert [meta.count for level in store._state.tablets[tablet].levels for meta in level] == [1]
    store.close()


def test_what_has_ended_stays_ended_when_the_wall_clock_goes_back() -> None:
    vfs, clock = CrashVfs(), Clock()
    store = open_at(vfs, clock)
    tablet = store.create_tablet(b"t")
    put_until(store, tablet, b"a", START_MS + 10)
    clock.now_ms += 10
    assert store.get(tablet, b"a") is None
    clock.now_ms = START_MS - 5_000_000
    assert store.get(tablet, b"a") is None and store.time_ms() == START_MS + 10
    store.close()
    store = open_at(vfs, clock)
    assert store.get(tablet, b"a") is None and scan(store, tablet) == {}
    store.close()


def test_a_put_that_has_ended_by_its_turn_counts_as_absent_for_what_follows_in_its_group() -> None:
    vfs, clock = CrashVfs(), Clock()
    store = open_at(vfs, clock)
    tablet = store.create_tablet(b"t")
    brief = Write(tablet, [b"a", b"b"], PUT_EXPIRING, [b"1", b"2"], expiries=pack_u64([START_MS - 1, START_MS + 9]))
    first = Write(tablet, [b"a"], PUT, [b"v"], conditions=[(b"a", 0)])
    second = Write(tablet, [b"b"], PUT, [b"v"], conditions=[(b"b", 0)])
    store.apply_group(store.log_group([brief, first, second]))
    assert first.applied and isinstance(second.error, ConditionFailed)
    store.close()


def test_the_embedded_engine_takes_a_time_to_live(tmp_path: Path) -> None:
    with Engine.open(tmp_path, workers=0) as engine:
        engine.put("brief", "1", ttl_ms=1)
        engine.put("long", "1", ttl_ms=3_600_000)
        engine.put_many({"x": "1", "y": "2"}, ttl_ms=1)
        engine.put_many({"z": "3"}, ttl_ms=3_600_000)
        engine.put("brief again", "1", ttl_ms=1)
        engine.put("brief again", "2")
        while engine.get("brief") is not None or engine.get("x") is not None:
            pass
        assert list(engine.scan(keys_only=True)) == [b"brief again", b"long", b"z"]
        engine.put("brief", "back", if_absent=True)
        for wrong in (0, -1, 1.5, True, 1 << 60):
            with pytest.raises(InvalidArgument, match="time to live"):
                engine.put("k", "v", ttl_ms=wrong)  # type: ignore[arg-type]
    with Engine.open(tmp_path, workers=0) as engine:
        assert engine.get_many(["brief", "long", "y"]) == [b"back", b"1", None]


ROWS = st.lists(st.tuples(st.sampled_from([PUT, DELETE, PUT_EXPIRING]), st.integers(1, 20)), min_size=1, max_size=12)


@given(ROWS, st.integers(0, 25))
def test_ending_rows_changes_nothing_else(rows: list[tuple[int, int]], now_ms: int) -> None:
    expiries = [expiry if kind == PUT_EXPIRING else 0 for kind, expiry in rows]
    columns = Columns(
        [b"%02d" % n for n in range(len(rows))],
        bytes(kind for kind, _ in rows),
        7,
        pack_u64(expiries),
        [b"" if kind == DELETE else b"v" for kind, _ in rows],
    )
    found = end_expired(columns, now_ms)
    assert found.check() is None and found.keys == columns.keys and found.versions == 7
    for n, (kind, expiry) in enumerate(rows):
        ended = kind == PUT_EXPIRING and expiry <= now_ms
        expected = (DELETE, 0, b"") if ended else (kind, expiries[n], columns.values[n])
        assert (found.kind(n), found.expiry(n), found.values[n]) == expected
