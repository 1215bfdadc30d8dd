"""The background scrub: finds damage nobody has read yet, names it, keeps to its rate, and holds nobody up."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shardkv.errors import Corruption
from shardkv_node.engine import Engine
from shardkv_node.engine.scrub import Scrub
from shardkv_node.engine.table_meta import TableMeta
from shardkv_node.engine.vfs import OsVfs, ReadableFile
from tests.node.engine.tables import write_table


def until(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not met():
        assert time.monotonic() < deadline, "it did not happen in 10 s"
        time.sleep(0.005)


@pytest.fixture
def tables(tmp_path: Path) -> list[TableMeta]:
    (tmp_path / "tables").mkdir()
    rows = {b"key%04d" % n: b"value%d" % n * 3 for n in range(2000)}
    return [write_table(OsVfs(), str(tmp_path / "tables" / f"00000{n}-0000000a.sst"), rows) for n in range(1, 4)]


def scrub_of(directory: Path, tables: list[TableMeta], vfs: OsVfs | None = None, **options: float) -> Scrub:
    rate = int(options.pop("rate", 1 << 30))
    timing = {"start_delay_s": 0.0, "pass_interval_s": 0.0, **options}
    return Scrub(vfs or OsVfs(), str(directory), bytes_per_s=rate, tables=lambda: tables, **timing)


def damage(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(bytes(data))


def test_whole_tables_pass_again_and_again(tmp_path: Path, tables: list[TableMeta]) -> None:
    scrub = scrub_of(tmp_path, tables)
    scrub.start()
    until(lambda: scrub.stats()["scrub_passes"] >= 2)
    scrub.close()
    stats = scrub.stats()
    assert scrub.findings == {} and stats["scrub_corrupt_tables"] == 0
    assert stats["scrub_bytes"] >= 2 * sum(meta.size for meta in tables) and stats["scrub_tables"] >= 6


def test_damage_is_named_with_its_block_and_the_other_tables_are_still_read(
    tmp_path: Path, tables: list[TableMeta], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tables" / tables[1].file_name
    damage(path, path.stat().st_size // 2)
    scrub = scrub_of(tmp_path, tables, pass_interval_s=60.0)
    with caplog.at_level(logging.ERROR):
        scrub.start()
        until(lambda: scrub.stats()["scrub_passes"] == 1)
    scrub.close()
    assert list(scrub.findings) == [tables[1].file_name] and scrub.stats()["scrub_tables"] == 3
    found = scrub.findings[tables[1].file_name]
    assert isinstance(found, Corruption) and found.path == str(path)
    assert 0 < found.offset <= path.stat().st_size // 2
    assert f"table_corrupt file={tables[1].file_name} offset={found.offset}" in caplog.text


def test_a_table_that_was_removed_or_restored_is_no_finding_any_more(tmp_path: Path, tables: list[TableMeta]) -> None:
    first, second, third = (tmp_path / "tables" / meta.file_name for meta in tables)
    whole = first.read_bytes()
    for path in (first, second):
        damage(path, 100)
    third.unlink()
    scrub = scrub_of(tmp_path, tables)
    scrub.start()
    until(lambda: len(scrub.findings) == 3)
    del tables[1:]
    first.write_bytes(whole)
    until(lambda: not scrub.findings)
    scrub.close()


def test_it_keeps_to_its_rate_and_ends_at_once_when_told(tmp_path: Path, tables: list[TableMeta]) -> None:
    scrub = scrub_of(tmp_path, tables, rate=40_000.0)
    began = time.monotonic()
    scrub.start()
    until(lambda: scrub.stats()["scrub_bytes"] >= 20_000)
    took = time.monotonic() - began
    scrub.close()
    assert took >= 0.2
    assert time.monotonic() - began - took < 0.5
    assert scrub.stats()["scrub_bytes"] < 60_000


def test_a_disk_that_hangs_holds_nobody_up(tmp_path: Path) -> None:
    """The store works, and closes, while a read of the scrub does not come back."""
    vfs = HangingVfs()
    with Engine.open(tmp_path / "data", vfs=vfs, disk_reserve_bytes=0, workers=0, scrub_bytes_per_s=0) as engine:
        engine.put("a", "1")
        engine.flush()
        store = engine._store
        scrub = Scrub(
            vfs, store.directory, bytes_per_s=1 << 20, tables=store.maintenance.tables_in_force, start_delay_s=0.0
        )
        store.scrub = scrub
        scrub.start()
        assert vfs.hanging.wait(10)
        engine.put("b", "2")
        assert engine.get("a") == b"1" and engine.stats()["scrub_tables"] == 0
        vfs.go_on.set()
        until(lambda: engine.stats()["scrub_passes"] == 1)


def test_an_engine_scrubs_its_tables_and_off_means_off(tmp_path: Path) -> None:
    before = set(threading.enumerate())

    def scrubbing() -> int:
        return sum(thread.name == "shardkv-scrub" for thread in set(threading.enumerate()) - before)

    with Engine.open(tmp_path / "data", disk_reserve_bytes=0, workers=0) as engine:
        engine.put("a", "1")
        engine.flush()
        assert engine.stats()["scrub_passes"] == 0
        assert scrubbing() == 1
    with Engine.open(tmp_path / "data", disk_reserve_bytes=0, workers=0, scrub_bytes_per_s=0) as engine:
        assert not scrubbing()


class HangingVfs(OsVfs):
    """Reads of tables by the scrub's thread wait for `go_on`."""

    def __init__(self) -> None:
        self.hanging = threading.Event()
        self.go_on = threading.Event()

    def open_read(self, path: str) -> ReadableFile:
        if threading.current_thread().name == "shardkv-scrub":
            self.hanging.set()
            self.go_on.wait(10)
        return super().open_read(path)
