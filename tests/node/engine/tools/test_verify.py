"""`shardkv store verify`: a whole store passes, every kind of damage is named with its place, nothing is changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardkv_node.engine.log_format import HEADER_BYTES
from shardkv_node.engine.tools.places import Kind
from shardkv_node.engine.tools.verify import verify_file, verify_store
from shardkv_node.engine.vfs import OsVfs
from tests.node.engine.tools.stores import Made, copy_of, flip, image, killed_copy_of, make_store, places

VFS = OsVfs()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_store(tmp_path_factory.mktemp("verify") / "store")


def test_a_whole_store_passes_and_is_not_changed(whole: Made) -> None:
    before = image(whole.path)
    read = 0

    def progress(size: int) -> None:
        nonlocal read
        read += size

    report = verify_store(VFS, str(whole.path), progress)
    assert report.problems == [] and report.notes == []
    assert report.files == len(before)
    assert report.bytes == read == sum(map(len, before.values()))
    assert image(whole.path) == before


@pytest.mark.parametrize("pattern", ["IDENTITY", "CURRENT", "MANIFEST-*", "wal/*.wal", "tables/*.sst"])
def test_damage_in_any_kind_of_file_is_named(whole: Made, tmp_path: Path, pattern: str) -> None:
    made = copy_of(whole, tmp_path / "store")
    path = made.files(pattern)[-1]
    flip(path, path.stat().st_size // 2)
    before = image(made.path)
    report = verify_store(VFS, str(made.path))
    assert [problem.path for problem in report.problems] == [str(path)]
    assert image(made.path) == before


@pytest.mark.parametrize("pattern", ["IDENTITY", "CURRENT", "MANIFEST-*", "wal/*.wal", "tables/*.sst"])
def test_a_missing_file_is_named(whole: Made, tmp_path: Path, pattern: str) -> None:
    made = copy_of(whole, tmp_path / "store")
    path = made.files(pattern)[0]
    path.unlink()
    report = verify_store(VFS, str(made.path))
    assert places(report.problems) == [(str(path), 0)]
    assert "missing" in report.problems[0].problem


def test_every_damaged_block_and_group_is_named_not_only_the_first(whole: Made, tmp_path: Path) -> None:
    made = copy_of(whole, tmp_path / "store")
    table = max(made.files("tables/*.sst"), key=lambda path: path.stat().st_size)
    size = table.stat().st_size
    for offset in (3, size // 2, size * 3 // 4):
        flip(table, offset)
    log = made.files("wal/*.wal")[-1]
    flip(log, HEADER_BYTES + 40)
    flip(log, HEADER_BYTES + 700)
    report = verify_store(VFS, str(made.path))
    found = [problem for problem in report.problems if problem.path == str(table)]
    assert len(found) == 3
    assert found[0].offset == 0 and all("rows from" in problem.lost for problem in found)
    assert all(
        problem.offset <= at < problem.offset + problem.bytes
        for problem, at in zip(found, (3, size // 2, size * 3 // 4), strict=True)
    )
    assert len([problem for problem in report.problems if problem.path == str(log)]) == 2


def test_a_torn_tail_and_orphans_are_notes(whole: Made, tmp_path: Path) -> None:
    made = killed_copy_of(whole, tmp_path / "store")
    log = made.files("wal/*.wal")[-1]
    log.write_bytes(log.read_bytes() + b"half a group")
    (made.path / "tables" / "000999-00000000.sst").write_bytes(b"half a table")
    report = verify_store(VFS, str(made.path))
    assert report.problems == []
    assert any("torn tail of 12 bytes" in note for note in report.notes)
    assert any("000999-00000000.sst" in note for note in report.notes)


def test_what_a_killed_store_had_reserved_of_its_log_is_no_torn_tail(whole: Made, tmp_path: Path) -> None:
    made = killed_copy_of(whole, tmp_path / "store")
    log = made.files("wal/*.wal")[-1]
    log.write_bytes(log.read_bytes() + bytes(4096))
    report = verify_store(VFS, str(made.path))
    assert report.problems == [] and report.notes == []
    log.write_bytes(log.read_bytes()[:-4096] + b"half a group" + bytes(4096))
    assert any("torn tail of 12 bytes" in note for note in verify_store(VFS, str(made.path)).notes)


def test_one_file_can_be_verified_by_itself(whole: Made, tmp_path: Path) -> None:
    made = copy_of(whole, tmp_path / "store")
    for kind, pattern in (
        (Kind.TABLE, "tables/*.sst"),
        (Kind.SEGMENT, "wal/*.wal"),
        (Kind.MANIFEST, "MANIFEST-*"),
        (Kind.CURRENT, "CURRENT"),
        (Kind.IDENTITY, "IDENTITY"),
    ):
        path = made.files(pattern)[0]
        assert verify_file(VFS, kind, str(path)).problems == []
        flip(path, 5)
        assert [problem.path for problem in verify_file(VFS, kind, str(path)).problems] == [str(path)]
