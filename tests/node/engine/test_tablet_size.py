"""Sizes and middle keys told by indexes, against what the rows really take."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from shardkv_node.engine.options import Options
from shardkv_node.engine.store import Store
from tests.node.engine.crash_vfs import CrashVfs
from tests.node.engine.store_driver import TINY, commit, open_store, scan

ROOMY = replace(
    TINY,
    memtable_bytes_max=1 << 20,
    block_bytes=2048,
    table_bytes_max=256 * 1024,
    level1_bytes_max=256 * 1024,
    compaction_bytes_max=1 << 20,
    manifest_bytes_max=1 << 20,
    block_cache_bytes=1 << 20,
)
LABELS = (b"left", b"right")


def key_at(number: int) -> bytes:
    return b"k%06d" % number


def filled(value_bytes: Callable[[int], int], *, rows: int = 3000, options: Options = ROOMY) -> tuple[Store, int]:
    """One tablet on several levels, rows in random order, the size of each told by its place in key order."""
    store = open_store(CrashVfs(), options)
    tablet = store.create_tablet(b"t")
    chance = random.Random(3)
    numbers = list(range(rows))
    chance.shuffle(numbers)
    for low in range(0, rows, 100):
        commit(store, tablet, [(key_at(n), chance.randbytes(value_bytes(n))) for n in numbers[low : low + 100]])
        if low % 1000 == 900:
            store.flush()
    store.flush()
    return store, tablet


SHAPES: dict[str, Callable[[int], int]] = {
    "even": lambda n: 200,
    "most at the end": lambda n: 20 if n < 2700 else 3000,
    "most at the start": lambda n: 3000 if n < 150 else 20,
    "growing": lambda n: n // 10,
    "one large row": lambda n: 300_000 if n == 700 else 100,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_halves_of_a_split_at_the_middle_key_are_about_as_large_whatever_the_shape(shape: str) -> None:
    store, tablet = filled(SHAPES[shape])
    whole = store.tablet_size(tablet)
    middle = store.middle_key(tablet)
    assert middle is not None
    halves = store.split_tablet(tablet, middle, LABELS)
    told = [store.tablet_size(half) for half in halves]
    store.request_compaction()  # now each half has its own files, and what it takes is known
    taken = [store.tablet_size(half) for half in halves]
    largest = max(map(SHAPES[shape], range(3000)))
    assert abs(taken[0].stored_bytes - taken[1].stored_bytes) < 0.1 * whole.stored_bytes + largest
    for before, after in zip(told, taken, strict=True):
        assert abs(before.stored_bytes - after.stored_bytes) < 0.1 * whole.stored_bytes + largest / 10
    assert sum(size.rows for size in taken) == len(scan(store, halves[0])) + len(scan(store, halves[1])) == 3000
    assert abs(sum(size.stored_bytes for size in told) - whole.stored_bytes) < 0.1 * whole.stored_bytes


def test_sizes_of_unclipped_tables_and_memtables_are_exact() -> None:
    store = open_store(CrashVfs(), ROOMY)
    tablet = store.create_tablet(b"t")
    assert store.tablet_size(tablet) == type(store.tablet_size(tablet))(0, 0, 0, 0)
    commit(store, tablet, [(key_at(n), b"v" * 93) for n in range(100)])
    size = store.tablet_size(tablet)
    assert (size.rows, size.raw_bytes, size.stored_bytes) == (100, 0, 0)
    assert size.memtable_bytes == store.stats()["memtable_bytes"] > 100 * 100
    store.flush()
    commit(store, tablet, [(key_at(200), b"")])
    size = store.tablet_size(tablet)
    assert (size.rows, size.raw_bytes) == (101, 100 * 100)
    assert size.stored_bytes == sum(store.stats()[f"level{n}_bytes"] for n in range(1))


def test_halves_of_halves_do_not_count_what_others_have() -> None:
    """A table of a single partition, cut again and again: its blocks are told apart."""
    store, tablet = filled(lambda n: 100, rows=800, options=replace(ROOMY, l0_compaction_trigger=9, l0_stall_tables=99))
    whole, share = store.tablet_size(tablet), 1.0
    for _ in range(4):
        middle = store.middle_key(tablet)
        assert middle is not None
        tablet, other = store.split_tablet(tablet, middle, LABELS)
        share /= 2
        for half in (tablet, other):
            size = store.tablet_size(half)
            assert abs(size.rows - share * 800) < 45 and abs(size.stored_bytes - share * whole.stored_bytes) < 6000


def test_a_tablet_too_small_to_be_cut_has_no_middle() -> None:
    store = open_store(CrashVfs(), ROOMY)
    tablet = store.create_tablet(b"t")
    assert store.middle_key(tablet) is None
    commit(store, tablet, [(b"a", b"1"), (b"b", b"2")])
    assert store.middle_key(tablet) is None
    store.flush()
    assert store.middle_key(tablet) is None
    commit(store, tablet, [(key_at(n), b"v" * 1000) for n in range(9)])
    store.flush()
    assert store.middle_key(tablet) is not None


def test_two_large_rows_are_told_apart() -> None:
    store = open_store(CrashVfs(), ROOMY)
    tablet = store.create_tablet(b"t")
    commit(store, tablet, [(b"a", b"1" * 9000), (b"b", b"2" * 9000)])
    store.flush()
    middle = store.middle_key(tablet)
    assert middle is not None and b"a" < middle <= b"b"


def test_no_row_is_read_to_tell_sizes_and_middle() -> None:
    vfs = CrashVfs()
    store = open_store(vfs, ROOMY)
    tablet = store.create_tablet(b"t")
    chance = random.Random(1)
    for low in range(0, 4000, 500):
        commit(store, tablet, [(key_at(low + n), chance.randbytes(300)) for n in range(500)])
    store.flush()
    store.close()
    store = open_store(vfs, ROOMY)
    tables = sum(store.stats()[name] for name in store.stats() if name.endswith("_tables") and name[:5] == "level")
    vfs.journal.clear()
    store.tablet_size(tablet)
    assert [line for line in vfs.journal if line.startswith("read")] == []
    store.middle_key(tablet)
    assert len([line for line in vfs.journal if line.startswith("read")]) <= 2 * tables
