"""The log read a window at once: the same entries as one by one, and damage found at the same place."""

from __future__ import annotations

import random

import msgspec
import pytest

from shardkv.errors import Corruption
from shardkv_node.engine import log_reader
from shardkv_node.engine.columns import DELETE, PUT, PUT_EXPIRING
from shardkv_node.engine.entries import CommitEntry, Entry, TermEntry, WriteEntry
from shardkv_node.engine.entry_runs import WriteRun, read_runs
from shardkv_node.engine.identity import read_identity
from shardkv_node.engine.log_reader import ENTRY_DECODER, SegmentReader
from shardkv_node.engine.log_writer import LogWriter, join_payloads
from shardkv_node.engine.manifest import read_current, read_manifest
from shardkv_node.engine.recovery import RecoveryReport, Replay
from tests.node.engine.crash_vfs import CrashVfs, keep_everything
from tests.node.engine.store_driver import STORE, TINY, commit, open_store, scan

PATH = "/000002.wal"


def write_log(groups: list[list[Entry]], *, mark_every: int = 0) -> CrashVfs:
    vfs = CrashVfs()
    log = LogWriter.create(vfs, PATH, store_id=bytes(16), number=2)
    for number, entries in enumerate(groups, 1):
        log.append(entries, number)
        if mark_every and number % mark_every == 0:
            log.sync()
            log.note_synced(log.offset)
            log.mark(number)
    return vfs


def put(seqno: int, key: bytes = b"k", *, tablet: int = 1, term: int = 1, kind: int = PUT) -> WriteEntry:
    return WriteEntry(tablet, term, seqno, None, [key], kind, 0, [b"" if kind == DELETE else b"v%d" % seqno])


def expand(found: WriteRun | Entry) -> list[Entry]:
    if not isinstance(found, WriteRun):
        return [found]
    return [
        WriteEntry(found.tablet, found.term, found.seqno + n, None, [key], found.kind, 0, [value])
        for n, (key, value) in enumerate(zip(found.keys, found.values, strict=True))
    ]


def random_groups(chance: random.Random) -> list[list[Entry]]:
    """Stretches of what a log may hold, each long enough to become a run, or cut one short."""
    seqnos = {1: 0, 2: 0}
    groups: list[list[Entry]] = []
    for _ in range(60):
        tablet, term, kind = chance.choice((1, 1, 2)), chance.choice((3, 3, 4)), chance.choice((PUT, PUT, DELETE))
        for _ in range(chance.choice((1, 2, 3, 40))):
            seqnos[tablet] += 1
            key = b"k%d" % chance.randrange(20)
            groups.append([put(seqnos[tablet], key, tablet=tablet, term=term, kind=kind)])
        seqnos[tablet] += 1
        seqno = seqnos[tablet]
        odd: list[list[Entry]] = [
            [WriteEntry(tablet, term, seqno, None, [b"a", b"b"], PUT, 0, [b"x", b"y"])],
            [WriteEntry(tablet, term, seqno, None, [b"a"], bytes((PUT,)), 0, [b"x"])],
            [WriteEntry(tablet, term, seqno, None, [b"a"], PUT_EXPIRING, 77, [b"x"])],
            [WriteEntry(tablet, term, seqno, None, [], PUT, 0, [])],
            [put(seqno, tablet=tablet, term=term), TermEntry(tablet, term, seqno), CommitEntry(tablet, seqno)],
        ]
        groups.append(chance.choice(odd))
    return groups


@pytest.mark.parametrize("window_bytes", [200, 5000, 1 << 17])
def test_runs_are_the_entries_in_order(window_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_reader, "_WINDOW_BYTES", window_bytes)
    for seed in range(10):
        chance = random.Random(seed)
        groups = random_groups(chance)
        vfs = write_log(groups, mark_every=chance.choice((0, 1, 7)))
        found = list(read_runs(vfs, PATH))
        assert [entry for one in found for entry in expand(one)] == [entry for group in groups for entry in group]
        if window_bytes > 1000:
            assert sum(isinstance(one, WriteRun) and len(one.keys) > 10 for one in found) > 5


def test_a_log_of_single_puts_is_few_runs() -> None:
    groups: list[list[Entry]] = [[put(n, b"%d" % n)] for n in range(1, 5001)]
    found = list(read_runs(write_log(groups), PATH))
    assert len(found) < 10 and all(isinstance(one, WriteRun) for one in found)


def test_a_run_ends_where_a_seqno_is_missing() -> None:
    entries = [put(n) for n in (1, 2, 3, 5, 6)]
    found = list(read_runs(write_log([[entry] for entry in entries]), PATH))
    assert [entry for one in found for entry in expand(one)] == entries
    assert not any(isinstance(one, WriteRun) and one.seqno <= 3 and len(one.keys) > 3 for one in found)


@pytest.mark.parametrize("above,upto,left", [(0, 99, [3, 4, 5]), (3, 4, [4]), (5, 9, []), (0, 2, []), (4, 5, [5])])
def test_a_run_is_clipped_to_the_seqnos_of_a_flush(above: int, upto: int, left: list[int]) -> None:
    run = WriteRun(1, 1, 3, PUT, [b"3", b"4", b"5"], [b"3", b"4", b"5"])
    run.clip(above, upto)
    assert run.keys == run.values == [b"%d" % n for n in left]
    assert not left or run.seqno == left[0]


@pytest.mark.parametrize("bad", [[[1, 1, 9, 1, None, [b"a"], 1, 0, []]], [[99, 1]], b"no list"])
def test_a_payload_among_good_ones_that_makes_no_sense_is_named(bad: object) -> None:
    vfs = CrashVfs()
    log = LogWriter.create(vfs, PATH, store_id=bytes(16), number=2)
    for n in range(1, 9):
        log.append([put(n)], n)
    offset = log.offset
    log.append_payload(msgspec.msgpack.encode(bad), 9)
    log.append([put(10)], 10)
    with pytest.raises(Corruption) as caught:
        list(read_runs(vfs, PATH))
    assert caught.value.offset == offset


@pytest.mark.parametrize("seqnos", [(4, 5), (2, 3), (3, 5), (3, 3)])
def test_a_log_that_does_not_follow_itself_is_refused_at_the_group_where_it_does_not(seqnos: tuple[int, int]) -> None:
    vfs = CrashVfs()
    store = open_store(vfs)
    tablet = store.create_tablet(b"t")
    for n in range(2):
        commit(store, tablet, [(b"%d" % n, b"v")])
    offsets = []
    for n, seqno in enumerate(seqnos):
        offsets.append(store._log.offset)
        store._log.append([put(seqno, tablet=tablet, term=store.term)], store._log.hlc + n + 1)
    with pytest.raises(Corruption, match="does not follow") as caught:
        open_store(vfs.crash(keep_everything))
    assert caught.value.offset == offsets[seqnos[0] == 3]


@pytest.mark.parametrize("change", [{"tablet": 9}, {"term": 99}])
def test_a_run_of_an_unknown_tablet_or_term_is_refused(change: dict[str, int]) -> None:
    vfs = CrashVfs()
    store = open_store(vfs)
    known = {"tablet": store.create_tablet(b"t"), "term": store.term}
    for n in range(1, 5):
        store._log.append([put(n, **(known | change))], store._log.hlc + 1)
    with pytest.raises(Corruption, match=f"{next(iter(change))} {next(iter(change.values()))}"):
        open_store(vfs.crash(keep_everything))


@pytest.mark.parametrize("flushed", [0, 1, 7, 9, 10])
def test_a_run_that_is_partly_in_tables_is_replayed_from_there(flushed: int) -> None:
    vfs = CrashVfs()
    store = open_store(vfs, TINY.__class__(workers=0, disk_reserve_bytes=0, scrub_bytes_per_s=0))
    tablet = store.create_tablet(b"t")
    lane_of = store.quick_lane(tablet)
    for n in range(10):
        assert lane_of.put(b"%d" % n, b"v%d" % n) or commit(store, tablet, [(b"%d" % n, b"v%d" % n)])
    store.close()
    identity = read_identity(vfs, STORE)
    assert identity is not None
    state, _ = read_manifest(vfs, STORE, read_current(vfs, STORE), identity)
    state.tablets[tablet].flushed_seqno = flushed
    report = RecoveryReport()
    replay = Replay(vfs, STORE, state, report)
    replay.run()
    assert report.writes_replayed == 10 - flushed
    assert sorted(replay.memtables[tablet].cells) == [b"%d" % n for n in range(flushed, 10)]
    assert replay.last_seqnos[tablet] == 10


def test_an_unsynced_log_survives_one_crash_after_another() -> None:
    vfs, expected = CrashVfs(), {}
    for turn in range(4):
        store = open_store(vfs, TINY.__class__(durability="os", workers=0, disk_reserve_bytes=0, scrub_bytes_per_s=0))
        tablet = next(iter(store.tablets), 0) or store.create_tablet(b"t")
        assert scan(store, tablet) == dict(sorted(expected.items()))
        for n in range(0, 100, 3):
            operations = [(b"%d" % (n + i), b"%d" % turn) for i in range(1 + n % 20)]
            expected.update(operations)
            commit(store, tablet, list(operations))
        vfs = vfs.crash(keep_everything)
    assert scan(open_store(vfs), tablet) == dict(sorted(expected.items()))


def test_joined_payloads_hold_the_same_entries() -> None:
    chance = random.Random(3)
    for sizes in ((1, 1, 2, 15), (1, 15, 16, 300), (1, 2, 2000)):
        groups = [[put(n + i) for i in range(chance.choice(sizes))] for n in range(1500)]
        encoded = [msgspec.msgpack.encode(group) for group in groups]
        joined = join_payloads([payload for one in encoded for payload in (one, b"")])
        entries = [entry for group in groups for entry in group]
        assert [entry for payload in joined for entry in ENTRY_DECODER.decode(payload)] == entries
        assert len(joined) == (2 if sizes[-1] == 15 else 1500)
    assert join_payloads([]) == join_payloads([b""]) == []


def test_groups_say_the_same_as_runs() -> None:
    vfs = write_log([[put(n)] for n in range(1, 50)], mark_every=5)
    reader: SegmentReader[Entry] = SegmentReader(vfs, PATH, decoder=ENTRY_DECODER)
    groups = list(reader.groups())
    assert [group.end for group in groups] == [group.offset for group in groups[1:]] + [reader.valid_end]
    assert groups[-1].synced_offset == reader.synced_end
