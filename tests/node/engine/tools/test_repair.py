"""`shardkv store repair`: whatever is damaged, the new store opens, and holds all that could be read."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from shardkv.errors import InvalidArgument, StorageError, UnsupportedFormat
from shardkv_node.engine import Engine
from shardkv_node.engine.log_format import HEADER_BYTES
from shardkv_node.engine.tools.repair import RepairReport, put_in_place, repair_store
from shardkv_node.engine.tools.verify import verify_store
from shardkv_node.engine.vfs import OsVfs, ReadableFile, storage_error
from tests.node.engine.store_driver import commit
from tests.node.engine.tools.stores import SMALL, Made, copy_of, flip, image, make_store, open_at, rows_of, share_files

VFS = OsVfs()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_store(tmp_path_factory.mktemp("repair") / "store")


@pytest.fixture
def made(whole: Made, tmp_path: Path) -> Made:
    return copy_of(whole, tmp_path / "store")


def repair(made: Made) -> tuple[RepairReport, Path]:
    """Repairs; the damaged one must stay as it was, byte for byte."""
    before = image(made.path)
    target = made.path.with_name("repaired")
    report = repair_store(VFS, str(made.path), str(target))
    assert image(made.path) == before
    assert verify_store(VFS, str(target)).problems == []
    return report, target


def test_an_intact_store_comes_out_with_the_same_rows_id_labels_and_later_versions(made: Made) -> None:
    store = open_at(made.path)
    facts = store.store_id, store.tablets, store.term
    versions = {key: store.get_versioned(1, key) for key in made.rows[1]}
    store.close()
    report, target = repair(made)
    assert report.losses == [] and report.warnings == []
    assert report.rows == {tablet: len(rows) for tablet, rows in made.rows.items()}
    store = open_at(target)
    assert (store.store_id, store.tablets) == facts[:2] and store.term > facts[2]
    assert {key: store.get_versioned(1, key) for key in made.rows[1]} == versions
    store.close()
    assert rows_of(target) == made.rows


def test_only_the_rows_of_a_damaged_block_are_lost_and_their_range_is_said(made: Made) -> None:
    table = max(made.files("tables/*.sst"), key=lambda path: path.stat().st_size)
    flip(table, table.stat().st_size // 3)
    report, target = repair(made)
    assert [loss.path for loss in report.losses] == [str(table)]
    assert report.losses[0].lost.startswith("rows from after key")
    assert any("seen again" in warning for warning in report.warnings)
    found = rows_of(target)
    lost = {tablet: made.rows[tablet].keys() - found[tablet].keys() for tablet in made.rows}
    assert sum(map(len, lost.values())) < 10
    low, high = report.losses[0].lost.removeprefix("rows from after ").split(" up to ")
    for tablet, rows in made.rows.items():
        for key, value in rows.items():
            if not low < key.decode() <= high:
                assert found[tablet][key] == value


@pytest.mark.parametrize("part", ["footer", "index", "partition", "everything but the blocks"])
def test_blocks_are_found_without_the_index(made: Made, part: str) -> None:
    for table in made.files("tables/*.sst"):
        size = table.stat().st_size
        footer = table.read_bytes()[-32:]
        index = int.from_bytes(footer[:8], "little")
        if part in ("footer", "everything but the blocks"):
            flip(table, size - 30)
        if part in ("index", "everything but the blocks"):
            flip(table, index + 4)
        if part == "partition":
            flip(table, index - 10)
    report, target = repair(made)
    assert {loss.path for loss in report.losses} == set(map(str, made.files("tables/*.sst")))
    assert rows_of(target) == made.rows


def test_a_damaged_block_without_an_index_costs_that_block_only(made: Made) -> None:
    table = max(made.files("tables/*.sst"), key=lambda path: path.stat().st_size)
    flip(table, table.stat().st_size - 30)
    flip(table, 1000)
    _, target = repair(made)
    found = rows_of(target)
    assert sum(made.rows[t].get(k) != v for t in made.rows for k, v in made.rows[t].items() if k in found[t]) < 10
    assert sum(len(made.rows[t].keys() - found[t].keys()) for t in made.rows) < 10


def test_groups_behind_a_damaged_one_in_the_log_are_saved(made: Made) -> None:
    log = made.files("wal/*.wal")[-1]
    flip(log, HEADER_BYTES + 40)
    with pytest.raises(StorageError):
        open_at(made.path)
    report, target = repair(made)
    assert [(loss.path, loss.offset) for loss in report.losses] == [(str(log), HEADER_BYTES)]
    found = rows_of(target)
    wrong = [key for tablet in made.rows for key, value in made.rows[tablet].items() if found[tablet].get(key) != value]
    assert len(wrong) <= 1


@pytest.mark.parametrize("name", ["IDENTITY", "CURRENT"])
def test_small_files_are_made_anew(made: Made, name: str) -> None:
    (made.path / name).write_bytes(b"garbage")
    report, target = repair(made)
    assert [loss.path for loss in report.losses] == [str(made.path / name)]
    assert rows_of(target) == made.rows
    (made.path / name).unlink()
    target = made.path.with_name("again")
    repair_store(VFS, str(made.path), str(target))
    assert rows_of(target) == made.rows


def test_a_manifest_damaged_at_its_end_still_gives_labels_and_every_row(made: Made) -> None:
    manifest = made.files("MANIFEST-*")[0]
    store = open_at(made.path)  # the manifest now holds a snapshot, then edits
    store.flush()
    store.close()
    manifest = made.files("MANIFEST-*")[-1]
    flip(manifest, manifest.stat().st_size - 60)
    report, target = repair(made)
    assert str(manifest) in {loss.path for loss in report.losses}
    assert any("every table on disk was used" in warning for warning in report.warnings)
    store = open_at(target)
    assert store.tablets == {1: b"default", 2: b"7"}
    store.close()
    assert rows_of(target) == made.rows


def test_a_manifest_that_ends_before_a_tablet_was_created_is_not_believed(tmp_path: Path) -> None:
    """At the end of a group: there is no torn tail. Only the log knows the tablet."""
    made = make_store(tmp_path / "store")
    store = open_at(made.path)
    (manifest,) = made.files("MANIFEST-*")
    size = manifest.stat().st_size
    number = store.create_tablet(b"9")
    commit(store, number, [(b"key", b"value")])
    store.close()
    with manifest.open("r+b") as file:
        file.truncate(size)
    with pytest.raises(StorageError):
        open_at(made.path)
    report = repair_store(VFS, str(made.path), str(tmp_path / "repaired"), labels={number: b"9"})
    assert report.losses[0].path == str(manifest) and "ends too early" in report.losses[0].problem
    assert rows_of(tmp_path / "repaired") == {**made.rows, number: {b"key": b"value"}}


def test_a_first_segment_that_is_missing_is_a_loss(made: Made) -> None:
    log = made.files("wal/*.wal")[0]
    log.unlink()
    report, _ = repair(made)
    assert [(loss.path, loss.problem) for loss in report.losses] == [(str(log), "the log segment is missing")]


def test_a_torn_tail_of_the_manifest_that_nothing_acted_on_is_said_and_costs_nothing(made: Made) -> None:
    (manifest,) = made.files("MANIFEST-*")
    with manifest.open("ab") as file:
        file.write(b"half a group")
    (table, *_) = made.files("tables/*.sst")
    unfinished = table.with_name("000999-0badf00d.sst")
    unfinished.write_bytes(table.read_bytes()[:100])
    report, target = repair(made)
    assert report.losses == []
    assert any(f"{manifest} had a torn tail" in note and "1 tables" in note for note in report.warnings)
    assert rows_of(target) == made.rows


def test_without_a_manifest_the_labels_must_be_said(made: Made, tmp_path: Path) -> None:
    made.files("MANIFEST-*")[0].unlink()
    target = tmp_path / "repaired"
    with pytest.raises(InvalidArgument, match=r"labels of the tablets 1, 2 are lost.*--label"):
        repair_store(VFS, str(made.path), str(target))
    assert not target.exists()
    repair_store(VFS, str(made.path), str(target), labels={1: b"default", 2: b"7"})
    assert rows_of(target) == made.rows
    with Engine.open(target, workers=0, disk_reserve_bytes=0) as engine:
        assert dict(engine.scan()) == made.rows[1]


def test_an_embedded_store_without_manifest_needs_no_label(tmp_path: Path) -> None:
    with Engine.open(tmp_path / "store", disk_reserve_bytes=0, workers=0) as engine:
        engine.put("a", "1")
        engine.flush()
        engine.put("b", "2")
    for manifest in (tmp_path / "store").glob("MANIFEST-*"):
        manifest.unlink()
    report = repair_store(VFS, str(tmp_path / "store"), str(tmp_path / "repaired"))
    assert any("embedded" in warning for warning in report.warnings)
    with Engine.open(tmp_path / "repaired", disk_reserve_bytes=0, workers=0) as engine:
        assert dict(engine.scan()) == {b"a": b"1", b"b": b"2"}
        engine.put("c", "3")


def test_any_damage_anywhere_ends_in_a_store_that_opens(made: Made, tmp_path: Path) -> None:
    """Random damage: nothing that comes out was never put in."""
    whole = image(made.path)
    chance = random.Random(23)
    ever = {tablet: set(rows) for tablet, rows in made.rows.items()}
    for attempt in range(12):
        damaged = Made(tmp_path / f"damaged{attempt}", made.rows)
        for name, data in whole.items():
            spoiled = bytearray(data)
            for _ in range(chance.choice((0, 0, 1, 3))):
                spoiled[chance.randrange(len(spoiled))] ^= 1 << chance.randrange(8)
            path = damaged.path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if chance.random() < 0.95:
                path.write_bytes(bytes(spoiled))
        target = tmp_path / f"repaired{attempt}"
        try:
            repair_store(VFS, str(damaged.path), str(target), labels={1: b"default", 2: b"7"})
        except UnsupportedFormat:  # the manifest is damaged as well: nothing tells a damaged version from a newer one
            continue
        found = rows_of(target)
        for tablet, rows in found.items():
            assert all(
                key.startswith(b"key") and len({value[i : i + 6] for i in range(0, len(value), 6)}) <= 1
                for key, value in rows.items()
            )
            assert ever.keys() >= {tablet}


def test_a_sector_the_disk_cannot_read_costs_what_is_in_it(made: Made) -> None:
    table = max(made.files("tables/*.sst"), key=lambda path: path.stat().st_size)
    vfs = BadSectorVfs(str(table))
    report = repair_store(vfs, str(made.path), str(made.path.with_name("repaired")))
    assert {loss.path for loss in report.losses} == {str(table)}
    found = rows_of(made.path.with_name("repaired"))
    assert sum(found[t].get(k) != v for t in made.rows for k, v in made.rows[t].items()) > 0
    assert sum(len(rows) for rows in found.values()) > 200


def test_a_target_that_exists_is_left_alone_and_put_in_place_keeps_the_damaged_one(made: Made, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(InvalidArgument, match="exists already"):
        repair_store(VFS, str(made.path), str(tmp_path / "there"))
    before = image(made.path)
    report, target = repair(made)
    (tmp_path / "store.damaged").mkdir()
    kept = put_in_place(VFS, str(made.path), report.target)
    assert kept == str(tmp_path / "store.damaged-2")
    assert image(Path(kept)) == before and not target.exists()
    assert rows_of(made.path, SMALL) == made.rows


class BadSectorVfs(OsVfs):
    """Fails every read that touches the first 4 KiB of one file."""

    def __init__(self, path: str) -> None:
        self._path = path

    def open_read(self, path: str) -> ReadableFile:
        file = super().open_read(path)
        if path == self._path:
            whole = file.pread

            def pread(offset: int, size: int) -> bytes:
                if offset < 4096:
                    raise storage_error("read", path, OSError(5, "Input/output error"))
                return whole(offset, size)

            return _Patched(file, pread)
        return file


class _Patched:
    def __init__(self, file: ReadableFile, pread: object) -> None:
        self.path, self.size, self.close, self.pread = file.path, file.size, file.close, pread


@pytest.fixture
def split(made: Made) -> tuple[Made, dict[int, dict[bytes, bytes]]]:
    shared = share_files(made)
    return shared, shared.rows


def test_tablets_that_share_files_come_out_each_with_its_own_rows(split: tuple[Made, Any]) -> None:
    made, rows = split
    assert verify_store(VFS, str(made.path)).problems == []
    report, target = repair(made)
    assert report.losses == [] and rows_of(target) == rows
    assert report.rows == {tablet: len(found) for tablet, found in rows.items()}


def test_damage_in_a_shared_file_is_told_once_and_costs_its_rows_only(split: tuple[Made, Any]) -> None:
    made, rows = split
    store = open_at(made.path)
    left, right = (store._state.tablets[number].levels for number in (3, 4))
    store.close()
    ours = [meta.file_name for level in left for meta in level]
    shared = next(meta.file_name for level in right for meta in level if meta.file_name in ours)
    flip(made.path / "tables" / shared, 3)
    assert len(verify_store(VFS, str(made.path)).problems) == 1
    report, target = repair(made)
    assert len(report.losses) == 1 and report.losses[0].path.endswith(shared)
    found = rows_of(target)
    assert found[2] == rows[2] and found[5] == rows[5] and max(found[3]) < b"key150" <= min(found[4])
    assert len(found[3]) + len(found[4]) > 0.9 * (len(rows[3]) + len(rows[4]))


def test_a_damaged_manifest_still_tells_which_rows_are_whose(split: tuple[Made, Any]) -> None:
    """The last of its groups is destroyed: what the groups before say of shared files is enough."""
    made, rows = split
    store = open_at(made.path)
    store.create_tablet(b"an edit behind the snapshot")
    store.create_tablet(b"and the one that is destroyed")
    store.close()
    (manifest,) = made.files("MANIFEST-*")
    data = manifest.read_bytes()
    flip(manifest, data.index(b"and the one") + 3)
    report, target = repair(made)
    assert any("manifest was damaged" in warning for warning in report.warnings)
    found = rows_of(target)
    assert {tablet: found[tablet] for tablet in rows} == rows
