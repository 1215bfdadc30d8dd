"""Splits of a tablet: at a key with shared files, at a hash token with rewritten ones; the fence; what survives."""

from __future__ import annotations

import queue
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from shardkv.errors import InvalidArgument, ShardUnavailable, StorageError, StorePoisoned
from shardkv.topology.tokens import hash_token
from shardkv_node.engine.columns import PUT, PUT_EXPIRING
from shardkv_node.engine.compaction_picker import check_levels
from shardkv_node.engine.job import SplitJob
from shardkv_node.engine.options import Options
from shardkv_node.engine.store import Store
from shardkv_node.engine.syncer import InlineSyncer
from shardkv_node.engine.tools.verify import verify_store
from shardkv_node.engine.vfs import OsVfs
from shardkv_node.engine.write import Write
from tests.node.engine.crash_vfs import CrashVfs, keep_everything, keep_nothing
from tests.node.engine.store_driver import STORE, TINY, Rows, commit, commit_write, open_store, scan
from tests.node.engine.test_quick_lane import HeldSyncer
from tests.node.engine.test_store import paused_store

LABELS = (b"left", b"right")
MIDDLE = 1 << 63
DEEP = replace(TINY, level1_bytes_max=3000, level_multiplier=2, compaction_bytes_max=1500)


def filled(vfs: CrashVfs, options: Options = DEEP, *, writes: int = 200) -> tuple[Store, int, Rows]:
    """A store with one tablet, all in tables on several levels, with deletes above the puts they end."""
    store = open_store(vfs, options)
    tablet = store.create_tablet(b"whole")
    chance, rows = random.Random(1), Rows()
    for _ in range(writes):
        key = b"k%03d" % chance.randrange(120)
        value = None if chance.random() < 0.25 else chance.randbytes(chance.randrange(1, 90))
        commit(store, tablet, [(key, value)])
        rows.pop(key, None)
        if value is not None:
            rows[key] = value
    store.flush()
    return store, tablet, dict(sorted(rows.items()))


def versions(store: Store, tablet: int, rows: Rows) -> dict[bytes, tuple[bytes, int] | None]:
    return {key: store.get_versioned(tablet, key) for key in rows}


def table_paths(vfs: CrashVfs) -> set[str]:
    return {path for path in vfs.files if path.endswith(".sst")}


@pytest.mark.parametrize("at_key", [b"k060", b"k0605", b"", b"a", b"z", b"k000", b"k119\0"])
def test_a_split_at_a_key_gives_each_half_its_rows_with_their_versions_and_writes_no_table(at_key: bytes) -> None:
    vfs = CrashVfs()
    store, whole, rows = filled(vfs)
    before, files = versions(store, whole, rows), table_paths(vfs)
    store.close()
    store = open_store(vfs, DEEP)
    left, right = store.split_tablet(whole, at_key, LABELS)
    assert store.tablets == {left: b"left", right: b"right"} and whole < left < right
    below = {key: value for key, value in rows.items() if key < at_key}
    above = {key: value for key, value in rows.items() if key >= at_key}

    def check(store: Store) -> None:
        assert scan(store, left) == below and scan(store, right) == above
        assert versions(store, left, below) | versions(store, right, above) == before
        assert not any(versions(store, left, above).values()) and not any(versions(store, right, below).values())
        with pytest.raises(InvalidArgument, match=f"no tablet {whole}"):
            store.get(whole, b"k001")

    check(store)
    assert table_paths(vfs) == files
    check(open_store(vfs.crash(keep_nothing), DEEP))
    store.close()
    check(open_store(vfs, DEEP))


def test_versions_rise_across_both_kinds_of_split_and_a_restart() -> None:
    vfs = CrashVfs()
    store, whole, _ = filled(vfs)
    newest = commit(store, whole, [(b"k", b"v")]).version
    store.flush()
    left, right = store.split_tablet(whole, b"k060", LABELS)
    assert [commit(store, half, [(b"k", b"v")]).version for half in (left, right)] == [newest + 1] * 2
    split = store.split_tablet_by_token(right, MIDDLE, LABELS)
    assert isinstance(split.outcome, tuple)
    assert [commit(store, half, [(b"k", b"v")]).version for half in split.outcome] == [newest + 2] * 2
    store.close()
    store = open_store(vfs, DEEP)
    halves = (left, *split.outcome)
    assert all(commit(store, half, [(b"k", b"w")]).version > newest + 2 for half in halves)


def test_a_split_at_a_key_waits_until_everything_is_in_tables() -> None:
    store, runner = paused_store(CrashVfs(), replace(TINY, memtable_bytes_max=1 << 20))
    tablet = store.create_tablet(b"whole")
    commit(store, tablet, [(b"a", b"1"), (b"b", b"2")])
    assert not store.in_tables(tablet)
    with pytest.raises(ShardUnavailable, match="in no table yet"):
        store.split_tablet(tablet, b"b", LABELS)
    store.fence_tablet(tablet)
    store.flush()
    assert not store.in_tables(tablet)
    with pytest.raises(ShardUnavailable):
        store.split_tablet(tablet, b"b", LABELS)
    runner.run_all()
    assert store.in_tables(tablet)
    left, right = store.split_tablet(tablet, b"b", LABELS)
    assert scan(store, left) == {b"a": b"1"} and scan(store, right) == {b"b": b"2"}
    commit(store, left, [(b"a", b"3")])  # the halves are not fenced


def test_a_fenced_tablet_refuses_writes_with_a_retriable_error_and_no_other_does() -> None:
    store = open_store(CrashVfs())
    fenced, other = store.create_tablet(b"fenced"), store.create_tablet(b"other")
    before = Write(fenced, [b"k"], PUT, [b"logged before"])
    group = store.log_group([before])
    store.fence_tablet(fenced)
    store.apply_group(group)
    assert before.applied and store.get(fenced, b"k") == b"logged before"
    refused, taken = Write(fenced, [b"k"], PUT, [b"2"]), Write(other, [b"k"], PUT, [b"2"])
    store.apply_group(store.log_group([refused, taken]))
    assert isinstance(refused.error, ShardUnavailable) and refused.error.retriable and taken.applied
    assert store.get(fenced, b"k") == b"logged before"
    store.lift_fence(fenced)
    assert commit(store, fenced, [(b"k", b"3")]).applied


def test_a_file_stays_until_the_last_half_that_shares_it_is_gone() -> None:
    vfs = CrashVfs()
    store, whole, rows = filled(vfs)
    files = table_paths(vfs)
    left, right = store.split_tablet(whole, b"k060", LABELS)
    below = {key: value for key, value in rows.items() if key < b"k060"}
    store.drop_tablet(right)
    assert scan(store, left) == below
    left, right = store.split_tablet(left, b"k030", LABELS)
    store.drop_tablet(left)
    assert scan(store, right) == {key: value for key, value in below.items() if key >= b"k030"}
    assert scan(open_store(vfs.crash(keep_everything), DEEP), right) == scan(store, right)
    assert verify_store(vfs, STORE).problems == []
    store.request_compaction()
    assert not files & table_paths(vfs)
    assert scan(store, right) == {key: value for key, value in below.items() if key >= b"k030"}
    store.drop_tablet(right)
    assert not table_paths(vfs)


def test_a_compaction_of_a_half_rewrites_what_its_clip_lets_through_and_leaves_the_other_alone() -> None:
    vfs = CrashVfs()
    store, whole, rows = filled(vfs)
    files = table_paths(vfs)
    left, right = store.split_tablet(whole, b"k060", LABELS)
    others = store._state.tablets[right].levels
    store.request_compaction([left])
    assert {key for key in rows if key < b"k060"} == scan(store, left).keys()
    assert store._state.tablets[right].levels == others and any(meta.clipped for level in others for meta in level)
    metas = [meta for level in store._state.tablets[left].levels for meta in level]
    assert sum(meta.count for meta in metas) == len(scan(store, left)) and not any(meta.clipped for meta in metas)
    assert files & table_paths(vfs)  # what the other half still uses
    assert scan(store, right) == {key: value for key, value in rows.items() if key >= b"k060"}


def test_a_snapshot_of_the_whole_outlives_its_split_in_every_way() -> None:
    vfs = CrashVfs()
    store, whole, rows = filled(vfs)
    other = store.snapshot([whole])
    split = store.split_tablet_by_token(whole, MIDDLE, LABELS)
    assert isinstance(split.outcome, tuple)
    for half in split.outcome:
        store.drop_tablet(half)
    assert other.scan_page([whole], b"", None).keys == list(rows)
    other.close()
    assert not table_paths(vfs)


def test_a_split_at_a_token_sends_each_key_where_the_topology_does() -> None:
    vfs = CrashVfs()
    store, whole, rows = filled(vfs)
    commit(store, whole, [(b"%d{tag}" % n, b"v") for n in range(20)])
    rows |= {b"%d{tag}" % n: b"v" for n in range(20)}
    before = versions(store, whole, rows)
    split = store.split_tablet_by_token(whole, MIDDLE, LABELS)
    assert isinstance(split.outcome, tuple)
    left, right = split.outcome
    assert store.tablets == {left: b"left", right: b"right"}
    below = {key: value for key, value in sorted(rows.items()) if hash_token(key) < MIDDLE}
    above = {key: value for key, value in sorted(rows.items()) if hash_token(key) >= MIDDLE}

    def check(store: Store) -> None:
        assert scan(store, left) == below and scan(store, right) == above
        assert versions(store, left, below) | versions(store, right, above) == before

    check(store)
    metas = [meta for half in split.outcome for level in store._state.tablets[half].levels for meta in level]
    assert {meta.file_name for meta in metas} == {path.rsplit("/")[-1] for path in table_paths(vfs)}
    assert {meta.tablet for meta in metas} == {left, right} and not any(meta.tombstones for meta in metas)
    check(open_store(vfs.crash(keep_nothing), DEEP))


@pytest.mark.parametrize("token", [0, 1 << 64])
def test_a_split_at_the_end_of_the_tokens_leaves_one_half_empty(token: int) -> None:
    store, whole, rows = filled(CrashVfs())
    split = store.split_tablet_by_token(whole, token, LABELS)
    assert isinstance(split.outcome, tuple)
    assert [scan(store, half) for half in split.outcome] == ([rows, {}] if token else [{}, rows])
    with pytest.raises(InvalidArgument, match="hash token"):
        store.split_tablet_by_token(split.outcome[0], -1, LABELS)


def test_an_empty_tablet_is_split_both_ways() -> None:
    store = open_store(CrashVfs())
    left, right = store.split_tablet(store.create_tablet(b"whole"), b"m", LABELS)
    split = store.split_tablet_by_token(right, MIDDLE, LABELS)
    assert isinstance(split.outcome, tuple) and len(store.tablets) == 3
    assert all(scan(store, number) == {} for number in (left, *split.outcome))


@pytest.mark.parametrize("seed", range(12))
def test_a_tablet_is_read_and_written_while_it_is_split_at_a_token_and_nothing_is_lost(seed: int) -> None:
    vfs = CrashVfs()
    store, whole, rows = filled(vfs)
    other = store.create_tablet(b"other")
    store, runner = paused_store(vfs.crash(keep_everything), DEEP)
    group = store.log_group([Write(whole, [b"k500"], PUT, [b"in flight when it began"])])
    split = store.split_tablet_by_token(whole, MIDDLE, LABELS)
    store.apply_group(group)
    rows[b"k500"] = b"in flight when it began"
    chance, taken, refused, newest = random.Random(seed), 0, 0, 0
    while split.outcome is None:
        for _ in range(chance.randrange(12)):
            key = b"k%03d" % chance.randrange(140)
            value = None if chance.random() < 0.4 else b"%d" % taken
            write = commit(store, whole, [(key, value)])
            if write.error is not None:
                assert isinstance(write.error, ShardUnavailable)
                refused += 1
                continue
            taken, newest = taken + 1, write.version
            rows.pop(key, None)
            if value is not None:
                rows[key] = value
        assert commit(store, other, [(b"k", b"%d" % taken)]).applied
        rows = dict(sorted(rows.items()))
        assert scan(store, whole) == rows
        with pytest.raises(InvalidArgument, match="being split"):
            store.lift_fence(whole)
        with pytest.raises(InvalidArgument, match="being split"):
            store.split_tablet(whole, b"m", LABELS)
        before = versions(store, whole, rows)
        if chance.random() < 0.2 and len(store.maintenance.frozen) < DEEP.frozen_memtables_max:
            store.flush()
        if runner.waiting:
            runner.run_next()
    assert taken > 10
    assert isinstance(split.outcome, tuple)
    left, right = split.outcome
    assert scan(store, left) == {key: value for key, value in rows.items() if hash_token(key) < MIDDLE}
    assert scan(store, right) == {key: value for key, value in rows.items() if hash_token(key) >= MIDDLE}
    halves = [right if hash_token(key) >= MIDDLE else left for key in rows]
    assert {key: store.get_versioned(half, key) for key, half in zip(rows, halves, strict=True)} == before
    assert all(commit(store, half, [(b"k", b"v")]).version > newest for half in split.outcome)
    runner.run_all()
    named = {f"{STORE}/tables/{name}" for name in store._state.table_names()}
    assert table_paths(store._vfs) == named


def test_a_split_at_a_token_takes_writes_until_its_last_stretch() -> None:
    store, whole, _ = filled(vfs := CrashVfs())
    store.close()
    store, runner = paused_store(vfs, replace(DEEP, memtable_bytes_max=1 << 20))
    split = store.split_tablet_by_token(whole, MIDDLE, LABELS)
    outcomes = []
    while split.outcome is None:
        outcomes.append(commit(store, whole, [(b"k%d" % len(outcomes), b"v")]).applied)
        runner.run_next()
    parts, last_stretch = outcomes.count(True), outcomes.count(False)
    assert outcomes == [True] * parts + [False] * last_stretch
    assert parts > 4 and 0 < last_stretch <= 3  # at its end, a flush and the rewriting of what that made


def test_a_split_at_a_token_catches_up_with_a_writer_that_is_fast_at_first() -> None:
    options = replace(DEEP, level1_bytes_max=1024, memtable_bytes_max=2000, l0_stall_tables=99, l0_slow_tables=99)
    vfs = CrashVfs()
    store, whole, rows = filled(vfs, options, writes=400)
    store.close()
    store, runner = paused_store(vfs, options)
    depth = len(store._state.tablets[whole].levels) - 1
    assert depth >= 4
    chance = random.Random(9)
    split = store.split_tablet_by_token(whole, MIDDLE, LABELS)
    stages: list[int] = []
    while split.outcome is None:
        stages.append(split._round)
        for _ in range(max(0, 25 - len(stages) // 4)):
            if store.stalled:
                break
            key, value = b"k%03d" % chance.randrange(140), chance.randbytes(90)
            if commit(store, whole, [(key, value)]).error is None:
                rows[key] = value
        runner.run_next()
    assert 3 <= stages[-1] <= depth
    assert isinstance(split.outcome, tuple)
    left, right = split.outcome
    assert scan(store, left) | scan(store, right) == rows
    assert not check_levels(store._state.tablets[left].levels) + check_levels(store._state.tablets[right].levels)
    runner.run_all()
    assert scan(store, left) | scan(store, right) == rows


def test_a_tablet_that_was_fenced_before_its_split_stays_so_when_that_is_cancelled() -> None:
    store, runner = paused_store(CrashVfs())
    tablet = store.create_tablet(b"t")
    commit(store, tablet, [(b"k", b"v")])
    store.fence_tablet(tablet)
    split = store.split_tablet_by_token(tablet, MIDDLE, LABELS)
    split.cancel()
    again = store.split_tablet_by_token(tablet, MIDDLE, LABELS)
    again.cancel()
    assert isinstance(commit(store, tablet, [(b"k", b"w")]).error, ShardUnavailable)
    third = store.split_tablet_by_token(tablet, MIDDLE, LABELS)
    third.cancel()
    store.lift_fence(tablet)
    assert commit(store, tablet, [(b"k", b"w")]).applied
    fourth = store.split_tablet_by_token(tablet, MIDDLE, LABELS)
    runner.run_all()
    assert isinstance(fourth.outcome, tuple) and scan(store, fourth.outcome[hash_token(b"k") >= MIDDLE]) == {b"k": b"w"}


@pytest.mark.parametrize("end", ["cancel", "drop", "close", "failure"])
@pytest.mark.parametrize("after_jobs", [0, 1, 3])
def test_a_split_that_does_not_come_to_its_end_leaves_the_whole_and_no_file(end: str, after_jobs: int) -> None:
    vfs = CrashVfs()
    store, whole, rows = filled(vfs)
    store.close()
    store, runner = paused_store(vfs, DEEP)
    commit(store, whole, [(b"k000", b"in memory")])
    rows[b"k000"] = b"in memory"
    split = store.split_tablet_by_token(whole, MIDDLE, LABELS)
    for _ in range(after_jobs):
        runner.run_next()
    assert split.outcome is None
    if end == "cancel":
        split.cancel()
        assert isinstance(split.outcome, InvalidArgument)
    elif end == "drop":
        store.drop_tablet(whole)
        rows.clear()
        assert isinstance(split.outcome, InvalidArgument)
    elif end == "close":
        store.close()
        store, runner = paused_store(vfs, DEEP)
    else:
        while not isinstance(runner.waiting[0][0], SplitJob):
            runner.run_next()
        vfs.fail_at(vfs.operations + 6)
        runner.run_next()
        assert isinstance(split.outcome, StorageError) and "Input/output error" in str(split.outcome)
        assert not store.health.poisoned
    runner.run_all()
    if end != "drop":
        assert scan(store, whole) == rows
        assert commit(store, whole, [(b"k001", b"on it goes")]).applied
        rows[b"k001"] = b"on it goes"
    store.flush()
    runner.run_all()
    named = {f"{STORE}/tables/{name}" for name in store._state.table_names()}
    assert table_paths(vfs) == named
    if end != "drop":
        assert scan(open_store(vfs.crash(keep_everything), DEEP), whole) == rows


def test_rows_that_ended_and_deletes_are_gone_after_a_split_at_a_token_and_times_to_live_are_kept() -> None:
    now = [1_000_000]
    store = Store.open(
        STORE, TINY, vfs=CrashVfs(), post=lambda call: call(), syncer=InlineSyncer(), now_ms=lambda: now[0]
    )
    whole = store.create_tablet(b"whole")
    commit_write(store, Write(whole, [b"ended"], PUT_EXPIRING, [b"v"], expiries=now[0] + 10))
    commit_write(store, Write(whole, [b"ends"], PUT_EXPIRING, [b"v"], expiries=now[0] + 100))
    store.flush()
    now[0] += 50
    split = store.split_tablet_by_token(whole, hash_token(b"ends") + 1, LABELS)
    assert isinstance(split.outcome, tuple)
    assert store.get(split.outcome[0], b"ends") == b"v" and store.tablet_size(split.outcome[0]).rows == 1
    assert scan(store, split.outcome[1]) == {}
    now[0] += 50
    assert store.get(split.outcome[0], b"ends") is None


@pytest.mark.parametrize("jobs", range(8))
def test_a_split_ends_when_the_store_is_poisoned(jobs: int) -> None:
    vfs = CrashVfs()
    store, whole, rows = filled(vfs)
    store.close()
    store, runner = paused_store(vfs, replace(DEEP, memtable_bytes_max=1 << 20))
    other = store.create_tablet(b"other")
    split = store.split_tablet_by_token(whole, MIDDLE, LABELS)
    for _ in range(jobs):
        if commit(store, whole, [(b"k000", b"v")]).applied:
            rows[b"k000"] = b"v"
        runner.run_next()
    assert split.outcome is None
    vfs.fail_at(vfs.operations + 1)
    with pytest.raises(StorePoisoned):
        commit(store, other, [(b"k", b"v")])
    runner.run_all()
    store.tick()
    assert isinstance(split.outcome, StorageError) and scan(store, whole) == dict(sorted(rows.items()))
    store = open_store(vfs.crash(keep_everything), DEEP)
    assert scan(store, whole) == dict(sorted(rows.items())) and len(store.tablets) == 2


def test_a_split_at_a_token_by_a_worker_process_on_a_real_disk(tmp_path: Path) -> None:
    posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
    store = Store.open(str(tmp_path / "store"), replace(DEEP, workers=1, durability="os"), post=posted.put)
    try:
        whole, rows, split = store.create_tablet(b"whole"), Rows(), None
        for number in range(5000):
            while store.stalled or not posted.empty():
                posted.get(timeout=30)()
            if number == 300:
                split = store.split_tablet_by_token(whole, MIDDLE, LABELS)
            key, value = b"k%04d" % number, b"%d" % number * 9
            if (split and split.outcome) or commit(store, whole, [(key, value)]).error is not None:
                break  # its last stretch
            rows[key] = value
        assert split is not None
        while split.outcome is None:
            posted.get(timeout=30)()
        assert isinstance(split.outcome, tuple)
        left, right = (scan(store, half) for half in split.outcome)
        assert left | right == rows and len(rows) > 300
        assert all(hash_token(key) < MIDDLE for key in left) and all(hash_token(key) >= MIDDLE for key in right)
    finally:
        store.close()
    assert verify_store(OsVfs(), str(tmp_path / "store")).problems == []


def test_a_split_goes_on_by_itself_when_its_flush_had_to_wait_for_a_sync() -> None:
    syncer = HeldSyncer()
    options = replace(TINY, durability="os", memtable_bytes_max=1 << 20)
    store = Store.open(STORE, options, vfs=CrashVfs(), post=lambda call: call(), syncer=syncer)
    whole = store.create_tablet(b"whole")
    commit(store, whole, [(b"k", b"v" * 300_000)])  # too much to sync while the owner waits
    split = store.split_tablet_by_token(whole, MIDDLE, LABELS)
    assert split.outcome is None
    syncer.run()
    assert isinstance(split.outcome, tuple)
