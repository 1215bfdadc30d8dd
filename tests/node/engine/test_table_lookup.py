"""Looking one key up in all tables: the newest row, whatever is held in memory, inside the bound of the cache."""

from __future__ import annotations

import random

import pytest

from shardkv_node.engine.block_cache import RESERVED_SHARE
from shardkv_node.engine.sorted_run import SortedRun
from shardkv_node.engine.table_lookup import TableLookup
from shardkv_node.engine.table_reader import Table
from tests.node.engine.tables import KEYS, TableWorld, overlapping_runs


@pytest.mark.parametrize("cache_bytes", [0, 8_000, 30_000, 10_000_000])
@pytest.mark.parametrize("clips", [False, True])
def test_a_lookup_finds_the_newest_row_whatever_is_held(cache_bytes: int, clips: bool) -> None:
    rng = random.Random(11)
    world = TableWorld(cache_bytes)
    lookup = TableLookup(overlapping_runs(world, rng, clips=clips)[::-1])
    absent = [key + b"x" for key in KEYS[::10]] + [b"", b"\xff"]
    for _ in range(2):
        wanted = KEYS + absent
        rng.shuffle(wanted)
        for key in wanted:
            found = lookup.find(key)
            assert (found is not None) == (key in world.rows)
            if found is not None:
                columns, row = found
                assert (columns.keys[row], columns.values[row]) == (key, world.rows[key] or b"")
            assert world.cache.charged_bytes <= cache_bytes
            assert world.cache.reserved_bytes <= cache_bytes // RESERVED_SHARE


@pytest.mark.parametrize("cache_bytes", [30_000, 10_000_000])
def test_what_tables_hold_for_good_goes_when_they_are_closed(cache_bytes: int) -> None:
    world = TableWorld(cache_bytes)
    runs = overlapping_runs(world, random.Random(2), clips=False)
    lookup = TableLookup(runs[::-1])
    for key in KEYS:
        lookup.find(key)
    assert 0 < world.cache.reserved_bytes < world.cache.charged_bytes
    for run in runs:
        for table in run.tables if isinstance(run, SortedRun) else [run]:
            (table if isinstance(table, Table) else table.table).close()
    assert world.cache.reserved_bytes == world.cache.charged_bytes == 0
    fresh = TableLookup(runs[::-1])
    assert all((fresh.find(key) is not None) == (key in world.rows) for key in KEYS)


def test_an_absent_key_costs_no_look_up_in_the_cache_once_the_filters_are_held() -> None:
    world = TableWorld(10_000_000)
    lookup = TableLookup(overlapping_runs(world, random.Random(2), clips=False)[::-1])
    absent = [key + b"x" for key in KEYS]
    for _ in range(2):
        before = world.cache.hits + world.cache.misses
        assert not any(map(lookup.find, absent))
        asked = world.cache.hits + world.cache.misses - before
    assert asked < 0.2 * len(absent)
