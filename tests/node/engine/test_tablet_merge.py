"""Splits that keep the whole, and merges: nothing is lost, and each can be taken back."""

from __future__ import annotations

import queue
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from shardkv.errors import ConditionFailed, InvalidArgument, OutcomeUnknown, ShardUnavailable, StorageError
from shardkv.topology.tokens import hash_token
from shardkv_node.engine import uniting
from shardkv_node.engine.columns import PUT
from shardkv_node.engine.coverage import covered, joined, narrowed
from shardkv_node.engine.dedupe import of_one_side, united
from shardkv_node.engine.job import UniteJob
from shardkv_node.engine.store import Store
from shardkv_node.engine.tools.verify import verify_store
from shardkv_node.engine.vfs import OsVfs
from shardkv_node.engine.write import Write
from tests.node.engine.crash_vfs import CrashVfs, keep_nothing
from tests.node.engine.store_driver import STORE, TINY, Rows, commit, commit_write, open_store, scan
from tests.node.engine.test_store import PausedRunner, paused_store
from tests.node.engine.test_tablet_split import DEEP, LABELS, filled, table_paths, versions

TOKEN = 1 << 63
KEY = b"k060"
LANE = b"L" * 16
LANES = [b"%016d" % n for n in range(12)]


def kept_split(store: Store, tablet: int, *, by_token: bool) -> tuple[int, int]:
    if not by_token:
        store.fence_tablet(tablet)
        store.flush()
        return store.split_tablet(tablet, KEY, LABELS, keep_whole=True)
    outcome = store.split_tablet_by_token(tablet, TOKEN, LABELS, keep_whole=True).outcome
    assert isinstance(outcome, tuple)
    return outcome[0], outcome[1]


def sides(*, by_token: bool) -> Callable[[bytes], bool]:
    """Whether a key belongs to the right side."""
    return (lambda key: hash_token(key) >= TOKEN) if by_token else (lambda key: key >= KEY)


def boundary(*, by_token: bool) -> bytes | int:
    return TOKEN if by_token else KEY


def merged_of(store: Store, left: int, right: int, *, by_token: bool) -> int:
    outcome = store.merge_tablets(left, right, boundary(by_token=by_token), b"merged").outcome
    assert isinstance(outcome, tuple), outcome
    return outcome[0]


@pytest.mark.parametrize("by_token", [False, True])
def test_a_split_that_keeps_the_whole_can_be_taken_back_or_completed(by_token: bool) -> None:
    vfs = CrashVfs()
    store, tablet, rows = filled(vfs)
    expected = versions(store, tablet, rows)
    left, right = kept_split(store, tablet, by_token=by_token)
    assert scan(store, tablet) == rows and scan(store, left) | scan(store, right) == rows
    assert isinstance(commit_write(store, Write(tablet, [b"k"], PUT, [b"v"])).error, ShardUnavailable)
    commit(store, left, [(b"k000", b"changed")])
    store.request_compaction([left, right])
    store.drop_tablet(left)
    store.drop_tablet(right)
    assert scan(store, tablet) == rows and versions(store, tablet, rows) == expected
    assert table_paths(vfs) == {f"{STORE}/tables/{name}" for name in store._state.table_names()}
    store.lift_fence(tablet)
    commit(store, tablet, [(b"k000", b"goes on")])
    rows[b"k000"] = b"goes on"
    left, right = kept_split(store, tablet, by_token=by_token)
    store = open_store(vfs.crash(keep_nothing))
    assert set(store.tablets) == {tablet, left, right}
    store.drop_tablet(tablet)
    is_right = sides(by_token=by_token)
    assert scan(store, left) == {key: value for key, value in rows.items() if not is_right(key)}
    assert scan(store, right) == {key: value for key, value in rows.items() if is_right(key)}
    store.request_compaction()
    assert scan(store, left) | scan(store, right) == rows
    store.close()
    assert verify_store(store._vfs, STORE).problems == []


def two(vfs: CrashVfs, seed: int, *, by_token: bool) -> tuple[Store, int, int, Rows]:
    """Two tablets with keys on either side, written to in turn, in memory and on several levels, deletes too."""
    store = open_store(vfs)
    numbers = [store.create_tablet(b"left"), store.create_tablet(b"right")]
    chance, rows, is_right = random.Random(seed), Rows(), sides(by_token=by_token)
    for n in range(400):
        key = b"k%03d" % chance.randrange(120)
        value = None if chance.random() < 0.25 else b"%d" % n * chance.randrange(1, 9)
        commit(store, numbers[is_right(key)], [(key, value)])
        rows.pop(key, None)
        if value is not None:
            rows[key] = value
        if chance.random() < 0.01:
            store.request_compaction([chance.choice(numbers)])
    return store, *numbers, dict(sorted(rows.items()))  # type: ignore[return-value]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("by_token", [False, True])
def test_a_merged_tablet_has_all_rows_of_both_with_their_versions(seed: int, by_token: bool) -> None:
    vfs = CrashVfs()
    store, left, right, rows = two(vfs, seed, by_token=by_token)
    is_right = sides(by_token=by_token)
    expected = {key: store.get_versioned(right if is_right(key) else left, key) for key in rows}
    last = max(store._tablets[number].last_seqno for number in (left, right))
    number = merged_of(store, left, right, by_token=by_token)
    assert store.tablets[number] == b"merged" and set(store.tablets) == {left, right, number}
    assert versions(store, number, rows) == expected and store._tablets[number].last_seqno == last
    for one in (left, right):
        assert isinstance(commit_write(store, Write(one, [b"k"], PUT, [b"v"])).error, ShardUnavailable)
        store.drop_tablet(one)
    assert scan(store, number) == rows
    assert commit(store, number, [(b"k000", b"after")]).version > max(found[1] for found in expected.values() if found)
    rows[b"k000"] = b"after"
    for n in range(60):
        commit(store, number, [(b"k%03d" % (2 * n), None)])
        rows.pop(b"k%03d" % (2 * n), None)
    assert scan(store, number) == rows
    store.request_compaction()
    assert scan(store, number) == rows
    assert table_paths(vfs) == {f"{STORE}/tables/{name}" for name in store._state.table_names()}
    store.close()
    store = open_store(vfs.crash(keep_nothing))
    assert scan(store, number) == rows
    store.close()
    assert verify_store(store._vfs, STORE).problems == []


def files_of(store: Store, tablet: int) -> set[str]:
    return {meta.file_name for metas in store._state.tablets[tablet].levels for meta in metas}


def test_a_merge_at_a_key_shares_all_files_and_clips_what_is_not_of_its_side() -> None:
    vfs = CrashVfs()
    store = open_store(vfs, replace(TINY, l0_compaction_trigger=99, l0_slow_tables=99, l0_stall_tables=100))
    left, right = store.create_tablet(b"left"), store.create_tablet(b"right")
    for n in range(120):
        commit(store, left, [(b"k%03d" % n, b"left" * 5)])  # also keys of the other side, which nobody routes there
        commit(store, right, [(b"k%03d" % n, b"right" * 5)])
    number = merged_of(store, left, right, by_token=False)
    assert files_of(store, number) <= files_of(store, left) | files_of(store, right)
    store.drop_tablet(left)
    store.drop_tablet(right)
    rows = {b"k%03d" % n: (b"right" if b"k%03d" % n >= KEY else b"left") * 5 for n in range(120)}
    assert scan(store, number) == rows
    store.request_compaction()
    assert scan(store, number) == rows


@pytest.mark.parametrize("by_token", [False, True])
def test_a_merge_can_be_taken_back(by_token: bool) -> None:
    vfs = CrashVfs()
    store, left, right, _ = two(vfs, 5, by_token=by_token)
    halves = scan(store, left), scan(store, right)
    number = merged_of(store, left, right, by_token=by_token)
    commit(store, number, [(b"k000", b"changed")])
    store.drop_tablet(number)
    for one, before in zip((left, right), halves, strict=True):
        store.lift_fence(one)
        assert scan(store, one) == before
        commit(store, one, [(b"new", b"v")])
    assert table_paths(vfs) == {f"{STORE}/tables/{name}" for name in store._state.table_names()}
    with pytest.raises(InvalidArgument):
        store.merge_tablets(left, left, KEY, b"x")
    with pytest.raises(InvalidArgument):
        store.merge_tablets(left, right, 1 << 64, b"x")


@pytest.mark.parametrize("by_token", [False, True])
def test_halves_of_a_split_become_the_whole_again_time_after_time(by_token: bool) -> None:
    vfs = CrashVfs()
    store, tablet, rows = filled(vfs)
    for _ in range(3):
        left, right = kept_split(store, tablet, by_token=by_token)
        store.drop_tablet(tablet)
        commit(store, left, [(key := next(key for key in rows if not sides(by_token=by_token)(key)), b"again")])
        rows[key] = b"again"
        tablet = merged_of(store, left, right, by_token=by_token)
        store.drop_tablet(left)
        store.drop_tablet(right)
        assert scan(store, tablet) == rows
    store.request_compaction()
    assert scan(store, tablet) == rows


# --- under way ---


def paused_two(vfs: CrashVfs, seed: int, *, by_token: bool) -> tuple[Store, PausedRunner, int, int, Rows]:
    store, left, right, rows = two(vfs, seed, by_token=by_token)
    store.close()
    store, runner = paused_store(vfs, DEEP)
    return store, runner, left, right, rows


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("by_token", [False, True])
def test_tablets_are_written_to_while_they_are_merged_and_nothing_is_lost(seed: int, by_token: bool) -> None:
    store, runner, left, right, rows = paused_two(CrashVfs(), seed, by_token=by_token)
    is_right, chance = sides(by_token=by_token), random.Random(seed)
    merge = store.merge_tablets(left, right, boundary(by_token=by_token), b"merged")
    refused = taken = lane_number = 0
    made: dict[bool, Write] = {}
    while merge.outcome is None:
        for _ in range(chance.randrange(9)):
            key, value = b"k%03d" % chance.randrange(140), None if chance.random() < 0.3 else chance.randbytes(20)
            write = commit(store, (left, right)[is_right(key)], [(key, value)])
            if write.error is not None:
                assert isinstance(write.error, ShardUnavailable)
                refused += 1
                continue
            taken += 1
            rows.pop(key, None)
            if value is not None:
                rows[key] = value
            if chance.random() < 0.3:
                lane_number += 1
                write = with_token(store, (left, right)[is_right(key)], [key], lane_number)
                if write.applied:
                    made[is_right(key)] = write
                    rows[key] = b"%d" % lane_number
        with pytest.raises(InvalidArgument, match="being split or merged"):
            store.lift_fence(chance.choice((left, right)))
        if runner.waiting:
            runner.run_next()
    assert isinstance(merge.outcome, tuple), merge.outcome
    assert by_token <= (taken > 5)
    number = merge.outcome[0]
    assert scan(store, number) == dict(sorted(rows.items()))
    if made:
        newest = max(made.values(), key=lambda write: write.token or (b"", 0))
        again = with_token(store, number, newest.keys, newest.token[1])  # type: ignore[index]
        assert again.applied and again.version == newest.version
        older = [write for write in made.values() if write is not newest]
        assert all(isinstance(with_token(store, number, w.keys, w.token[1]).error, InvalidArgument) for w in older)  # type: ignore[index]
    store.drop_tablet(left)
    store.drop_tablet(right)
    runner.run_all()
    assert scan(store, number) == dict(sorted(rows.items()))
    store.flush()
    runner.run_all()
    assert table_paths(store._vfs) == {f"{STORE}/tables/{name}" for name in store._state.table_names()}  # type: ignore[arg-type]


@pytest.mark.parametrize("end", ["cancel", "drop", "close", "failure"])
@pytest.mark.parametrize("after_jobs", [0, 1, 2, 4])
@pytest.mark.parametrize("by_token", [False, True])
def test_a_merge_that_does_not_come_to_its_end_leaves_both_and_no_file(
    end: str, after_jobs: int, by_token: bool
) -> None:
    vfs = CrashVfs()
    store, runner, left, right, _ = paused_two(vfs, 3, by_token=by_token)
    low, high = left_and_right_keys(by_token=by_token)
    for tablet, keys in ((left, low), (right, high)):
        with_token(store, tablet, keys[:1], 1)
    before = [scan(store, left), scan(store, right)]
    merge = store.merge_tablets(left, right, boundary(by_token=by_token), b"merged")
    for _ in range(after_jobs):
        if end == "failure" and isinstance(runner.waiting[0][0], UniteJob):
            break
        if runner.waiting and merge.outcome is None:
            runner.run_next()
    if merge.outcome is not None:
        assert not by_token
        return
    if end == "cancel":
        merge.cancel()
        assert isinstance(merge.outcome, InvalidArgument)
    elif end == "drop":
        store.drop_tablet(right)
        assert isinstance(merge.outcome, InvalidArgument)
    elif end == "close":
        store.close()
        store, runner = paused_store(vfs, DEEP)
    else:
        while runner.waiting and not isinstance(runner.waiting[0][0], UniteJob):
            runner.run_next()
        vfs.fail_at(vfs.operations + 6)
        runner.run_next()
        assert isinstance(merge.outcome, StorageError) and not store.health.poisoned
    runner.run_all()
    alive = [left] if end == "drop" else [left, right]
    assert sorted(store.tablets) == alive
    for tablet, rows in zip(alive, before, strict=False):
        assert scan(store, tablet) == rows
        assert commit(store, tablet, [(b"k001", b"on it goes")]).applied
    store.flush()
    runner.run_all()
    assert table_paths(vfs) == {f"{STORE}/tables/{name}" for name in store._state.table_names()}


def test_tablets_are_merged_at_a_token_by_a_worker_process_on_a_real_disk(tmp_path: Path) -> None:
    posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
    store = Store.open(str(tmp_path / "store"), replace(DEEP, workers=1, durability="os"), post=posted.put)
    try:
        numbers = [store.create_tablet(b"left"), store.create_tablet(b"right")]
        rows, merge, is_right = Rows(), None, sides(by_token=True)
        for number in range(5000):
            while store.stalled or not posted.empty():
                posted.get(timeout=30)()
            if number == 300:
                merge = store.merge_tablets(numbers[0], numbers[1], TOKEN, b"merged")
            key, value = b"k%04d" % number, b"%d" % number * 9
            if merge and merge.outcome:
                break
            write = Write(numbers[is_right(key)], [key], PUT, [value], token=(b"%016d" % (number % 50), number))
            if commit_write(store, write).error is not None:
                break  # its last stretch
            rows[key] = value
        assert merge is not None
        while merge.outcome is None:
            posted.get(timeout=30)()
        assert isinstance(merge.outcome, tuple)
        assert scan(store, merge.outcome[0]) == rows and len(rows) >= 300
        key = max(rows)
        again = Write(merge.outcome[0], [key], PUT, [b"twice"], token=(b"%016d" % (int(key[1:]) % 50), int(key[1:])))
        assert commit_write(store, again).applied and store.get(merge.outcome[0], key) == rows[key]
    finally:
        store.close()
    assert verify_store(OsVfs(), str(tmp_path / "store")).problems == []


# --- tokens ---


def with_token(store: Store, tablet: int, keys: list[bytes], number: int, **more: object) -> Write:
    write = Write(tablet, keys, PUT, [b"%d" % number] * len(keys), token=(LANE, number), want_existed=True, **more)  # type: ignore[arg-type]
    return commit_write(store, write)


def left_and_right_keys(*, by_token: bool) -> tuple[list[bytes], list[bytes]]:
    keys = [b"k%03d" % n for n in range(40, 80)]
    is_right = sides(by_token=by_token)
    return [key for key in keys if not is_right(key)], [key for key in keys if is_right(key)]


@pytest.mark.parametrize("by_token", [False, True])
def test_of_a_lane_that_both_have_the_higher_number_wins_and_tells_of_its_own_keys(by_token: bool) -> None:
    store, left, right, _ = two(CrashVfs(), 1, by_token=by_token)
    low, high = left_and_right_keys(by_token=by_token)
    with_token(store, right, high[:2], 8)
    made = with_token(store, left, low[:3], 9)
    number = merged_of(store, left, right, by_token=by_token)
    store.drop_tablet(left)
    store.drop_tablet(right)
    again = with_token(store, number, low[:3], 9)
    assert (again.version, again.existed, again.applied) == (made.version, made.existed, True)
    assert isinstance(with_token(store, number, high[:2], 8).error, InvalidArgument)
    mixed = with_token(store, number, low[:3] + high[:1], 9)
    assert isinstance(mixed.error, OutcomeUnknown)
    other_part = with_token(store, number, high[3:5], 9)  # never made: it must not pass for the first part
    assert other_part.applied and other_part.version > made.version
    assert store.get(number, high[3]) == b"9"
    for keys, before in ((low[:3], made), (high[3:5], other_part)):
        again = with_token(store, number, keys, 9)
        assert again.applied and again.existed == before.existed
        assert store.get_versioned(number, keys[0]) == (b"9", before.version)
    assert with_token(store, number, high[7:8], 9).applied and store.get(number, high[7]) == b"9"
    assert with_token(store, number, [low[0], high[0]], 10).applied
    assert isinstance(with_token(store, number, low[:3], 9).error, InvalidArgument)


@pytest.mark.parametrize("by_token", [False, True])
def test_two_parts_of_one_request_are_told_again_together(by_token: bool) -> None:
    store, left, right, _ = two(CrashVfs(), 2, by_token=by_token)
    low, high = left_and_right_keys(by_token=by_token)
    commit(store, left, [(low[0], b"there"), (low[1], None)])
    commit(store, right, [(high[0], None), (high[1], b"there")])
    parts = with_token(store, left, low[:2], 3), with_token(store, right, high[:2], 3)
    assert parts[0].existed == [True, False] and parts[1].existed == [False, True]
    number = merged_of(store, left, right, by_token=by_token)
    store.drop_tablet(left)
    store.drop_tablet(right)
    keys = [low[1], high[1], low[0], high[0]]
    again = with_token(store, number, keys, 3)
    assert again.applied and again.existed == [False, True, True, False]
    assert store.get_versioned(number, low[0]) == (b"3", parts[0].version)
    # and once more after a split of what was merged, and another merge
    store.fence_tablet(number)
    store.flush()
    halves = kept_split(store, number, by_token=by_token)
    store.drop_tablet(number)
    assert with_token(store, halves[1], high[:2], 3).existed == [False, True]
    number = merged_of(store, *halves, by_token=by_token)
    assert with_token(store, number, keys, 3).existed == [False, True, True, False]


@pytest.mark.parametrize("by_token", [False, True])
def test_a_part_that_was_refused_is_refused_again(by_token: bool) -> None:
    store, left, right, _ = two(CrashVfs(), 3, by_token=by_token)
    low, high = left_and_right_keys(by_token=by_token)
    refused = with_token(store, left, low[:1], 3, conditions=[(low[0], 1)], again=True)
    assert isinstance(refused.error, ConditionFailed)
    made = with_token(store, right, high[:1], 4)
    number = merged_of(store, left, right, by_token=by_token)
    assert with_token(store, number, high[:1], 4).version == made.version
    store.drop_tablet(number)
    store.lift_fence(left)
    store.lift_fence(right)
    refused = with_token(store, left, low[:1], 4, conditions=[(low[0], 1)], again=True)
    number = merged_of(store, left, right, by_token=by_token)
    again = with_token(store, number, [low[0], high[0]], 4, again=True)
    assert isinstance(again.error, ConditionFailed)


@pytest.mark.parametrize("which", [0, 1])
def test_only_one_of_both_has_records(which: int) -> None:
    store, left, right, _ = two(CrashVfs(), 4, by_token=False)
    keys = left_and_right_keys(by_token=False)
    made = with_token(store, (left, right)[which], keys[which][:2], 3)
    number = merged_of(store, left, right, by_token=False)
    store.drop_tablet(left)
    store.drop_tablet(right)
    assert with_token(store, number, keys[which][:2], 3).version == made.version
    assert with_token(store, number, keys[1 - which][:2], 3).version > made.version


def records_of(store: Store, tablet: int) -> dict[bytes, bytes]:
    records = store._tablets[tablet].records
    found = {} if records is None else {lane: records.get(lane) for lane in LANES}
    return {lane: record for lane, record in found.items() if record is not None}


def written_by_lanes(store: Store, sides: Sequence[tuple[int, list[bytes]]], chance: random.Random) -> None:
    """A few requests with tokens, each to one side or to both: new ones, parts, repetitions, some refused."""
    for _ in range(chance.randrange(6)):
        lane, number = chance.choice(LANES), chance.randrange(1, 12)
        for tablet, keys in chance.sample(sides, chance.randrange(1, 3)):
            some = chance.sample(keys, chance.randrange(1, 4))
            more = {"conditions": [(some[0], 1)]} if chance.random() < 0.2 else {}
            write = Write(
                tablet, some, PUT, [b"%d" % number] * len(some), token=(lane, number), again=True, want_existed=True
            )
            commit_write(store, replace(write, **more) if more else write)


@pytest.mark.parametrize("limit", [0, 10_000])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("by_token", [False, True])
def test_records_united_in_passes_while_lanes_go_on_are_those_united_once_at_the_end(
    by_token: bool, seed: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uniting, "LANES_MAX", limit)
    store, left, right, _ = two(CrashVfs(), seed, by_token=by_token)
    keys, chance, bound = left_and_right_keys(by_token=by_token), random.Random(seed), boundary(by_token=by_token)
    for turn in range(3):  # from the second on records have coverage, and parts are added to them
        store.close()
        store, runner = paused_store(store._vfs, DEEP)  # type: ignore[arg-type]
        sides = [(left, keys[0]), (right, keys[1])]
        for _ in range(3 * turn):
            written_by_lanes(store, sides, chance)
        merge = store.merge_tablets(left, right, bound, b"merged")
        while merge.outcome is None:
            written_by_lanes(store, sides, chance)
            if chance.random() < 0.2:
                tablets = [store._tablets[number].records for number in (left, right)]
                store.request_compaction([records.number for records in tablets if records is not None])
            if runner.waiting:
                runner.run_next()
        assert isinstance(merge.outcome, tuple), merge.outcome
        runner.run_all()
        below, above = records_of(store, left), records_of(store, right)
        once = {lane: united(below[lane], above[lane], bound) for lane in below.keys() & above.keys()}
        once |= {lane: of_one_side(below[lane], bound, below=True) for lane in below.keys() - above.keys()}
        once |= {lane: of_one_side(above[lane], bound, below=False) for lane in above.keys() - below.keys()}
        merged = merge.outcome[0]
        assert records_of(store, merged) == once and (once or not turn)
        store.drop_tablet(left)
        store.drop_tablet(right)
        store.request_compaction()
        runner.run_all()
        assert records_of(store, merged) == once
        store.close()
        store = open_store(store._vfs, DEEP)
        store.fence_tablet(merged)
        store.flush()
        left, right = kept_split(store, merged, by_token=by_token)
        store.drop_tablet(merged)
    assert table_paths(store._vfs) == {f"{STORE}/tables/{name}" for name in store._state.table_names()}  # type: ignore[arg-type]


def test_the_last_pass_unites_only_lanes_written_to_since_the_one_before() -> None:
    store, left, right, _ = two(CrashVfs(), 1, by_token=False)
    low, high = left_and_right_keys(by_token=False)
    for n in range(300):
        for tablet, key in ((left, low[0]), (right, high[0])):
            commit_write(store, Write(tablet, [key], PUT, [b"v"], token=(b"%016d" % n, 1)))
    store.close()
    store, runner = paused_store(store._vfs, DEEP)  # type: ignore[arg-type]
    merge = store.merge_tablets(left, right, KEY, b"merged")
    jobs: list[tuple[bool, int]] = []
    while merge.outcome is None:
        job = runner.waiting[0][0]
        if isinstance(job, UniteJob):
            rows = sum(table.meta.count for run in job.left + job.right for table in run)
            jobs.append((store.is_fenced(left), rows))
            assert commit_write(store, Write(left, [low[0]], PUT, [b"v"], token=(b"%016d" % 7, 2))).applied == (
                not jobs[-1][0]
            )
        runner.run_next()
    assert isinstance(merge.outcome, tuple)
    assert [(fenced, rows >= 600) for fenced, rows in jobs] == [(False, True), (True, False)] and jobs[1][1] == 1


def test_coverage_is_cut_and_joined() -> None:
    assert narrowed(None, None, b"m") == [(None, b"m")] and narrowed([(None, b"m")], b"c", None) == [(b"c", b"m")]
    nothing = narrowed([(b"m", None)], None, b"c")
    assert covered(nothing, [b"a", b"c", b"m", b"z"]) == [False] * 4
    assert joined([(b"m", None)], [(None, b"m")]) is None and joined(None, nothing) is None
    assert joined([(5, 9)], [(0, 4), (7, None)]) == [(0, 4), (5, None)]
    assert joined([(b"", b"a")], [(b"", b"b"), (b"c", b"d")]) == [(b"", b"b"), (b"c", b"d")]
    rng = random.Random(1)
    for _ in range(300):
        cuts = [sorted(rng.sample(range(12), 2)) for _ in range(4)]
        parts = [[(b"%02d" % low, b"%02d" % high)] for low, high in cuts]
        whole = joined(joined(parts[0], parts[1]), joined(parts[2], parts[3]))
        keys = [b"%02d" % n for n in range(12)]
        assert whole is not None
        told = covered(narrowed(whole, b"03", b"09"), keys)
        assert told == [3 <= n < 9 and any(low <= n < high for low, high in cuts) for n in range(12)]
