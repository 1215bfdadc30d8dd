"""Stores of every released format open and give the rows they held; those of a later format are refused.

`make_v1.py` says what is in `v1`.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import pytest

from shardkv.errors import UnsupportedFormat
from shardkv_node.engine import Engine
from shardkv_node.engine.tools.places import Kind
from shardkv_node.engine.tools.repair import repair_store
from shardkv_node.engine.tools.stats import store_stats
from shardkv_node.engine.tools.verify import verify_file, verify_store
from shardkv_node.engine.vfs import OsVfs
from tests.node.engine.store_driver import commit, scan
from tests.node.engine.tools.stores import image, open_at

GOLDEN = Path(__file__).parent / "v1"
FACTS = json.loads((GOLDEN / "rows.json").read_text())
ROWS = {
    int(tablet): {bytes.fromhex(key): (bytes.fromhex(value), version) for key, (value, version) in rows.items()}
    for tablet, rows in FACTS["rows"].items()
}


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "store", tmp_path / "store"))


def check(path: Path) -> None:
    """Everything the store must give, through every way to read it."""
    store = open_at(path)
    try:
        assert store.store_id.hex() == FACTS["store_id"]
        assert store.tablets == {int(tablet): label.encode() for tablet, label in FACTS["labels"].items()}
        for tablet, rows in ROWS.items():
            plain = {key: value for key, (value, _) in rows.items()}
            assert scan(store, tablet) == plain
            page = store.scan_page([tablet], b"", None, reverse=True)
            assert dict(zip(page.keys, page.values, strict=True)) == plain
            assert {key: store.get_versioned(tablet, key) for key in rows} == rows
            absent = [key for number in range(120) if (key := b"key%03d" % number) not in rows]
            assert absent and store.get_many(tablet, absent) == [None] * len(absent)
    finally:
        store.close()


def test_a_store_of_format_1_opens_and_gives_its_rows_and_versions(golden: Path) -> None:
    facts = store_stats(OsVfs(), str(golden))
    assert [[level["level"] for level in tablet["levels"]] for tablet in facts["tablets"]] == [[0, 1], [0, 1]]
    store = open_at(golden)
    assert len(store.recovery.torn_tails) == 1 and store.recovery.writes_replayed > 10
    store.close()
    check(golden)


def test_it_can_be_written_flushed_compacted_and_opened_again(golden: Path) -> None:
    store = open_at(golden)
    tablet = min(ROWS)
    write = commit(store, tablet, [(b"new", b"row"), (min(ROWS[tablet]), None)])
    assert write.version > max(version for _, version in ROWS[tablet].values()) and write.existed == [False, True]
    store.flush()
    store.request_compaction()
    store.close()
    store = open_at(golden)
    expected = {key: value for key, (value, _) in ROWS[tablet].items() if key != min(ROWS[tablet])}
    assert scan(store, tablet) == {**expected, b"new": b"row"}
    store.close()


def test_the_embedded_engine_opens_it(golden: Path) -> None:
    with Engine.open(golden, disk_reserve_bytes=0, workers=0) as engine:
        tablet = next(number for number, label in FACTS["labels"].items() if label == "default")
        assert dict(engine.scan()) == {key: value for key, (value, _) in ROWS[int(tablet)].items()}


def test_the_tools_find_nothing_wrong_and_repair_keeps_everything(golden: Path, tmp_path: Path) -> None:
    before = image(golden)
    assert verify_store(OsVfs(), str(golden)).problems == []
    assert repair_store(OsVfs(), str(golden), str(tmp_path / "repaired")).losses == []
    assert image(golden) == before
    check(tmp_path / "repaired")


def newer_identity(data: bytes) -> bytes:
    checked = b" ".join([b"shardkv-store", b"2", data.split()[2]])
    return checked + b" %08x\n" % google_crc32c.value(checked)


def newer_log(data: bytes) -> bytes:
    head = data[:8] + struct.pack("<I", 2) + data[12:52]
    return head + struct.pack("<I", google_crc32c.value(head)) + data[56:]


def newer_table(data: bytes) -> bytes:
    return data[:-12] + struct.pack("<I", 2) + data[-8:]


@pytest.mark.parametrize(
    ("pattern", "newer"),
    [("IDENTITY", newer_identity), ("MANIFEST-*", newer_log), ("wal/*.wal", newer_log), ("tables/*.sst", newer_table)],
)
def test_a_file_of_a_later_format_is_refused_with_a_sentence_and_nothing_is_lost(
    golden: Path, tmp_path: Path, pattern: str, newer: Callable[[bytes], bytes]
) -> None:
    path = sorted(golden.glob(pattern))[-1]
    whole = path.read_bytes()
    path.write_bytes(newer(whole))
    before = image(golden)
    with pytest.raises(UnsupportedFormat, match=r"has .*format (version )?2; this program knows .*1\. Open") as caught:
        open_at(golden)
    assert str(golden) in str(caught.value)
    if newer is newer_table:  # the manifest's checksum says that the version number is damage, and repair gets past it
        assert [problem.path for problem in verify_store(OsVfs(), str(golden)).problems] == [str(path)]
        repair_store(OsVfs(), str(golden), str(tmp_path / "repaired"))
        check(tmp_path / "repaired")
        with pytest.raises(UnsupportedFormat):
            verify_file(OsVfs(), Kind.TABLE, str(path))
        return
    for attempt in (
        lambda: verify_store(OsVfs(), str(golden)),
        lambda: repair_store(OsVfs(), str(golden), str(tmp_path / "repaired")),
    ):
        with pytest.raises(UnsupportedFormat):
            attempt()
    after = image(golden)
    kept = [name for name in before if not name.startswith(("MANIFEST", "CURRENT"))]
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    if path.exists():
        path.write_bytes(whole)
        check(golden)
