"""`incr`: numbers that are added to in one step, in the order writes are sequenced, whatever lies where."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkv.errors import InvalidArgument, InvalidNumber
from shardkv.whole_number import LEAST, MOST, format_number, parse_number
from shardkv_node.engine import Engine
from shardkv_node.engine.columns import DELETE, PUT, PUT_EXPIRING, pack_u64
from shardkv_node.engine.store import Store
from shardkv_node.engine.write import Write
from tests.node.engine.crash_vfs import CrashVfs
from tests.node.engine.store_driver import commit, commit_write, open_store
from tests.node.engine.test_expiry import START_MS, Clock, open_at


def test_a_number_is_counted_up_and_down_and_is_plain_text(tmp_path: Path) -> None:
    with Engine.open(tmp_path, workers=0) as engine:
        assert engine.incr("n") == 1
        assert engine.incr("n", 41) == 42
        assert engine.get("n") == b"42"
        engine.put("n", str(-5))
        engine.flush()
        assert engine.incr("n", -3) == -8
        assert engine.incr("n", 0) == -8
    with Engine.open(tmp_path, workers=0) as engine:
        assert engine.incr("n", 8) == 0
        engine.delete("n")
        assert engine.incr("n", 7) == 7


@pytest.mark.parametrize("value", [b"", b"x", b" 1", b"1 ", b"+1", b"007", b"-0", b"1.5", b"1_0", b"9" * 19, b"\xb2"])
def test_what_is_no_number_is_refused_and_stays(tmp_path: Path, value: bytes) -> None:
    with Engine.open(tmp_path, workers=0) as engine:
        engine.put("n", value)
        with pytest.raises(InvalidNumber, match=r"key b'n' is not a whole number .*Nothing was written"):
            engine.incr("n")
        assert engine.get("n") == value


def test_a_number_does_not_leave_64_bits(tmp_path: Path) -> None:
    with Engine.open(tmp_path, workers=0) as engine:
        assert engine.incr("high", MOST) == MOST
        assert engine.incr("low", LEAST) == LEAST
        for key, by in (("high", 1), ("low", -1)):
            with pytest.raises(InvalidNumber, match="would leave the range"):
                engine.incr(key, by)
        assert engine.incr("high", LEAST) == -1
        for by in (MOST + 1, LEAST - 1, 1.0, "1", True, None):
            with pytest.raises(InvalidArgument, match="An amount to count by is a whole number"):
                engine.incr("high", by)  # type: ignore[arg-type]
        assert engine.get("high") == b"-1"


@given(st.integers(LEAST, MOST))
def test_every_number_has_one_text(number: int) -> None:
    assert format_number(number) == str(number).encode()
    assert parse_number(format_number(number)) == number


def add(tablet: int, key: bytes, by: int = 1) -> Write:
    return Write(tablet, [key], PUT, [b""], want_existed=True, add=by)


def one_group(store: Store, writes: list[Write]) -> list[bytes | str]:
    """What each write left: its value, or the code of its refusal."""
    group = store.log_group(writes)
    assert all(write.error is None and not write.applied for write in writes)
    store.sync_group(group, lambda error: store.apply_group(group))
    return [write.values[0] if write.error is None else write.error.code for write in writes]  # type: ignore[attr-defined]


def test_writes_of_one_group_see_each_other() -> None:
    vfs = CrashVfs()
    store = open_store(vfs)
    one, two = store.create_tablet(b"1"), store.create_tablet(b"2")
    commit(store, one, [(b"n", b"10")])
    told = one_group(
        store,
        [
            add(one, b"n"),
            add(two, b"n"),
            Write(one, [b"x", b"n", b"n"], PUT, [b"text", b"1", b"20"]),
            add(one, b"n", 5),
            add(one, b"x"),
            Write(one, [b"n"], PUT, [b"refused"], conditions=[(b"n", 1)]),
            add(one, b"n", 5),
            Write(one, [b"n", b"m"], bytes((DELETE, PUT)), [b"", b"3"]),
            add(one, b"n", 2),
            add(one, b"n", 2),
        ],
    )
    assert told == [b"11", b"1", b"text", b"25", "invalid_number", "condition_failed", b"30", b"", b"2", b"4"]
    assert store.get(one, b"n") == b"4" and store.get(two, b"n") == b"1"
    store = open_store(vfs.crash())
    assert store.get(one, b"n") == b"4" and store.get(two, b"n") == b"1"


@pytest.mark.parametrize("where", ["memory", "table", "group"])
def test_a_number_ends_when_it_would_have_unless_told_otherwise(where: str) -> None:
    clock = Clock()
    store = open_at(CrashVfs(), clock)
    tablet = store.create_tablet(b"t")
    first = Write(
        tablet, [b"other", b"n"], PUT_EXPIRING, [b"", b"5"], expiries=pack_u64([START_MS + 9, START_MS + 100])
    )
    if where == "group":
        second = add(tablet, b"n")
        assert one_group(store, [first, second])[1] == b"6"
    else:
        commit_write(store, first)
        if where == "table":
            store.flush()
        assert commit_write(store, add(tablet, b"n")).values == [b"6"]
    assert store._tablets[tablet].get_expiring(b"n") == (b"6", START_MS + 100)
    clock.now_ms = START_MS + 99
    assert store.get(tablet, b"n") == b"6"
    longer = add(tablet, b"n")
    longer.kinds, longer.expiries = PUT_EXPIRING, START_MS + 200
    assert commit_write(store, longer).values == [b"7"]
    clock.now_ms = START_MS + 199
    assert store.get(tablet, b"n") == b"7"
    clock.now_ms = START_MS + 200
    assert store.get(tablet, b"n") is None
    assert commit_write(store, add(tablet, b"n")).values == [b"1"]
    clock.now_ms = START_MS + 10_000
    assert store.get(tablet, b"n") == b"1", "a number that starts anew stays"


@pytest.mark.parametrize("end", ["deleted", "over"])
def test_a_number_whose_end_is_in_a_table_starts_anew(end: str) -> None:
    clock = Clock()
    store = open_at(CrashVfs(), clock)
    tablet = store.create_tablet(b"t")
    commit(store, tablet, [(b"n", b"5")])
    store.flush()
    if end == "deleted":
        commit(store, tablet, [(b"n", None)])
    else:
        commit_write(store, Write(tablet, [b"n"], PUT_EXPIRING, [b"7"], expiries=START_MS + 10))
    store.flush()
    clock.now_ms = START_MS + 10
    assert commit_write(store, add(tablet, b"n")).values == [b"1"]


def test_a_group_counts_from_nothing_what_ended_inside_it() -> None:
    clock = Clock()
    store = open_at(CrashVfs(), clock)
    tablet = store.create_tablet(b"t")
    over = Write(tablet, [b"n"], PUT_EXPIRING, [b"5"], expiries=START_MS)
    assert one_group(store, [over, add(tablet, b"n")]) == [b"5", b"1"]


def test_a_time_to_live_is_given_to_the_sum(tmp_path: Path) -> None:
    with Engine.open(tmp_path, workers=0) as engine:
        assert engine.incr("n", ttl_ms=60_000) == 1
        found = engine._store._tablets[engine._tablet].get_expiring(b"n")
        assert found is not None and found[1] > 0
        with pytest.raises(InvalidArgument, match="A time to live is"):
            engine.incr("n", ttl_ms=0)


def test_many_threads_count_exactly(tmp_path: Path) -> None:
    with Engine.open(tmp_path, durability="os") as engine:
        sums: list[int] = []

        def count() -> None:
            sums.extend([engine.incr("n") for _ in range(200)])

        running = [threading.Thread(target=count) for _ in range(8)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        assert sorted(sums) == list(range(1, 1601))
