"""Exports and imports of a tablet: whole or not at all, whatever is damaged, fails or crashes."""

from __future__ import annotations

import errno
import random
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from shardkv.errors import Corruption, InvalidArgument, ShardKVError, StorageError, UnsupportedFormat
from shardkv_node.engine import tablet_export
from shardkv_node.engine.store import Store
from shardkv_node.engine.syncer import InlineSyncer
from shardkv_node.engine.table_format import FOOTER_BYTES
from shardkv_node.engine.tablet_export import ExportManifest, encode_export, read_export
from shardkv_node.engine.tools.verify import verify_store
from shardkv_node.engine.vfs import OsVfs
from tests.node.engine.crash_vfs import CrashVfs, keep_everything, keep_nothing
from tests.node.engine.store_driver import STORE, TINY, Rows, commit, open_store, scan
from tests.node.engine.test_tablet_split import DEEP, LABELS, filled, table_paths, versions

NEAR, FAR = "/data/export", "/elsewhere/export"
"""On the file system of the store, and on another one."""


def other_store(vfs: CrashVfs, name: str = "/data/other") -> Store:
    return Store.open(name, DEEP, vfs=vfs, post=lambda call: call(), syncer=InlineSyncer())


@pytest.mark.parametrize("place", [NEAR, FAR])
def test_a_tablet_goes_to_another_store_with_its_versions_and_is_durable_there(place: str) -> None:
    vfs = CrashVfs()
    store, tablet, rows = filled(vfs)
    expected = versions(store, tablet, rows)
    commit(store, tablet, [(b"k000", b"in no table yet")])
    store.export_tablet(tablet, place)
    theirs = [vfs.files[path] for path in table_paths(vfs) if path.startswith(STORE)]
    shared = [path for path in _inside(vfs, place) if vfs.files[path] in theirs]
    assert bool(shared) == (place == NEAR)
    survivor = vfs.crash(keep_nothing)  # the export was durable
    target = other_store(survivor)
    target.create_tablet(b"first of its own")
    number = target.import_tablet(place, b"new label")
    assert target.tablets[number] == b"new label"
    assert scan(target, number) == rows and versions(target, number, rows) == expected
    target = other_store(survivor.crash(keep_nothing))
    assert scan(target, number) == rows and versions(target, number, rows) == expected
    assert verify_store(target._vfs, target.directory).problems == []
    target.request_compaction()
    assert scan(target, number) == rows


def _inside(vfs: CrashVfs, directory: str) -> list[str]:
    return [path for path in vfs.files if path.startswith(directory + "/")]


def test_an_export_outlives_what_the_store_does_meanwhile_and_afterwards() -> None:
    vfs = CrashVfs()
    store, tablet, rows = filled(vfs)
    export = store.pin_export(tablet)
    for key in rows:
        commit(store, tablet, [(key, b"newer")])
    store.flush()
    store.request_compaction()
    store.drop_tablet(tablet)
    export.write(NEAR)
    assert table_paths(vfs) - set(_inside(vfs, NEAR))
    export.close()
    export.close()
    assert table_paths(vfs) == {path for path in _inside(vfs, NEAR) if path.endswith(".sst")}
    number = store.import_tablet(NEAR, b"back")
    assert scan(store, number) == rows
    store.drop_tablet(number)
    assert scan(store, store.import_tablet(NEAR, b"once more")) == rows


def test_halves_that_share_files_are_exported_with_their_clips() -> None:
    vfs = CrashVfs()
    store, tablet, rows = filled(vfs)
    left, right = store.split_tablet(tablet, b"k060", LABELS)
    store.export_tablet(left, NEAR)
    store.export_tablet(right, FAR)
    again = [store.import_tablet(place, b"again") for place in (NEAR, FAR)]
    assert [scan(store, number) for number in again] == [scan(store, left), scan(store, right)]
    assert scan(store, again[0]) | scan(store, again[1]) == rows
    for number in (left, right, *again):
        store.drop_tablet(number)
    assert table_paths(vfs) == {path for path in (*_inside(vfs, NEAR), *_inside(vfs, FAR)) if path.endswith(".sst")}


def test_an_empty_tablet_goes_over_with_its_seqno() -> None:
    vfs = CrashVfs()
    store = open_store(vfs)
    tablet = store.create_tablet(b"t")
    commit(store, tablet, [(b"k", b"v")])
    last = commit(store, tablet, [(b"k", None)]).version
    store.flush()
    store.request_compaction()
    store.export_tablet(tablet, NEAR)
    number = store.import_tablet(NEAR, b"again")
    assert scan(store, number) == {} and commit(store, number, [(b"k", b"v")]).version == last + 1


@pytest.mark.parametrize("opens", [1, 2, 5, 9])
def test_later_writes_get_higher_versions_than_imported_rows_whatever_the_terms_were(opens: int) -> None:
    vfs = CrashVfs()
    for _ in range(4):  # raise the term
        store = open_store(vfs)
        store.close()
    store, tablet, rows = filled(vfs)
    store.export_tablet(tablet, NEAR)
    newest = max(found[1] for found in versions(store, tablet, rows).values() if found)
    given_out = commit(store, tablet, [(b"k000", b"v")]).version
    for _ in range(opens):
        target = other_store(vfs)
        mine = next(iter(target.tablets), 0) or target.create_tablet(b"mine")
        before = commit(target, mine, [(b"k", b"v")]).version
        target.close()
    target = other_store(vfs)
    number = target.import_tablet(NEAR, b"t")
    term = target.term
    version = commit(target, number, [(b"k000", b"new")]).version
    assert version > newest and version != given_out
    assert commit(target, mine, [(b"k", b"w")]).version > before
    target = other_store(vfs.crash(keep_everything))
    assert target.term > term and target.get_versioned(number, b"k000") == (b"new", version)
    assert commit(target, number, [(b"k000", b"newer")]).version > version


def test_an_export_goes_to_an_empty_directory_only_and_nothing_in_it_is_touched() -> None:
    vfs = CrashVfs()
    store, tablet, _ = filled(vfs)
    store.export_tablet(tablet, NEAR)
    before = {path: bytes(inode.data) for path, inode in vfs.files.items()}
    for place in (NEAR, f"{STORE}/tables", STORE):
        with pytest.raises(InvalidArgument, match="is not empty"):
            store.export_tablet(tablet, place)
    with pytest.raises(InvalidArgument, match="no complete export"):
        store.import_tablet(f"{STORE}/tables", b"t")
    assert {path: bytes(inode.data) for path, inode in vfs.files.items()} == before


def small_export() -> tuple[CrashVfs, Rows]:
    vfs = CrashVfs()
    store = open_store(vfs, replace(TINY, memtable_bytes_max=1 << 20, block_bytes=256))
    tablet = store.create_tablet(b"t")
    rows = {b"k%02d" % n: b"%d" % n * 9 for n in range(40)}
    commit(store, tablet, list(rows.items()))
    store.flush()
    store.export_tablet(tablet, FAR)
    store.close()
    return vfs, rows


@pytest.mark.parametrize("kind", ["EXPORT", ".sst"])
def test_every_byte_of_an_export_that_is_wrong_is_named_and_nothing_is_left_behind(kind: str) -> None:
    vfs, rows = small_export()
    path = next(path for path in _inside(vfs, FAR) if path.endswith(kind))
    data = bytes(vfs.files[path].data)
    store = open_store(vfs)
    before = {path: bytes(inode.data) for path, inode in vfs.files.items()}
    chance = random.Random(5)
    for offset in range(len(data)):
        flipped = bytearray(data)
        flipped[offset] ^= 1 << chance.randrange(8)
        vfs.replace(path, bytes(flipped))
        with pytest.raises((Corruption, UnsupportedFormat)) as caught:
            store.import_tablet(FAR, b"t")
        assert path in str(caught.value), offset
        if kind == ".sst" and offset < len(data) - FOOTER_BYTES:
            assert isinstance(caught.value, Corruption)
            assert caught.value.offset <= offset < caught.value.offset + 400, caught.value
    for length in range(0, len(data), 7):
        vfs.replace(path, data[:length])
        with pytest.raises(Corruption, match=re.escape(path)):
            store.import_tablet(FAR, b"t")
    vfs.replace(path, data + b"x")
    with pytest.raises(Corruption, match=re.escape(path)):
        store.import_tablet(FAR, b"t")
    vfs.replace(path, data)
    assert {path: bytes(inode.data) for path, inode in vfs.files.items()} == before
    assert scan(store, store.import_tablet(FAR, b"t")) == rows


def test_a_missing_or_foreign_table_and_a_manifest_that_contradicts_itself_are_refused() -> None:
    vfs, _ = small_export()
    store = open_store(vfs)
    table = next(path for path in _inside(vfs, FAR) if path.endswith(".sst"))
    manifest = read_export(vfs, FAR)
    good = bytes(vfs.files[table].data)
    vfs.remove(table)
    with pytest.raises(Corruption, match="missing"):
        store.import_tablet(FAR, b"t")
    vfs.replace(table, bytes(len(good)))
    with pytest.raises(Corruption, match=re.escape(table)):
        store.import_tablet(FAR, b"t")
    vfs.replace(table, good)
    (level, meta), *_ = manifest.tables
    for tables, seqno in (
        ([(level, msg(meta, file_name="../store/CURRENT"))], 1),
        ([(99, meta)], 1),
        ([(1, meta), (1, meta)], 1),
        ([(level, meta)], 1 << 50),
        ([(level, msg(meta, count=meta.count + 1))], 1),
    ):
        wrong = ExportManifest(manifest.store_id, manifest.tablet, manifest.label, seqno, tables)
        vfs.replace(f"{FAR}/EXPORT", encode_export(wrong))
        with pytest.raises(Corruption):
            store.import_tablet(FAR, b"t")
    assert len(store.tablets) == 1


def msg(meta, **changes):  # type: ignore[no-untyped-def]
    import msgspec

    return msgspec.structs.replace(meta, **changes)


def test_an_export_of_a_newer_format_is_refused_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    vfs, _ = small_export()
    store = open_store(vfs)
    manifest = read_export(vfs, FAR)
    monkeypatch.setattr(tablet_export, "FORMAT_VERSION", 2)
    vfs.replace(f"{FAR}/EXPORT", encode_export(manifest))
    monkeypatch.undo()
    with pytest.raises(UnsupportedFormat, match="format version 2; this program knows version 1"):
        store.import_tablet(FAR, b"t")


def test_the_worked_example_is_right() -> None:
    text = (tablet_export.__doc__ or "").partition("(hex):")[2].partition("Fields")[0]
    example = bytes.fromhex("".join(text.split()))
    assert encode_export(ExportManifest(bytes(range(16)), 5, b"7", 9, [])) == example
    vfs = CrashVfs()
    vfs.make_dirs("/e")
    vfs.replace("/e/EXPORT", example)
    assert read_export(vfs, "/e").last_seqno == 9


@pytest.mark.parametrize("place", [NEAR, FAR])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_any_operation_of_an_export_may_fail_and_the_next_one_is_whole(place: str, code: int) -> None:
    vfs = CrashVfs()
    store, tablet, rows = filled(vfs, writes=60)
    for n in count(1):
        vfs.fail_at(vfs.operations + n, errno=code)
        seen = vfs.operations + n
        try:
            store.export_tablet(tablet, place)
        except StorageError:
            assert not store.health.poisoned
            vfs.fail_at(0)
            for path in _inside(vfs, place):  # what could not be removed
                assert "EXPORT" not in path
                vfs.remove(path)
        else:
            if vfs.operations < seen:
                break
            for path in _inside(vfs, place):
                vfs.remove(path)
    vfs.fail_at(0)
    assert n > 8 and scan(store, store.import_tablet(place, b"t")) == rows


@pytest.mark.parametrize("place", [NEAR, FAR])
def test_any_operation_of_an_import_may_fail_and_it_leaves_nothing(place: str) -> None:
    vfs = CrashVfs()
    store, tablet, rows = filled(vfs, writes=60)
    store.export_tablet(tablet, place)
    store.close()
    for n in count(1):
        world = vfs.crash(keep_everything)
        store = open_store(world, DEEP)
        files = table_paths(world)
        world.fail_at(world.operations + n)
        seen = world.operations + n
        try:
            number = store.import_tablet(place, b"t")
        except ShardKVError:
            if not store.health.poisoned:
                assert table_paths(world) == files and len(store.tablets) == 1
        else:
            if world.operations < seen:
                break
            assert scan(store, number) == rows
        with suppress(StorageError):
            store.close()
        world = world.crash(keep_everything)
        store = open_store(world, DEEP)
        assert [scan(store, number) for number in store.tablets] == [rows] * len(store.tablets)
        assert table_paths(world) - set(_inside(world, place)) == {
            f"{STORE}/tables/{name}" for name in store._state.table_names()
        }
        assert verify_store(world, STORE).problems == []
    assert n > 15 and len(store.tablets) == 2


def test_on_a_real_disk_files_are_linked_and_the_store_does_not_mind_what_becomes_of_the_export(tmp_path: Path) -> None:
    vfs = OsVfs()

    def opened(name: str) -> Store:
        return Store.open(str(tmp_path / name), DEEP, vfs=vfs, post=lambda call: call(), syncer=InlineSyncer())

    store = opened("one")
    tablet = store.create_tablet(b"t")
    rows = {b"k%03d" % n: b"%d" % n * 5 for n in range(300)}
    for key, value in rows.items():
        commit(store, tablet, [(key, value)])
    store.flush()
    export = tmp_path / "deep" / "export"
    store.export_tablet(tablet, str(export))
    assert all(path.stat().st_nlink == 2 for path in export.glob("*.sst"))
    store.close()
    other = opened("two")
    number = other.import_tablet(str(export), b"t")
    for path in export.iterdir():
        path.unlink()
    assert scan(other, number) == rows
    other.close()
    other = opened("two")
    assert scan(other, number) == rows
    other.close()


def test_exports_and_imports_run_in_other_threads_while_the_owner_goes_on(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path / "store"), DEEP, post=lambda call: call(), syncer=InlineSyncer())
    tablet = store.create_tablet(b"t")
    rows = {b"k%03d" % n: b"%d" % n * 5 for n in range(300)}
    for key, value in rows.items():
        commit(store, tablet, [(key, value)])
    store.flush()
    exports = [store.pin_export(tablet) for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        written = [
            threads.submit(export.write, str(tmp_path / f"export{number}")) for number, export in enumerate(exports)
        ]
        for key in rows:
            commit(store, tablet, [(key, b"newer")])
        store.flush()
        store.request_compaction()
        for number, export in enumerate(exports):
            written[number].result(30)
            export.close()
        imports = [store.begin_import(str(tmp_path / f"export{number}")) for number in range(4)]
        fetched = [threads.submit(found.fetch) for found in imports]
        for key in rows:
            commit(store, tablet, [(key, None)])
        store.flush()
        for done in fetched:
            done.result(30)
    numbers = [store.install_import(found, b"again") for found in imports]
    assert [scan(store, number) for number in numbers] == [rows] * 4 and scan(store, tablet) == {}
    store.close()
    assert verify_store(OsVfs(), str(tmp_path / "store")).problems == []


def test_an_import_that_was_fetched_and_given_up_leaves_nothing() -> None:
    vfs, _ = small_export()
    store = open_store(vfs)
    files = table_paths(vfs)
    found = store.begin_import(FAR)
    found.fetch()
    assert table_paths(vfs) > files
    found.abandon()
    assert table_paths(vfs) == files
    found = store.begin_import(FAR)
    found.fetch()
    store.close()
    store = open_store(vfs)  # sweeps
    assert table_paths(vfs) == files and len([name for name in store.recovery.swept if "tables/" in name]) == 1
