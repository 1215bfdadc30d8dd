"""A pinned tablet: files, memory and tail together are all it was told, whatever goes on meanwhile."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from shardkv.errors import InvalidArgument, ShardUnavailable
from shardkv_node.engine import memory_dump
from shardkv_node.engine.columns import DELETE, NO_EXPIRY, PUT, PUT_EXPIRING, expand_kinds, expand_u64, make_version
from shardkv_node.engine.memory_dump import DumpSlice, decode_slice, encode_slice
from shardkv_node.engine.options import Options
from shardkv_node.engine.puts import Puts
from shardkv_node.engine.store import Store
from shardkv_node.engine.tablet_pin import TabletPin
from shardkv_node.engine.tail import Tail, TailBatch, TailWrite, decode_tail, encode_tail
from shardkv_node.engine.tail_digest import TailDigest, item_hash
from shardkv_node.engine.write import Write
from tests.node.engine.crash_vfs import CrashVfs
from tests.node.engine.store_driver import TINY, commit, commit_write, open_store

ROOMY = replace(TINY, memtable_bytes_max=1 << 20, frozen_memtables_max=3)
LANE = b"L" * 16

Cell = tuple[int, int, int, bytes]
"""Kind, version, expiry, value."""


def store_with_rows(options: Options = ROOMY) -> tuple[Store, int]:
    store = open_store(CrashVfs(), options)
    tablet = store.create_tablet(b"t")
    for n in range(40):
        commit(store, tablet, [(b"k%02d" % n, b"old%d" % n)])
    return store, tablet


def slices(pin: TabletPin) -> list[DumpSlice]:
    found: list[DumpSlice] = []
    while (one := pin.dump_slice(len(found))) is not None:
        assert pin.dump_slice(len(found)) == one == decode_slice(encode_slice(one))
        found.append(one)
    return found


def dumped(pin: TabletPin, *, records: bool = False) -> dict[bytes, Cell]:
    cells: dict[bytes, Cell] = {}
    for one in slices(pin):
        rows, n = one.rows, len(one.rows)
        assert rows.keys == sorted(set(rows.keys))
        kinds, versions = expand_kinds(rows.kinds, n), expand_u64(rows.versions, n)
        columns = zip(kinds, versions, expand_u64(rows.expiries, n), rows.values, strict=True)
        if one.records == records:
            cells.update(zip(rows.keys, columns, strict=True))
    return cells


def all_of(tail: Tail, after: int = 0, bytes_max: int = 200) -> list[TailWrite]:
    """Takes each batch twice, as if the first answer had been lost."""
    writes: list[TailWrite] = []
    while True:
        batch = tail.batch(after, bytes_max=bytes_max)
        assert batch == tail.batch(after, bytes_max=bytes_max) == decode_tail(encode_tail(batch))
        if not batch.writes:
            return writes
        writes += batch.writes
        after += len(batch.writes)


def puts(tablet: int, rows: list[tuple[bytes, bytes]], tokens: list[tuple[bytes, int] | None] | None = None) -> Puts:
    return Puts(
        [tablet] * len(rows),
        [[key] for key, _ in rows],
        [[value] for _, value in rows],
        apart=lambda: [Write(tablet, [key], PUT, [value]) for key, value in rows],
        done=lambda _: None,
        tokens=tokens,
    )


def test_the_dump_is_what_was_in_memory_at_the_moment_whatever_is_written_flushed_or_dropped_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory_dump, "SLICE_ROWS", 7)
    store, tablet = store_with_rows()
    store.flush()
    files = set(store._state.table_names())
    expected: dict[bytes, Cell] = {}
    for n in range(30):
        version = commit(store, tablet, [(b"k%02d" % n, None if n % 3 else b"new")]).version
        expected[b"k%02d" % n] = (DELETE, version, 0, b"") if n % 3 else (PUT, version, 0, b"new")
    expiring = commit_write(store, Write(tablet, [b"ends"], PUT_EXPIRING, [b"v"], expiries=1 << 50))
    expected[b"ends"] = (PUT_EXPIRING, expiring.version, 1 << 50, b"v")
    pin = store.pin_tablet(tablet)
    assert pin.dump_rows == 31 and pin.manifest.last_seqno == 71
    assert {meta.file_name for _, meta in pin.manifest.tables} == files
    first = pin.dump_slice(0)
    for n in range(60):
        commit(store, tablet, [(b"k%02d" % n, b"later"), (b"more%02d" % n, b"later")])
    store.flush()
    store.request_compaction()
    assert pin.dump_slice(0) == first
    assert dumped(pin) == expected
    assert all(store._vfs.exists(pin.path(name)) for name in files)
    store.drop_tablet(tablet)
    assert all(store._vfs.exists(pin.path(name)) for name in files)
    pin.close()
    pin.close()
    assert not any(store._vfs.exists(pin.path(name)) for name in files)


def test_frozen_memtables_are_dumped_before_the_active_one() -> None:
    store, tablet = store_with_rows()
    store.maintenance._closed = True  # no flush is started
    store._freeze()
    newer = commit(store, tablet, [(b"k01", b"newer")]).version
    pin = store.pin_tablet(tablet)
    cells = dumped(pin)
    assert len(cells) == 40 and cells[b"k01"] == (PUT, newer, 0, b"newer") and cells[b"k02"][3] == b"old2"


def test_the_tail_has_every_write_in_order_whatever_way_it_came() -> None:
    store, tablet = store_with_rows()
    other = store.create_tablet(b"other")
    pin = store.pin_tablet(tablet)
    told: list[int] = []
    pin.tail.on_write = lambda: told.append(pin.tail.added)
    commit(store, tablet, [(b"a", b"1"), (b"b", None)])
    commit(store, other, [(b"not", b"mine")])
    commit_write(store, Write(tablet, [b"e"], PUT_EXPIRING, [b"v"], expiries=1 << 50))
    commit_write(store, Write(tablet, [b"c"], PUT, [b"2"], token=(LANE, 1)))
    commit_write(store, Write(tablet, [b"c"], PUT, [b"2"], token=(LANE, 1)))  # made before
    commit_write(store, Write(tablet, [b"c"], PUT, [b"2"], conditions=[(b"c", 1)]))  # refused
    both = puts(tablet, [(b"p", b"3"), (b"q", b"4")], [(LANE, 2), None])
    store.apply_group(store.log_group([both]))
    store.flush()
    writes = all_of(pin.tail)
    rows = [write for write in writes if not write.records]
    assert [(write.term, write.seqno) for write in rows] == [(store.term, 41 + n) for n in range(5)]
    assert [write.keys for write in rows] == [[b"a", b"b"], [b"e"], [b"c"], [b"p"], [b"q"]]
    assert [write.kinds for write in rows][:2] == [bytes((PUT, DELETE)), PUT_EXPIRING]
    assert [write.seqno for write in writes if write.records] == [1, 2]
    assert [write.keys for write in writes if write.records] == [[LANE], [LANE]]
    assert told[-1] == pin.tail.added == len(writes) == pin.tail.given
    digest = TailDigest()
    for write in reversed(writes):
        digest.add(write.hash)
    for one in slices(pin):
        digest.add(one.hash)
    assert pin.digest.value == digest.value
    pin.close()
    commit(store, tablet, [(b"a", b"9")])
    assert pin.tail.added == len(writes)


@pytest.mark.parametrize("durability", ["always", "os"])
def test_single_quick_puts_are_in_dump_or_tail(durability: str) -> None:
    store, tablet = store_with_rows(replace(ROOMY, durability=durability))  # type: ignore[arg-type]
    lane = store.quick_lane(tablet)

    def put(key: bytes, value: bytes) -> bool:
        version = lane.log(key, value) if durability == "always" else lane.put(key, value)
        if not version:
            commit_write(store, Write(tablet, [key], PUT, [value]))
        elif durability == "always":
            target = store.sync_target()
            target.sync()
            store.synced(target)
            store.apply_quick_put(lane, key, value, version)
        return version > 0

    quick = [put(b"before%d" % n, b"v") for n in range(3)]
    assert any(quick)
    pin = store.pin_tablet(tablet)
    for n in range(3):
        put(b"after%d" % n, b"v")
    assert {b"before%d" % n for n in range(3)} <= set(dumped(pin))
    for n in range(3, 6):
        put(b"after%d" % n, b"v")
    writes = all_of(pin.tail)
    assert [write.keys for write in writes] == [[b"after%d" % n] for n in range(6)]
    assert [write.seqno for write in writes] == list(range(44, 50))
    pin.close()
    assert any(put(b"last%d" % n, b"v") for n in range(3))


def test_a_write_under_way_is_in_the_tail_and_a_pin_waits_for_the_moment_between_groups() -> None:
    store, tablet = store_with_rows()
    group = store.log_group([Write(tablet, [b"under way"], PUT, [b"v"])])
    with pytest.raises(RuntimeError):
        store.pin_tablet(tablet)
    pins: list[TabletPin] = []
    store.between_groups(lambda: pins.append(store.pin_tablet(tablet)))
    assert not pins
    store.apply_group(group)
    assert b"under way" in dumped(pins[0]) and not pins[0].tail.added
    with pytest.raises(InvalidArgument, match="pinned already"):
        store.between_groups(lambda: pins.append(store.pin_tablet(tablet)))
    pins[0].close()
    assert not store.pin_tablet(tablet).tail.added


def test_a_tail_over_its_bound_says_so_holds_nothing_and_a_new_pin_has_it_all() -> None:
    store, tablet = store_with_rows()
    pin = store.pin_tablet(tablet, tail_bytes_max=3000)
    for _ in range(4):
        commit(store, tablet, [(b"k", b"v" * 300)])
    assert [write.seqno for write in all_of(pin.tail)] == [41, 42, 43, 44]
    assert pin.tail.batch(4).writes == [] and pin.tail.held_bytes == 0
    for _ in range(9):
        commit(store, tablet, [(b"k", b"v" * 300)])
    assert pin.tail.overflowed and pin.tail.held_bytes == 0
    with pytest.raises(ShardUnavailable):
        pin.tail.batch(4)
    pin.close()
    pin = store.pin_tablet(tablet)
    assert pin.manifest.last_seqno == 53 and dumped(pin)[b"k"][1] == make_version(store.term, 53)


def test_a_tail_is_asked_for_what_comes_next_only() -> None:
    tail = Tail(TailDigest())
    for seqno in range(1, 6):
        tail.add(make_version(1, seqno), [b"k"], PUT, NO_EXPIRY, [b"v"])
    for after in (1, -1):
        with pytest.raises(InvalidArgument):
            tail.batch(after)
    assert len(tail.batch(0, bytes_max=1).writes) == 1
    assert len(tail.batch(1, bytes_max=1000).writes) == 2
    for after in (0, 4):
        with pytest.raises(InvalidArgument):
            tail.batch(after)


def test_what_is_no_batch_or_slice_is_refused() -> None:
    good = TailWrite(False, 1, 1, [b"a", b"b"], PUT, 0, [b"1"])
    for data in (b"", b"\xc0", encode_tail(TailBatch(0, [good])), encode_slice(DumpSlice(0, False, None))):  # type: ignore[arg-type]
        with pytest.raises(InvalidArgument):
            decode_tail(data)
        with pytest.raises(InvalidArgument):
            decode_slice(data)


def test_a_digest_knows_every_field_and_no_order() -> None:
    rng = random.Random(3)
    base = (make_version(1, 2), [b"k", b"l"], PUT, 0, [b"v", b"w"])
    others = [
        (make_version(1, 3), *base[1:]),
        (base[0], [b"k", b"m"], *base[2:]),
        (*base[:2], bytes((PUT, DELETE)), *base[3:]),
        (*base[:3], 7, base[4]),
        (*base[:4], [b"v", b"x"]),
        (base[0], [b"kl", b""], *base[2:]),
    ]
    hashes = [item_hash(*item, records=records) for item in (base, *others) for records in (False, True)]  # type: ignore[arg-type]
    assert len(set(hashes)) == len(hashes)
    assert hashes[0] == 200705350879911251059487559050811234188  # written once: it must never change
    digests = []
    for _ in range(3):
        rng.shuffle(hashes)
        digest = TailDigest()
        for one in hashes:
            digest.add(one)
        digests.append(digest.value)
    assert len(set(digests)) == 1 and digests[0][0] == len(hashes)
