"""The tools and the scrub on a store whose tablets share files through clips."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from shardkv_node.engine import filenames
from shardkv_node.engine.scrub import Scrub
from shardkv_node.engine.tools.compact import compact_store
from shardkv_node.engine.tools.dump import dump
from shardkv_node.engine.tools.places import Kind
from shardkv_node.engine.tools.stats import store_stats
from shardkv_node.engine.tools.verify import verify_store
from shardkv_node.engine.vfs import OsVfs
from tests.node.engine.tools.stores import SMALL, Made, flip, make_store, open_at, rows_of, share_files

VFS = OsVfs()


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return share_files(make_store(tmp_path / "store"))


def shared_file(made: Made) -> Path:
    store = open_at(made.path)
    names = [{meta.file_name for level in store._state.tablets[number].levels for meta in level} for number in (3, 4)]
    store.close()
    return made.path / "tables" / min(names[0] & names[1])


def test_verify_checks_a_shared_file_once(made: Made) -> None:
    report = verify_store(VFS, str(made.path))
    assert report.problems == [] and report.notes == []
    assert report.files == len([path for path in made.files("**/*") if path.is_file() and path.name != "LOCK"])
    flip(shared_file(made), 3)
    assert len(verify_store(VFS, str(made.path)).problems) == 1


def test_inspect_shows_the_clips_and_stats_count_a_shared_file_once(made: Made) -> None:
    items = list(dump(VFS, Kind.STORE, str(made.path)))
    clips = {(item["start"], item["stop"]) for item in items if item["what"] == "tables" for item in item["added"]}
    assert {("", "key150"), ("key150", None), ("", None)} >= clips and ("", "key150") in clips
    stats = store_stats(VFS, str(made.path))
    assert stats["bytes"] == sum(path.stat().st_size for path in made.files("tables/*.sst"))
    assert sum(tablet["bytes"] for tablet in stats["tablets"]) > stats["bytes"]


def test_compact_gives_each_tablet_files_of_its_own(made: Made) -> None:
    compact_store(VFS, str(made.path), lambda written, before: None, SMALL)
    assert rows_of(made.path) == made.rows
    store = open_at(made.path)
    metas = [meta for tablet in store._state.tablets.values() for level in tablet.levels for meta in level]
    store.close()
    assert len(metas) == len({meta.file_name for meta in metas}) and not any(meta.clipped for meta in metas)
    assert verify_store(VFS, str(made.path)).problems == []


def test_the_scrub_reads_a_shared_file_once_and_finds_its_damage(made: Made) -> None:
    damaged = shared_file(made)
    store = open_at(made.path)
    flip(damaged, 3)
    tables = store.maintenance.tables_in_force
    scrub = Scrub(VFS, str(made.path), bytes_per_s=1 << 30, tables=tables, start_delay_s=0.0, pass_interval_s=60.0)
    scrub.start()
    deadline = time.monotonic() + 10
    while scrub.stats()["scrub_passes"] < 1:
        assert time.monotonic() < deadline, "no pass in 10 s"
        time.sleep(0.005)
    scrub.close()
    store.close()
    assert list(scrub.findings) == [damaged.name]
    assert scrub.stats()["scrub_tables"] == len(list(Path(filenames.table_directory(str(made.path))).iterdir()))
