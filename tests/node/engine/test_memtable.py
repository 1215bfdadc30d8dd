"""Memtables against a dict: newest wins, order forward and reverse, however writes and scans mix."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkv_node.engine import key_runs
from shardkv_node.engine import memtable as module
from shardkv_node.engine.chores import InlineChores, Step
from shardkv_node.engine.columns import DELETE, PUT, PUT_EXPIRING, Columns, pack_u64
from shardkv_node.engine.dismantling import Dismantler
from shardkv_node.engine.memtable import Memtable, cell_value, cell_version

KEYS = st.binary(min_size=1, max_size=3)


def rows(chunks: Iterator[Columns]) -> list[tuple[bytes, int, int, bytes]]:
    found = []
    for chunk in chunks:
        assert chunk.check() is None and list(chunk.keys) == sorted(chunk.keys)
        assert len(chunk) <= key_runs.CHUNK_KEYS_MOST
        found += [(key, chunk.kind(i), chunk.version(i), chunk.values[i]) for i, key in enumerate(chunk.keys)]
    return found


@settings(max_examples=60, deadline=None)
@given(
    batches=st.lists(st.lists(st.tuples(KEYS, st.one_of(st.none(), st.binary(max_size=5))), min_size=1, max_size=30)),
    scans=st.sets(st.integers(0, 10)),
    part_rows=st.sampled_from([5, 20, 1000]),
    run_keys=st.sampled_from([2, 8, 4096]),
    start=st.binary(max_size=2),
    stop=st.one_of(st.none(), st.binary(max_size=2)),
)
def test_a_memtable_holds_what_a_dict_holds(
    batches: list[list[tuple[bytes, bytes | None]]],
    scans: set[int],
    part_rows: int,
    run_keys: int,
    start: bytes,
    stop: bytes | None,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PART_ROWS", part_rows)
        patch.setattr(module, "RUN_KEYS", run_keys)
        patch.setattr(key_runs, "RUN_KEYS", run_keys)
        compare_with_a_dict(batches, scans, start, stop)


def compare_with_a_dict(
    batches: list[list[tuple[bytes, bytes | None]]], scans: set[int], start: bytes, stop: bytes | None
) -> None:
    memtable, model = Memtable(), {}
    for version, batch in enumerate(batches, 1):
        kinds = bytes(DELETE if value is None else PUT for _, value in batch)
        memtable.apply([key for key, _ in batch], kinds, version, [value or b"" for _, value in batch])
        model.update({key: (kind, version, value or b"") for (key, value), kind in zip(batch, kinds, strict=True)})
        if version in scans:
            list(memtable.chunks(b"", None, reverse=False))
    expected = [(key, *row) for key, row in sorted(model.items()) if key >= start and (stop is None or key < stop)]
    assert rows(memtable.chunks(start, stop, reverse=False)) == expected
    assert sorted(rows(memtable.chunks(start, stop, reverse=True))) == expected
    assert len(memtable) == len(model)
    for key, (kind, version, value) in model.items():
        cell = memtable.get(key) or b""
        assert (cell[0], cell_version(cell), cell_value(cell, lambda: 0)) == (
            kind,
            version,
            value if kind == PUT else None,
        )
    while memtable.dismantle():
        pass
    assert not len(memtable)


@pytest.mark.parametrize("ordered", [False, True])
def test_many_chunks_come_in_order_both_ways(ordered: bool) -> None:
    memtable = Memtable(ordered=ordered)
    keys = [b"%06d" % (n * 7919 % 20_011) for n in range(20_011)]
    for low in range(0, len(keys), 1000):
        part = keys[low : low + 1000]
        memtable.apply(part, PUT, low + 1, part)
        if low == 5000:
            list(memtable.chunks(b"", None, reverse=False))
    forward = [chunk.keys for chunk in memtable.chunks(b"", None, reverse=False)]
    assert [key for chunk in forward for key in chunk] == sorted(keys)
    backward = [chunk.keys for chunk in memtable.chunks(b"", None, reverse=True)]
    assert [key for chunk in backward for key in reversed(chunk)] == sorted(keys, reverse=True)


def test_cells_carry_kind_version_value_and_expiry() -> None:
    memtable = Memtable()
    memtable.apply([b"put", b"gone", b"twice", b"twice"], bytes((1, 2, 1, 1)), 1 << 40 | 5, [b"v", b"", b"old", b"new"])
    memtable.apply([b"brief"], PUT_EXPIRING, 1 << 40 | 6, [b"soon"], pack_u64([1234]))
    cells = {key: memtable.get(key) for key in (b"put", b"gone", b"twice", b"brief", b"nothing")}
    assert cells[b"nothing"] is None
    values = {key: cell_value(cell, lambda: 0) for key, cell in cells.items() if cell is not None}
    assert values == {b"put": b"v", b"gone": None, b"twice": b"new", b"brief": b"soon"}
    assert cell_version(cells[b"put"] or b"") == 1 << 40 | 5
    (chunk,) = memtable.chunks(b"", None, reverse=False)
    assert [chunk.expiry(n) for n in range(len(chunk))] == [1234, 0, 0, 0]
    assert chunk.values == [b"soon", b"", b"v", b"new"]


def test_resident_bytes_are_not_below_what_is_held() -> None:
    memtable = Memtable()
    memtable.apply([b"k" * 100] * 3, PUT, 1, [b"v" * 1000] * 3)
    assert memtable.resident_bytes >= 3100
    before = memtable.resident_bytes
    memtable.apply([b"k" * 100], PUT, 2, [b"v" * 100_000])
    assert memtable.resident_bytes >= before + 100_000


def test_no_call_does_more_than_its_share() -> None:
    memtable = Memtable()
    for low in range(0, 400_000, 1000):
        keys = [b"%06d" % (n * 7919 % 400_009) for n in range(low, low + 1000)]
        memtable.apply(keys, PUT, low + 1, keys)
    assert [len(part) for part in memtable.full_parts] == [module.PART_ROWS] * 2
    steps = 1
    while not memtable.feed_order():
        steps += 1
    assert steps >= 400_000 // key_runs.RUN_KEYS
    memtable.apply([b"one more"], PUT, 500_000, [b"v"])
    assert memtable.feed_order() and memtable.feed_order()
    slices = 1
    while memtable.dismantle():
        slices += 1
    assert slices >= 400_000 // module.DISMANTLED_ROWS


def test_a_dropped_memtable_is_dismantled_in_slices_once_nobody_reads_it() -> None:
    steps: list[int] = []

    class Counted(InlineChores):
        def submit(self, step: Step) -> None:
            steps.append(1)
            while step():
                steps[-1] += 1

    dismantler = Dismantler(Counted())
    first, second = Memtable(), Memtable()
    for memtable in (first, second):
        keys = [b"%06d" % n for n in range(50_000)]
        memtable.apply(keys, PUT, 1, keys)
    second.pins = 1
    dismantler.drop(first)
    dismantler.drop(second)
    assert len(first) == 0 and len(second) == 50_000
    assert len(steps) == 1 and steps[0] > 5
    dismantler.unpin(second)
    assert len(second) == 0
