"""Merged tables: one scan over all tables of a tablet, whatever of it was kept from the scans before."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from shardkv.errors import Corruption
from shardkv_node.engine.columns import DELETE
from shardkv_node.engine.merged_tables import BLOCKS_PER_STRETCH, MergedTables
from shardkv_node.engine.table_reader import Table
from tests.node.engine.crash_vfs import CrashVfs
from tests.node.engine.tables import KEYS, TableWorld, open_table, overlapping_runs, rows_of, write_table


def scan(merged: MergedTables, start: bytes, stop: bytes | None, *, reverse: bool) -> list[tuple[bytes, bytes | None]]:
    chunks = list(merged.chunks(start, stop, reverse=reverse))
    rows = [row for chunk in (chunks[::-1] if reverse else chunks) for row in rows_of(chunk)]
    return [(key, value) for key, value in rows if value is not None]


@pytest.mark.parametrize("cache_bytes", [0, 30_000, 10_000_000])
@pytest.mark.parametrize("clips", [False, True])
def test_every_scan_gives_the_newest_rows_whatever_was_kept(cache_bytes: int, clips: bool) -> None:
    rng = random.Random(7)
    world = TableWorld(cache_bytes)
    merged = MergedTables(overlapping_runs(world, rng, clips=clips), world.cache)
    for turn in range(120):
        start, stop = sorted(rng.choices([b"", b"9", *KEYS, KEYS[7] + b"\0"], k=2))
        end = None if turn % 5 == 0 else stop
        assert scan(merged, start, end, reverse=turn % 2 == 1) == world.expected(start, end)
        assert world.cache.charged_bytes <= cache_bytes


def test_a_scan_over_what_was_scanned_before_reads_no_block_and_closing_gives_the_memory_back() -> None:
    world = TableWorld(10_000_000)
    merged = MergedTables(overlapping_runs(world, random.Random(3), clips=False), world.cache)
    for _ in range(3):
        scan(merged, b"", None, reverse=False)
    reserved = world.cache.reserved_bytes
    charged, misses = world.cache.charged_bytes, world.cache.misses
    for reverse in (False, True):
        scan(merged, b"", None, reverse=reverse)
    assert (world.cache.charged_bytes, world.cache.misses) == (charged, misses)
    merged.close()
    assert world.cache.charged_bytes < charged
    assert (left := world.cache.reserved_bytes) < reserved
    assert scan(merged, b"", None, reverse=False) == world.expected(b"", None)
    assert world.cache.reserved_bytes == left


@pytest.mark.parametrize("cache_bytes", [0, 30_000, 10_000_000])
@pytest.mark.parametrize("clips", [False, True])
def test_a_key_is_found_in_what_scans_kept_or_not_known_there(cache_bytes: int, clips: bool) -> None:
    rng = random.Random(13)
    world = TableWorld(cache_bytes)
    merged = MergedTables(overlapping_runs(world, rng, clips=clips), world.cache)
    assert not any(map(merged.find, KEYS))
    known = 0
    for turn in range(40):
        start, stop = sorted(rng.choices(KEYS, k=2))
        scan(merged, start, stop, reverse=turn % 2 == 1)
        for key in [*rng.sample(KEYS, 100), b"", KEYS[5] + b"x", b"9"]:
            found = merged.find(key)
            if found is not None:
                known += 1
                columns, row = found
                value = None if columns.kind(row) == DELETE else columns.values[row]
                assert value == world.rows.get(key)
    assert (known > 0) == (cache_bytes > 0)


def test_no_chunk_is_larger_than_a_few_blocks_however_uneven_the_runs() -> None:
    """New keys behind all old ones, and a desert of deletes: no run alone may say where stretches end."""
    world = TableWorld(10_000_000)
    old = world.table(dict.fromkeys(KEYS[:900], b"v" * 20))
    new = world.table(dict.fromkeys(KEYS[900:], b"v" * 20))
    deletes = world.table(dict.fromkeys(KEYS[100:600]))
    merged = MergedTables([old, new, deletes], world.cache)
    for reverse in (False, True):
        for _ in range(3):
            chunks = list(merged.chunks(b"", None, reverse=reverse))
            assert max(len(chunk.keys) for chunk in chunks) < 30 * BLOCKS_PER_STRETCH
            # As many rows as there are: a page over the desert must end after so many.
            assert sum(len(chunk.keys) for chunk in chunks) > 1400
            assert scan(merged, b"", None, reverse=reverse) == world.expected(b"", None)


def test_damage_is_told_by_each_scan_and_nothing_is_kept_of_it() -> None:
    world = TableWorld(10_000_000)
    one, two = world.table(dict.fromkeys(KEYS[:200], b"1")), world.table(dict.fromkeys(KEYS[100:300], b"2"))
    path = "/000001-00000000.sst"
    data = bytearray(world.vfs.read_all(path))
    data[40] ^= 1
    world.vfs.write_atomic(path, bytes(data))
    merged = MergedTables([one, Table.open(world.vfs, path, two.meta, world.cache)], world.cache)
    for _ in range(3):
        with pytest.raises(Corruption):
            _drain(merged.chunks(b"", None, reverse=False))


def _drain(chunks: Iterator[object]) -> None:
    for _ in chunks:
        pass


def test_tables_opened_alone_still_read_without_a_cache() -> None:
    vfs = CrashVfs()
    meta = write_table(vfs, "/000000-00000000.sst", dict.fromkeys(KEYS[:50], b"v"))
    table = open_table(vfs, "/000000-00000000.sst", meta, cache_bytes=None)
    assert table.block_ends(KEYS[0], KEYS[49] + b"\0")[-1] == KEYS[49] == table.partition_ends()[-1]
