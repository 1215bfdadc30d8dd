"""Writes with idempotency tokens: asked for twice they are made once, whatever happens in between."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import pytest

from shardkv.errors import ConditionFailed, InvalidArgument, InvalidNumber, ShardUnavailable, StorageError
from shardkv.transport.lone import DEADLINE_MS_MAX
from shardkv_node.engine.columns import DELETE, PUT
from shardkv_node.engine.dedupe import RETENTION_MS
from shardkv_node.engine.puts import Puts
from shardkv_node.engine.store import Store
from shardkv_node.engine.syncer import InlineSyncer
from shardkv_node.engine.tools.repair import repair_store
from shardkv_node.engine.tools.stats import store_stats
from shardkv_node.engine.tools.verify import verify_store
from shardkv_node.engine.vfs import Vfs
from shardkv_node.engine.write import Group, Write
from tests.node.engine.crash_vfs import CrashVfs, keep_everything, keep_nothing, keep_some
from tests.node.engine.store_driver import STORE, TINY, commit, commit_write, open_store, scan
from tests.node.engine.test_crash import SnapshotVfs

LANE, OTHER = bytes(16), bytes(range(16))
MIDDLE = 1 << 63


def incr(tablet: int, number: int, *, key: bytes = b"n", lane: bytes = LANE, again: bool = False) -> Write:
    return Write(tablet, [key], PUT, [b"1"], want_existed=True, add=1, token=(lane, number), again=again)


def put(tablet: int, number: int, value: bytes, *, lane: bytes = LANE, **others: object) -> Write:
    return Write(tablet, [b"k"], PUT, [value], token=(lane, number), **others)  # type: ignore[arg-type]


def outcome(write: Write) -> tuple[object, ...]:
    assert write.applied and write.error is None
    return write.version, write.existed, write.values if write.add is not None else None


def made_once(store: Store, make: Callable[[], Write]) -> Write:
    """Commit the write twice; the second must change nothing and have the outcome of the first."""
    first = commit_write(store, make())
    held, logged = scan(store, first.tablet), store.stats()["log_bytes"]
    second = commit_write(store, make())
    assert outcome(second) == outcome(first)
    assert scan(store, first.tablet) == held and store.stats()["log_bytes"] == logged
    return first


def test_the_same_token_twice_is_one_write_with_one_outcome() -> None:
    store = open_store(CrashVfs())
    tablet = store.create_tablet(b"t")
    assert made_once(store, lambda: incr(tablet, 1)).values == [b"1"]
    assert made_once(store, lambda: incr(tablet, 2)).values == [b"2"]
    made_once(store, lambda: incr(tablet, 2, lane=OTHER))
    assert scan(store, tablet) == {b"n": b"3"}
    version = made_once(store, lambda: put(tablet, 3, b"a", conditions=[(b"k", 0)])).version
    made_once(store, lambda: put(tablet, 4, b"b", conditions=[(b"k", version)]))
    keys = [b"n", b"nothing", b"k"]
    delete = made_once(
        store, lambda: Write(tablet, keys, DELETE, [b""] * 3, want_existed=True, token=(LANE, 5), again=True)
    )
    assert delete.existed == [True, False, True] and scan(store, tablet) == {}
    assert store.tablets == {tablet: b"t"} and store.stats()["tablets"] == 1


def test_a_write_that_comes_again_in_the_group_of_the_first_waits_for_it() -> None:
    store = open_store(CrashVfs())
    tablet = store.create_tablet(b"t")
    told: list[int] = []
    writes = [incr(tablet, 1), incr(tablet, 1), incr(tablet, 1, lane=OTHER), incr(tablet, 1), incr(tablet, 2)]
    for place, write in enumerate(writes):
        write.done = lambda _, place=place: told.append(place)  # type: ignore[misc]
    group = store.log_group(writes)
    assert not told
    store.apply_group(group)
    assert sorted(told) == [0, 1, 2, 3, 4]
    assert [write.values for write in writes] == [[b"1"], [b"1"], [b"2"], [b"1"], [b"3"]]
    assert outcome(writes[1]) == outcome(writes[0]) == outcome(writes[3])
    assert scan(store, tablet) == {b"n": b"3"} and store.stats()["writes"] == 3


def test_puts_that_go_together_are_made_once_each() -> None:
    vfs = CrashVfs()
    store = open_store(vfs, replace(TINY, memtable_bytes_max=1 << 20))
    tablets = [store.create_tablet(b"a"), store.create_tablet(b"b")]
    lanes = [bytes([lane]) * 16 for lane in range(12)]
    numbers = [tablets[place % 2] for place in range(12)]

    def send(number: int, value: bytes, *, tokens: Sequence[int], again: Sequence[Write | Puts] = ()) -> Group:
        asked = [(lanes[place], number) if place in tokens else None for place in range(12)]
        keys = [b"k%02d" % place for place in range(12)]

        def apart() -> list[Write]:
            rows = zip(numbers, keys, asked, strict=True)
            return [Write(tablet, [key], PUT, [value], token=token) for tablet, key, token in rows]

        puts = Puts(numbers, [[key] for key in keys], [[value]] * 12, apart=apart, done=lambda puts: None, tokens=asked)
        group = store.log_group([puts, *again])
        store.apply_group(group)
        return group

    first = send(1, b"first", tokens=range(3, 12))
    assert isinstance(first.accepted[0], Puts) and len(first.accepted) == 3
    put_alone = commit_write(store, Write(numbers[5], [b"k05"], PUT, [b"later"]))
    again = send(1, b"again", tokens=range(3, 12))
    versions = [write.version for write in again.repeated]
    assert versions == first.accepted[0].versions[3:] and put_alone.version not in versions
    assert {row[0]: row[1] for tablet in tablets for row in scan(store, tablet).items()} == {
        **{b"k%02d" % place: b"again" for place in range(3)},
        **{b"k%02d" % place: b"first" for place in range(3, 12)},
        b"k05": b"later",
    }
    twice = [Write(numbers[4], [b"k04"], PUT, [b"other"], token=(lanes[4], 2))]
    assert send(2, b"second", tokens=[4], again=twice).repeated == twice
    assert store.get(numbers[4], b"k04") == b"second"


def test_a_number_below_the_newest_of_its_lane_is_refused_and_never_made() -> None:
    vfs = CrashVfs()
    store = open_store(vfs)
    tablet = store.create_tablet(b"t")
    commit_write(store, incr(tablet, 7))
    for _ in range(2):
        late = commit_write(store, incr(tablet, 6))
        assert isinstance(late.error, InvalidArgument) and not late.applied
        group = store.log_group([incr(tablet, 9), late := incr(tablet, 8)])
        store.apply_group(group)
        assert isinstance(late.error, InvalidArgument)
        store.close()
        store = open_store(vfs)
    assert scan(store, tablet) == {b"n": b"2"}


def test_a_token_stands_for_one_write_and_no_longer_one() -> None:
    store = open_store(CrashVfs())
    tablet = store.create_tablet(b"t")
    commit_write(store, put(tablet, 1, b"a"))
    longer = commit_write(store, Write(tablet, [b"k", b"l"], PUT, [b"b", b"c"], token=(LANE, 1)))
    assert isinstance(longer.error, InvalidArgument) and scan(store, tablet) == {b"k": b"a"}


def test_a_refusal_is_final_only_for_a_write_that_may_have_been_sent_before() -> None:
    vfs = CrashVfs()
    store = open_store(vfs)
    tablet = store.create_tablet(b"t")
    there = commit(store, tablet, [(b"k", b"there"), (b"n", b"no number")])
    first = commit_write(store, put(tablet, 1, b"new", conditions=[(b"k", 0)]))
    assert isinstance(first.error, ConditionFailed)
    again = commit_write(store, put(tablet, 1, b"new", conditions=[(b"k", 0)], again=True))
    counted = commit_write(store, incr(tablet, 1, lane=OTHER, again=True))
    assert isinstance(again.error, ConditionFailed) and isinstance(counted.error, InvalidNumber)
    commit(store, tablet, [(b"k", None), (b"n", None)])
    store.flush()
    for _ in range(2):  # the first copy, which comes late, is not made: its caller was told that it is not
        late = commit_write(store, put(tablet, 1, b"new", conditions=[(b"k", 0)]))
        assert isinstance(late.error, ConditionFailed)
        assert late.error.detail == again.error.detail == {"key": b"k", "expected": 0, "found": there.version}
        assert late.error.message == again.error.message
        assert isinstance(commit_write(store, incr(tablet, 1, lane=OTHER)).error, InvalidNumber)
        store.close()
        store = open_store(vfs)
    commit_write(store, put(tablet, 2, b"judged anew", conditions=[(b"k", 0)]))
    assert scan(store, tablet) == {b"k": b"judged anew"}


def test_what_a_fence_refuses_is_judged_anew() -> None:
    store = open_store(CrashVfs())
    tablet = store.create_tablet(b"t")
    store.fence_tablet(tablet)
    for again in (False, True):
        assert isinstance(commit_write(store, incr(tablet, 1, again=again)).error, ShardUnavailable)
    store.lift_fence(tablet)
    assert commit_write(store, incr(tablet, 1)).values == [b"1"]


def test_tokens_are_known_after_flush_compaction_and_restart() -> None:
    vfs = CrashVfs()
    store = open_store(vfs)
    tablet = store.create_tablet(b"t")
    firsts = {lane: commit_write(store, incr(tablet, 9, lane=bytes([lane]) * 16)) for lane in range(20)}

    def check(store: Store) -> None:
        for lane, first in firsts.items():
            assert outcome(commit_write(store, incr(tablet, 9, lane=bytes([lane]) * 16))) == outcome(first)
        assert scan(store, tablet) == {b"n": b"20"}

    check(store)
    store.flush()
    check(store)
    store.request_compaction()
    check(store)
    check(open_store(vfs.crash(keep_nothing)))
    store.close()
    store = open_store(vfs)
    check(store)
    store.close()
    assert store.tablets == {tablet: b"t"} and verify_store(vfs, STORE).problems == []


def test_a_record_ends_after_its_retention_which_outlasts_every_deadline() -> None:
    assert RETENTION_MS > DEADLINE_MS_MAX
    vfs, now_ms = CrashVfs(), [1_000_000]
    store = Store.open(STORE, TINY, vfs=vfs, post=lambda call: call(), syncer=InlineSyncer(), now_ms=lambda: now_ms[0])
    tablet = store.create_tablet(b"t")
    commit_write(store, incr(tablet, 1))
    now_ms[0] += RETENTION_MS - 1000
    commit_write(store, incr(tablet, 1))
    assert scan(store, tablet) == {b"n": b"1"}
    now_ms[0] += 2000
    store.flush()
    store.request_compaction()
    assert {row["label"]: row["rows"] for row in facts(vfs)} == {"t": 1, "records": 0}
    commit_write(store, incr(tablet, 1))
    assert scan(store, tablet) == {b"n": b"2"}


def test_a_lane_takes_one_row_however_much_it_writes() -> None:
    vfs = CrashVfs()
    store = open_store(vfs)
    tablet = store.create_tablet(b"t")
    for number in range(1, 200):
        commit_write(store, incr(tablet, number, lane=(LANE, OTHER)[number % 2]))
    store.flush()
    store.request_compaction()
    assert {row["label"]: row["rows"] for row in facts(vfs)} == {"t": 1, "records": 2}


def facts(vfs: Vfs) -> list[dict[str, object]]:
    return [
        {**tablet, "label": "records" if tablet["records_of"] else tablet["label"]}
        for tablet in store_stats(vfs, STORE)["tablets"]
    ]


@pytest.mark.parametrize("by_token", [False, True])
def test_both_halves_of_a_split_know_what_the_whole_has_made(*, by_token: bool) -> None:
    vfs = CrashVfs()
    store = open_store(vfs)
    whole = store.create_tablet(b"whole")
    keys = [b"k%02d" % number for number in range(40)]
    commit(store, whole, [(key, b"old") for key in keys[::3]])
    first = commit_write(store, Write(whole, keys, DELETE, [b""] * 40, want_existed=True, token=(LANE, 1)))
    commit_write(store, incr(whole, 1, lane=OTHER))
    if by_token:
        split = store.split_tablet_by_token(whole, MIDDLE, (b"left", b"right"))
        assert isinstance(split.outcome, tuple)
        halves = split.outcome
    else:
        store.flush()
        halves = store.split_tablet(whole, b"k20", (b"left", b"right"))
    told = dict(zip(keys, first.existed or (), strict=True))

    def check(store: Store) -> None:
        assert sorted(store.tablets) == sorted(halves)
        for half in halves:
            part = keys[5:15] if half == halves[0] else keys[15:30]
            again = Write(half, part, DELETE, [b""] * len(part), want_existed=True, token=(LANE, 1))
            assert outcome(commit_write(store, again)) == (first.version, [told[key] for key in part], None)
            assert outcome(commit_write(store, incr(half, 1, lane=OTHER)))[2] == [b"1"]

    check(store)
    for half in halves:
        commit_write(store, incr(half, 1, lane=b"third".ljust(16), key=b"m"))
    store.request_compaction()
    check(open_store(vfs.crash(keep_nothing)))
    store.drop_tablet(halves[1])
    store.close()
    store = open_store(vfs)
    assert outcome(commit_write(store, incr(halves[0], 1, lane=OTHER)))[2] == [b"1"]
    store.close()
    assert verify_store(vfs, STORE).problems == []


@pytest.mark.parametrize("by_token", [False, True])
def test_a_crash_in_a_split_leaves_the_records_with_the_whole_or_with_both_halves(*, by_token: bool) -> None:
    crashes: list[CrashVfs] = []
    watching = []

    def look(vfs: SnapshotVfs) -> None:
        if watching:
            crashes.append(vfs.crash(keep_some(vfs.operations, 50)))

    vfs = SnapshotVfs(look)
    store = open_store(vfs)
    whole = store.create_tablet(b"whole")
    commit(store, whole, [(b"k%02d" % number, b"v") for number in range(40)])
    commit_write(store, incr(whole, 1))
    watching.append(True)
    if by_token:
        assert isinstance(store.split_tablet_by_token(whole, MIDDLE, (b"left", b"right")).outcome, tuple)
    else:
        store.flush()
        store.split_tablet(whole, b"k20", (b"left", b"right"))
    store.request_compaction()
    found = set()
    for after in crashes:
        store = open_store(after)
        found.add(tuple(store.tablets.values()))
        for tablet in store.tablets:
            assert outcome(commit_write(store, incr(tablet, 1)))[2] == [b"1"]
        store.close()
        assert verify_store(after, STORE).problems == []
    assert found == {(b"whole",), (b"left", b"right")}


def test_a_split_by_token_waits_for_records_that_came_without_a_row() -> None:
    store = open_store(CrashVfs())
    whole = store.create_tablet(b"whole")
    commit(store, whole, [(b"k", b"v")])
    store.flush()
    commit_write(store, put(whole, 1, b"w", conditions=[(b"k", 0)], again=True))  # refused, and recorded
    split = store.split_tablet_by_token(whole, MIDDLE, (b"left", b"right"))
    assert isinstance(split.outcome, tuple)
    for half in split.outcome:
        commit(store, half, [(b"k", None)])
        assert isinstance(commit_write(store, put(half, 1, b"w", conditions=[(b"k", 0)])).error, ConditionFailed)


def test_an_export_carries_the_records_and_an_import_has_them() -> None:
    vfs = CrashVfs()
    store = open_store(vfs)
    tablet = store.create_tablet(b"t")
    first = commit_write(store, incr(tablet, 5))
    store.flush()
    store.export_tablet(tablet, "/data/export")
    commit_write(store, incr(tablet, 6))
    copy = store.import_tablet("/data/export", b"copy")
    assert outcome(commit_write(store, incr(copy, 5))) == outcome(first)
    assert commit_write(store, incr(copy, 6)).values == [b"2"] and scan(store, copy) == {b"n": b"2"}
    store.drop_tablet(tablet)
    store.close()
    store = open_store(vfs)
    assert outcome(commit_write(store, incr(copy, 6)))[2] == [b"2"]


def test_a_repaired_store_knows_the_tokens() -> None:
    vfs = CrashVfs()
    store = open_store(vfs)
    tablet = store.create_tablet(b"7")
    commit_write(store, incr(tablet, 5))
    store.flush()
    commit_write(store, incr(tablet, 6))
    store.close()
    repair_store(vfs, STORE, "/data/repaired")
    repaired = Store.open("/data/repaired", TINY, vfs=vfs, post=lambda call: call(), syncer=InlineSyncer())
    assert commit_write(repaired, incr(tablet, 6)).values == [b"2"]
    assert repaired.tablets == {tablet: b"7"}


def test_writes_without_a_token_make_no_records() -> None:
    vfs = CrashVfs()
    store = open_store(vfs)
    tablet = store.create_tablet(b"t")
    commit(store, tablet, [(b"k", b"v")])
    store.flush()
    assert [row["label"] for row in facts(vfs)] == ["t"]


@dataclass
class Callers:
    """Callers that count by `incr`, each in a lane of its own, and send again whatever was not answered."""

    store: Store
    tablet: int = 0
    numbers: dict[bytes, int] = field(default_factory=dict)
    """Of each lane, the number of its newest write."""
    answered: dict[bytes, int] = field(default_factory=dict)

    def run(self, steps: int) -> None:
        chance = random.Random(3)
        self.tablet = next(iter(self.store.tablets), 0) or self.store.create_tablet(b"t")
        for step in range(steps):
            lanes = chance.sample([bytes([lane]) * 16 for lane in range(8)], chance.choice((1, 2, 5)))
            writes = []
            for lane in lanes:
                self.numbers[lane] = self.numbers.get(lane, 0) + 1
                writes.append(incr(self.tablet, self.numbers[lane], lane=lane))
            commit_group(self.store, writes)
            self.answered |= {lane: self.numbers[lane] for lane in lanes}
            if step % 9 == 8:
                self.store.flush()

    def frozen(self) -> Callers:
        return Callers(self.store, self.tablet, dict(self.numbers), dict(self.answered))

    def check(self, store: Store, context: str) -> None:
        """Send again what may be without an answer: then each was made once."""
        if not store.tablets:
            assert not self.answered, context
            return
        self.tablet = next(iter(store.tablets))
        for lane, number in self.numbers.items():
            if self.answered.get(lane) != number:
                assert commit_write(store, incr(self.tablet, number, lane=lane, again=True)).applied, context
        expected = sum(self.numbers.values())
        assert scan(store, self.tablet) == ({b"n": b"%d" % expected} if expected else {}), context
        for lane, number in self.numbers.items():
            assert commit_write(store, incr(self.tablet, number, lane=lane)).applied, context
        assert scan(store, self.tablet) == ({b"n": b"%d" % expected} if expected else {}), context


def commit_group(store: Store, writes: list[Write]) -> None:
    group = store.log_group(writes)
    errors: list[Exception | None] = []
    store.sync_group(group, errors.append)
    if errors[0] is not None:
        raise errors[0]
    store.apply_group(group)


OPTIONS = replace(TINY, memtable_bytes_max=3000)


@pytest.mark.parametrize("percent", [0, 50, 100])
def test_after_a_crash_before_any_operation_a_write_sent_again_is_made_once(percent: int) -> None:
    callers: list[Callers] = []
    crashes: list[tuple[CrashVfs, Callers | None, str]] = []

    def look(vfs: SnapshotVfs) -> None:
        last = vfs.journal[-1] if vfs.journal else "the start"
        known = callers[0].frozen() if callers else None
        crashes.append((vfs.crash(keep_some(vfs.operations, percent)), known, f"{vfs.operations} ({last})"))

    run_callers(SnapshotVfs(look), callers)
    stats = callers[0].store.stats()
    assert stats["flushes"] > 3 and stats["compactions"] > 1 and len(crashes) > 150
    for vfs, known, context in crashes[percent % 3 :: 2]:
        store = open_store(vfs, OPTIONS)
        if known is not None:
            known.check(store, context)


def test_whatever_operation_fails_a_write_sent_again_is_made_once() -> None:
    clean = CrashVfs()
    run_callers(clean, [])
    for n in range(1, clean.operations, 5):
        vfs, made = CrashVfs(), []  # type: CrashVfs, list[Callers]
        vfs.fail_at(n, errno=errno.EIO)
        with suppress(StorageError):
            run_callers(vfs, made)
        survivor = vfs.crash(keep_everything if n % 4 < 2 else keep_nothing)
        if made:
            made[0].check(open_store(survivor, OPTIONS), f"operation {n} failed: {clean.journal[n - 1]}")


def run_callers(vfs: CrashVfs, made: list[Callers]) -> None:
    callers = Callers(open_store(vfs, OPTIONS))
    made.append(callers)
    callers.run(40)


def test_of_requests_of_several_puts_that_go_together_each_is_made_once() -> None:
    store = open_store(CrashVfs(), replace(TINY, memtable_bytes_max=1 << 20))
    tablet = store.create_tablet(b"t")
    keys, tokens = [[b"a", b"b"], [b"c"]], [(LANE, 1), (OTHER, 1)]
    values = [[b"1"] * len(its) for its in keys]

    def apart() -> list[Write]:
        rows = zip(keys, values, tokens, strict=True)
        return [Write(tablet, its_keys, PUT, its_values, token=token) for its_keys, its_values, token in rows]

    puts = Puts([tablet] * 2, keys, values, apart=apart, done=lambda puts: None, tokens=tokens)
    group = store.log_group([puts])
    store.apply_group(group)
    assert group.accepted[0] is puts
    again = store.log_group(apart())
    store.apply_group(again)
    assert [write.version for write in again.repeated] == puts.versions
    other = Write(tablet, [b"a", b"b", b"c"], PUT, [b"2"] * 3, token=(LANE, 1))
    assert isinstance(commit_write(store, other).error, InvalidArgument)
    assert scan(store, tablet) == {b"a": b"1", b"b": b"1", b"c": b"1"}
