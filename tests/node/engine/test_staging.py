"""A tablet moves to another store while it is written to: nothing is lost, doubled, or seen before its time."""

from __future__ import annotations

import random
from contextlib import suppress
from dataclasses import replace

import pytest

from shardkv.errors import ConditionFailed, Corruption, InvalidArgument, ShardUnavailable, StorageError
from shardkv_node.engine import tablet_import
from shardkv_node.engine.columns import DELETE, PUT, PUT_EXPIRING, SEQNO_BITS, Columns, pack_u64
from shardkv_node.engine.memory_dump import DumpSlice
from shardkv_node.engine.options import Options
from shardkv_node.engine.puts import Puts
from shardkv_node.engine.store import Store
from shardkv_node.engine.syncer import InlineSyncer
from shardkv_node.engine.table_meta import TableMeta
from shardkv_node.engine.tablet_import import check_table
from shardkv_node.engine.tail import TailBatch
from shardkv_node.engine.tools.verify import verify_store
from shardkv_node.engine.vfs import Vfs
from shardkv_node.engine.write import Write
from tests.node.engine.crash_vfs import CrashVfs, keep_everything, keep_nothing
from tests.node.engine.moving import ADOPTED, STAGED, Move
from tests.node.engine.store_driver import STORE, TINY, commit, commit_write, open_store, scan

OTHER = "/data/other"
NOW = 1_000_000
NEAR, FAR = "/data/other/incoming", "/elsewhere/incoming"

Seen = dict[bytes, tuple[bytes, int] | None]


class Clock:
    now_ms = NOW

    def __call__(self) -> int:
        return self.now_ms


def open_at(vfs: CrashVfs, name: str, options: Options = TINY, clock: Clock | None = None) -> Store:
    clock = clock or Clock()
    return Store.open(name, options, vfs=vfs, post=lambda call: call(), syncer=InlineSyncer(), now_ms=clock)


class Writer:
    """Random writes of every kind to one tablet."""

    def __init__(self, store: Store, tablet: int, seed: int) -> None:
        self.store, self.tablet = store, tablet
        self.chance = random.Random(seed)
        self.lane_numbers = {bytes((65 + lane,)) * 16: 0 for lane in range(4)}
        self.made: dict[bytes, Write] = {}
        """The newest write of each lane."""
        self.keys = [b"k%02d" % n for n in range(50)]
        self.quick = store.quick_lane(tablet)

    def write(self) -> None:
        chance = self.chance
        kind = chance.choice(["put", "put", "batch", "batch", "puts", "token", "token", "refused", "range", "quick"])
        key = chance.choice(self.keys)
        if kind == "put":
            commit(self.store, self.tablet, [(key, chance.randbytes(30))])
        elif kind == "batch":
            n = chance.randrange(1, 6)
            kinds = bytes(chance.choice((PUT, DELETE, PUT_EXPIRING)) for _ in range(n))
            expiries = [NOW + chance.randrange(1, 99) if one == PUT_EXPIRING else 0 for one in kinds]
            values = [b"" if one == DELETE else chance.randbytes(20) for one in kinds]
            keys = [chance.choice(self.keys) for _ in range(n)]
            commit_write(self.store, Write(self.tablet, keys, kinds, values, expiries=pack_u64(expiries)))
        elif kind == "puts":
            self._puts(chance.randrange(1, 5))
        elif kind == "token":
            lane = chance.choice(list(self.lane_numbers))
            self.lane_numbers[lane] += 1
            write = Write(
                self.tablet, [key], PUT, [b"t"], token=(lane, self.lane_numbers[lane]), want_existed=True, again=True
            )
            if chance.random() < 0.2:
                write.conditions = [(key, 1)]
            self.made[lane] = commit_write(self.store, write)
        elif kind == "refused":
            commit_write(self.store, Write(self.tablet, [key], PUT, [b"never"], conditions=[(key, 1)]))
        elif kind == "range":
            page = self.store.scan_page([self.tablet], key, None, limit=4, keys_only=True)
            if page.keys:
                commit(self.store, self.tablet, [(one, None) for one in page.keys])
        elif not self.quick.log(key, b"") and self.quick.tablet == self.tablet:
            commit(self.store, self.tablet, [(key, b"slow")])
        else:
            version = self.tablet_version()
            target = self.store.sync_target()
            target.sync()
            self.store.synced(target)
            self.store.apply_quick_put(self.quick, key, b"", version)

    def tablet_version(self) -> int:
        return self.store.term << SEQNO_BITS | self.store._tablets[self.tablet].last_seqno

    def _puts(self, n: int) -> None:
        rows = [(self.chance.choice(self.keys), self.chance.randbytes(25)) for _ in range(n)]
        one = Puts(
            [self.tablet] * n,
            [[key] for key, _ in rows],
            [[value] for _, value in rows],
            apart=lambda: [Write(self.tablet, [key], PUT, [value]) for key, value in rows],
            done=lambda _: None,
        )
        self.store.apply_group(self.store.log_group([one]))

    def seen(self, store: Store, tablet: int) -> Seen:
        return {key: store.get_versioned(tablet, key) for key in self.keys}


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("place", [NEAR, FAR])
def test_any_writes_during_a_move_are_there_afterwards_with_versions_expiries_and_tokens(seed: int, place: str) -> None:
    vfs, clock, chance = CrashVfs(), Clock(), random.Random(seed)
    options = replace(TINY, memtable_bytes_max=chance.choice((1500, 6000)))
    for _ in range(chance.randrange(4)):
        open_at(vfs, chance.choice((STORE, OTHER)), options).close()  # raises a term
    source, target = open_at(vfs, STORE, options, clock), open_at(vfs, OTHER, options, clock)
    tablet = source.create_tablet(b"7")
    neighbour = target.create_tablet(b"neighbour")
    commit(target, neighbour, [(b"n", b"mine")])
    writer = Writer(source, tablet, seed)
    for _ in range(chance.randrange(120)):
        writer.write()
    move = Move(vfs, source, tablet, target, place)
    for _ in range(chance.choice((1, 1, 2, 3))):
        move.begin_round()
        for _ in range(chance.randrange(80)):
            writer.write()
            if chance.random() < 0.3:
                move.step()
            if chance.random() < 0.05:
                chance.choice((source, target)).flush()
            if chance.random() < 0.05:
                source.request_compaction()
    move.settle()
    expected = writer.seen(source, tablet)
    assert source._tablets[tablet].last_seqno == target._tablets[move.staging.number].last_seqno  # type: ignore[union-attr]
    assert target.tablets_labelled(ADOPTED) == [] and scan(target, neighbour) == {b"n": b"mine"}
    number = move.adopt()
    assert target.tablets_labelled(ADOPTED) == [number] and target.tablets_labelled(STAGED) == []
    assert not {path for path in vfs.files if path.startswith(f"{STORE}/tables/")}
    assert writer.seen(target, number) == expected
    target.close()
    target = open_at(vfs.crash(keep_nothing), OTHER, options, clock)
    assert target.tablets_labelled(ADOPTED) == [number] and target.tablets_labelled(STAGED) == []
    assert writer.seen(target, number) == expected and scan(target, neighbour) == {b"n": b"mine"}
    check_tokens(writer, target, number)
    newest = max((found[1] for found in expected.values() if found), default=0)
    assert commit(target, number, [(b"k00", b"new")]).version > newest
    clock.now_ms += 1000
    gone = [key for key, found in expected.items() if found and target.get(number, key) is None]
    commit(target, number, [(key, b"v") for key in gone] or [(b"k01", None)])
    target.request_compaction()
    target.close()
    assert verify_store(target._vfs, OTHER).problems == []


def check_tokens(writer: Writer, target: Store, number: int) -> None:
    """Each lane's newest write is told its outcome again, and not made; an older one is refused."""
    for lane, before in writer.made.items():
        again = Write(number, before.keys, PUT, [b"twice"], token=before.token, want_existed=True, again=True)
        held = target.get_versioned(number, before.keys[0])
        commit_write(target, again)
        assert target.get_versioned(number, before.keys[0]) == held
        if before.error is None:
            assert (again.version, again.existed, again.error) == (before.version, before.existed, None)
        else:
            assert isinstance(again.error, ConditionFailed) and again.error.message == before.error.message  # type: ignore[attr-defined]
        stale = Write(number, before.keys, PUT, [b"stale"], token=(lane, writer.lane_numbers[lane] - 1))
        assert isinstance(commit_write(target, stale).error, InvalidArgument)


def moved(options: Options = TINY, rows: int = 60) -> tuple[CrashVfs, Store, int, Store, Move]:
    """A move under way, its tail not taken yet."""
    vfs = CrashVfs()
    source, target = open_store(vfs, options), open_at(vfs, OTHER, options)
    tablet = source.create_tablet(b"7")
    for n in range(rows):
        commit(source, tablet, [(b"k%02d" % (n % 50), b"%d" % n * 9)])
    move = Move(vfs, source, tablet, target, FAR)
    move.begin_round()
    return vfs, source, tablet, target, move


def test_a_second_round_ships_new_files_only_and_replaces_what_was_staged_at_once() -> None:
    _, source, tablet, target, move = moved()
    first = set(move.shipped)
    assert len(first) >= 3
    old = move.staging
    assert old is not None
    commit(source, tablet, [(b"k00", None), (b"k99", b"between")])
    move.step()
    move.begin_round()
    assert set(move.shipped[len(first) :]).isdisjoint(first)
    new = move.staging
    assert new is not None and target.tablets_labelled(STAGED) == [new.number] and new.number != old.number
    with pytest.raises(InvalidArgument):
        target.stage(old, TailBatch(0, []))
    move.settle()
    assert (
        scan(target, move.adopt())
        == {b"k99": b"between"} | {b"k%02d" % (n % 50): b"%d" % n * 9 for n in range(60) if n % 50}
        and scan(target, new.number)[b"k99"] == b"between"
    )


def test_files_verified_in_an_earlier_round_are_not_read_again_and_a_damaged_one_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vfs, source, tablet, target, move = moved()
    checked: list[str] = []

    def check(vfs: Vfs, path: str, meta: TableMeta) -> None:
        checked.append(meta.file_name)
        check_table(vfs, path, meta)

    monkeypatch.setattr(tablet_import, "check_table", check)
    commit(source, tablet, [(b"k00", b"v" * 2000)])
    source.flush()
    before = len(move.shipped)
    move.begin_round()
    assert len(move.shipped) > before and checked == move.shipped[before:]
    assert move.pin is not None
    name = move.pin.manifest.tables[-1][1].file_name
    damaged = bytearray(vfs.files[f"{FAR}/{name}"].data)
    damaged[40] ^= 1
    vfs.replace(f"{FAR}/{name}", bytes(damaged))
    tables = set(target._state.table_names())
    move.pin.close()
    fresh = Move(vfs, source, tablet, target, FAR)
    with pytest.raises(Corruption, match=name):
        fresh.begin_round()
    assert {path.rsplit("/")[-1] for path in vfs.files if path.startswith(f"{OTHER}/tables/")} == tables
    vfs.remove(f"{FAR}/{name}")
    fresh.begin_round()
    assert fresh.shipped == [name]


def test_a_staging_tablet_takes_no_writes_but_those_of_its_tail_until_it_is_adopted() -> None:
    _, _, _, target, move = moved()
    assert move.staging is not None
    number = move.staging.number
    write = commit_write(target, Write(number, [b"k"], PUT, [b"v"]))
    assert isinstance(write.error, ShardUnavailable)
    write = commit_write(target, Write(number, [b"k"], PUT, [b"v"], token=(b"L" * 16, 1)))
    assert isinstance(write.error, ShardUnavailable)
    move.settle()
    move.adopt()
    assert commit_write(target, Write(number, [b"k"], PUT, [b"v"], token=(b"L" * 16, 1))).applied


def test_batches_that_do_not_follow_are_refused_and_change_nothing() -> None:
    _, source, tablet, target, move = moved()
    assert move.pin is not None and move.staging is not None
    for n in range(6):
        commit(source, tablet, [(b"k%02d" % n, b"tail")])
    whole = move.pin.tail.batch(0)
    number = move.staging.number
    before = scan(target, number)
    for wrong in (TailBatch(1, whole.writes[1:]), TailBatch(0, whole.writes[1:]), TailBatch(0, whole.writes[::-1])):
        with pytest.raises(InvalidArgument):
            target.stage(move.staging, wrong)
        assert scan(target, number) == before and move.staging.applied == 0
    target.stage(move.staging, TailBatch(0, whole.writes[:4]))
    target.stage(move.staging, TailBatch(2, whole.writes[2:]))  # overlaps
    target.stage(move.staging, whole)
    assert move.staging.applied == 6 and scan(target, number)[b"k05"] == b"tail"
    move.settle()


def test_a_term_that_rises_at_the_source_during_the_move_is_passed_on() -> None:
    vfs, source, tablet, target, move = moved()
    source.export_tablet(tablet, "/data/export")
    vfs_term = source.term
    later = open_at(vfs, "/data/third")
    for _ in range(5):
        later.close()
        later = open_at(vfs, "/data/third")
    imported = later.import_tablet("/data/export", b"x")
    commit(later, imported, [(b"k", b"v")])
    later.flush()
    later.export_tablet(imported, "/data/export2")
    source.import_tablet("/data/export2", b"y")
    assert source.term > vfs_term
    newest = commit(source, tablet, [(b"k00", b"high")]).version
    move.settle()
    assert target.term > source.term
    survivor = open_at(vfs.crash(keep_nothing), OTHER)
    assert survivor.get_versioned(survivor.tablets_labelled(STAGED)[0], b"k00") == (b"high", newest)
    assert commit(target, move.adopt(), [(b"k00", b"higher")]).version > newest


@pytest.mark.parametrize("durability", ["always", "interval", "os"])
def test_what_was_staged_is_on_disk_after_a_sync_of_the_log_in_any_mode(durability: str) -> None:
    options = replace(TINY, memtable_bytes_max=1 << 20, durability=durability)  # type: ignore[arg-type]
    vfs, source, tablet, _, move = moved(options)
    for n in range(20):
        commit(source, tablet, [(b"k%02d" % n, b"tail" * 5)])
    while move.step():
        pass
    if durability == "os":
        early = open_at(vfs.crash(keep_nothing), OTHER, options)
        assert early.get(early.tablets_labelled(STAGED)[0], b"k01") != b"tail" * 5
    move.settle()
    late = open_at(vfs.crash(keep_nothing), OTHER, options)
    assert scan(late, late.tablets_labelled(STAGED)[0]) == scan(source, tablet)


def test_an_abandoned_or_dropped_staging_leaves_nothing() -> None:
    vfs, source, tablet, target, move = moved()
    assert move.pin is not None and move.staging is not None
    target.drop_tablet(move.staging.number)
    assert not [path for path in vfs.files if path.startswith(f"{OTHER}/tables/")]
    found = target.begin_staging(FAR, move.pin.manifest)
    commit(source, tablet, [(b"k", b"v")])
    pin = move.pin
    pin.close()
    pin = source.pin_tablet(tablet)
    found = target.begin_staging(FAR, pin.manifest)
    index = 0
    while (one := pin.dump_slice(index)) is not None:
        found.add_slice(one)
        index += 1
        found.write_dump()
    with suppress(Corruption):  # files made since are not there
        found.fetch()
    found.abandon()
    assert not [path for path in vfs.files if path.startswith(f"{OTHER}/tables/")]
    with pytest.raises(InvalidArgument):
        found.add_slice(DumpSlice(99, False, Columns([b"k"], PUT, 1, 0, [b"v"])))


def test_a_store_that_cannot_write_refuses_to_stage() -> None:
    vfs, source, tablet, target, move = moved()
    commit(source, tablet, [(b"k", b"v")])
    vfs.fail_at(vfs.operations + 1, errno=5, sticky=True)
    with pytest.raises(StorageError):
        move.step()
    told: list[StorageError | None] = []
    target.sync_log(told.append)
    assert isinstance(told[0], StorageError)
    with pytest.raises(StorageError):
        target.begin_staging(FAR, move.pin.manifest)  # type: ignore[union-attr]
    survivor = open_at(vfs.crash(keep_everything), OTHER)
    assert len(survivor.tablets_labelled(STAGED)) == 1
