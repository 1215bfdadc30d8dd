"""Compaction in parts, moves, tables dense with deletes: nothing is lost, and no job is large."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkv_node.engine.compaction_picker import PickerOptions, check_levels, pick, pick_all, replaced
from shardkv_node.engine.engine import Engine
from shardkv_node.engine.job import CompactionJob, Job
from shardkv_node.engine.job_runner import Done, JobRunner
from shardkv_node.engine.manifest import TablesEdit, changed_levels
from shardkv_node.engine.store import Store
from shardkv_node.engine.table_meta import TableMeta
from tests.node.engine.crash_vfs import CrashVfs
from tests.node.engine.store_driver import TINY, Driver, open_store, random_operations, scan
from tests.node.engine.test_compaction_picker import MIB, table

SMALL = PickerOptions(l0_trigger=2, level1_bytes_max=2 * MIB, level_multiplier=2, task_bytes_max=MIB)


def wide_points(meta: TableMeta) -> list[tuple[bytes, int]]:
    """A table of one MiB for each three-digit number from its first to its last key."""
    return [(b"%03d" % n, MIB) for n in range(int(meta.first_key), int(meta.last_key) + 1)]


def wide(name: str, first: int, last: int) -> TableMeta:
    return table(name, f"{first:03d}", f"{last:03d}", size=MIB * (last - first + 1))


def test_a_large_task_is_cut_and_its_rest_goes_first() -> None:
    levels = [[wide("f0", 0, 9), wide("f1", 0, 9)], [wide("x", 0, 9)]]
    options = PickerOptions(l0_trigger=2, level1_bytes_max=100 * MIB, task_bytes_max=MIB)
    task = pick(levels, options, points=wide_points)
    assert task is not None and task.stop == b"000\0" and not task.move
    left = changed_levels(levels, TablesEdit(1, replaced(levels, task, [wide("out", 0, 0)]), ["f0", "f1", "x"]))
    assert [(meta.file_name, meta.start) for meta in left[0]] == [("f0", b"000\0"), ("f1", b"000\0")]
    assert [meta.file_name for meta in left[1]] == ["out", "x"] and check_levels(left) == []
    newer = [[*left[0], wide("f2", 0, 9)], left[1]]
    rest = pick(newer, options, points=wide_points)
    assert rest is not None and {meta.file_name for meta in rest.inputs} == {"f0", "f1", "x"}


def test_a_table_with_nothing_below_moves_unread() -> None:
    level1 = [table("a", "a", "b", size=20 * MIB), table("c", "c", "d", tombstones=1)]
    task = pick([[], level1], SMALL)
    assert task is not None and task.move and [meta.file_name for meta in task.inputs] == ["a"]
    assert replaced([[], level1], task, []) == [(2, level1[0])]
    turned = pick([[], level1], SMALL, {1: b"a"})
    assert turned is not None and not turned.move, "deletes do not move to the bottom: they are dropped there"
    covered = pick([[], level1, [], [table("z", "a", "z")]], SMALL, {1: b"a"})
    assert covered is not None and covered.move


def test_flushed_tables_move_only_to_where_their_codec_is_right() -> None:
    disjoint = [[table("f0", "a", "b"), table("f1", "c", "d")]]
    task = pick(disjoint, SMALL)
    assert task is not None and not task.move, "the bottom is compressed harder"
    same = pick(disjoint, PickerOptions(l0_trigger=2, one_codec=True))
    assert same is not None and same.move
    overlapping = pick([[table("f0", "a", "c"), table("f1", "c", "d")]], PickerOptions(l0_trigger=2, one_codec=True))
    assert overlapping is not None and not overlapping.move


def test_a_table_dense_with_deletes_is_compacted_early() -> None:
    options = PickerOptions(dense_tombstones_min=5)
    dense, sparse = table("d", "a", "c", tombstones=5), table("s", "a", "c", tombstones=4)
    assert pick([[sparse], [table("x", "a", "c")]], options) is None
    down = pick([[dense], [table("x", "a", "c")]], options)
    assert down is not None and (down.level, down.output_level, down.bottommost) == (0, 1, True)
    in_place = pick([[], [dense]], options)
    assert in_place is not None and (in_place.level, in_place.output_level, in_place.bottommost) == (1, 1, True)
    deeper = pick([[], [dense], [table("x", "b", "b")]], options)
    assert deeper is not None and deeper.output_level == 2 and not deeper.move


def test_everything_in_parts() -> None:
    levels = [[wide("f0", 0, 9)], [wide("x", 2, 6)], [wide("y", 0, 9)]]
    starts, start, number = [], b"", 0
    while (task := pick_all(levels, SMALL, start, wide_points)) is not None:
        outputs = [wide(f"o{number}", number, number)] if task.stop is not None else []
        names = sorted({meta.file_name for meta in task.inputs})
        levels = changed_levels(levels, TablesEdit(1, replaced(levels, task, outputs), names))
        assert check_levels(levels) == []
        if task.stop is None:
            break
        starts.append(start)
        start, number = task.stop, number + 1
    assert len(starts) > 3 and starts == sorted(set(starts))
    assert not levels[0] and not levels[1], "the last part leaves nothing above"


@given(first=st.integers(0, 50), last=st.integers(0, 50), low=st.integers(0, 50), high=st.integers(0, 50))
def test_pieces_of_a_table_are_what_is_outside(first: int, last: int, low: int, high: int) -> None:
    first, last, low, high = min(first, last), max(first, last), min(low, high), max(low, high)
    whole = wide("x", first, last)
    pieces = whole.without(b"%03d" % low, b"%03d" % high)
    kept = {n for n in range(first, last + 1) for piece in pieces if piece.low <= b"%03d" % n < piece.high}
    assert kept == {n for n in range(first, last + 1) if not low <= n < high}


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), task_bytes=st.sampled_from([1024, 1500, 4096]), full=st.booleans())
def test_parts_of_any_size_keep_every_row(seed: int, task_bytes: int, full: bool) -> None:
    vfs, chance = CrashVfs(), random.Random(seed)
    options = replace(TINY, compaction_bytes_max=task_bytes, level_multiplier=2)
    driver = Driver(open_store(vfs, options))
    for _write in range(150):
        driver.write(random_operations(chance))
        if full and chance.random() < 0.05:
            driver.store.request_compaction()
    assert scan(driver.store, driver.tablet) == driver.states[-1]
    for key in {key for state in driver.states for key in state}:
        assert driver.store.get(driver.tablet, key) == driver.states[-1].get(key)
    driver.store.close()
    again = open_store(vfs, options)
    assert scan(again, driver.tablet) == driver.states[-1]
    assert not [name for name in again.recovery.swept if name.endswith(".sst")], "a file nobody needs was kept"
    again.close()


def test_no_job_reads_much_more_than_allowed_and_moves_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    submit = JobRunner.submit

    def spy(self: JobRunner, job: Job, done: Done) -> None:
        if isinstance(job, CompactionJob):
            partitions = 2 * sum(len(run) for run in job.runs)  # a cut is made between partitions
            sizes.append(sum(table.meta.size for run in job.runs for table in run) // max(partitions, 1))
        submit(self, job, done)

    monkeypatch.setattr(JobRunner, "submit", spy)
    vfs = CrashVfs()
    store = open_store(vfs, replace(TINY, table_bytes_max=4096))
    driver = Driver(store)
    for number in range(300):
        driver.write([(b"%06d" % number, random.Random(number).randbytes(80))])
    store.flush()
    store.request_compaction()
    assert store.maintenance.idle and len(sizes) > 10
    assert store.stats()["level0_tables"] == 0 and store.stats()["moves"] > 0
    assert scan(store, driver.tablet) == driver.states[-1]
    store.close()


def best_of(times: int, call: Callable[[], object]) -> float:
    found = []
    for _turn in range(times):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return min(found)


def put_all(engine: Engine, keys: list[bytes]) -> None:
    for low in range(0, len(keys), 1000):
        engine.put_many([(key, b"v" * 100) for key in keys[low : low + 1000]])


def test_a_scan_over_100_000_deletes_is_not_slow(tmp_path: Path) -> None:
    """Under three times a scan with no deletes: while they are in memory, and once they are in tables far under."""
    keys = [b"%08d" % number for number in range(100_000)]
    with Engine.open(tmp_path, durability="os") as engine:
        put_all(engine, keys)
        engine.flush()
        in_tables = best_of(3, lambda: list(engine.scan()))
        put_all(engine, keys)
        in_memory = best_of(3, lambda: list(engine.scan()))
        for key in keys:
            engine.delete(key)
        assert list(engine.scan()) == []
        assert best_of(3, lambda: list(engine.scan())) < 3 * in_memory
        engine.flush()
        store: Store = engine._store
        deadline = time.monotonic() + 30
        while not store.maintenance.idle:
            assert time.monotonic() < deadline, "compaction never came to rest"
            time.sleep(0.005)
        assert best_of(3, lambda: list(engine.scan())) < in_tables / 10, "tables dense with deletes are not kept"
        assert engine.stats()["level0_tables"] == 0
