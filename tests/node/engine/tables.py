"""Building blocks for the tests of tables: columns and tables out of plain dicts."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping

import msgspec

from shardkv_node.engine.block import CODEC_LZ4
from shardkv_node.engine.block_cache import BlockCache
from shardkv_node.engine.clipped_table import ClippedTable, view
from shardkv_node.engine.columns import DELETE, PUT, Columns, collapse, pack_u64
from shardkv_node.engine.job import TableOptions
from shardkv_node.engine.sorted_run import SortedRun
from shardkv_node.engine.table_lookup import TableLookup
from shardkv_node.engine.table_meta import TableMeta
from shardkv_node.engine.table_reader import Table
from shardkv_node.engine.table_writer import TableWriter
from shardkv_node.engine.vfs import Vfs
from tests.node.engine.crash_vfs import CrashVfs

Rows = Mapping[bytes, bytes | None]
"""Key -> value, or None for a delete."""


def columns_of(rows: Rows, *, version: int = 1) -> Columns:
    """The rows in key order; row i has version `version + i`."""
    keys = sorted(rows)
    kinds = bytes(DELETE if rows[key] is None else PUT for key in keys)
    return Columns(
        keys,
        collapse(kinds, 1),
        collapse(pack_u64(range(version, version + len(keys))), 8),
        0,
        [rows[key] or b"" for key in keys],
    )


def options(**changes: int) -> TableOptions:
    return TableOptions(**{"codec": CODEC_LZ4, "block_bytes": 256, **changes})


DEFAULT_OPTIONS = options()


def write_table(
    vfs: Vfs, path: str, rows: Rows, *, tablet: int = 1, version: int = 1, options: TableOptions = DEFAULT_OPTIONS
) -> TableMeta:
    writer = TableWriter(vfs, path, tablet=tablet, options=options)
    writer.add(columns_of(rows, version=version))
    return writer.finish()


def read_all(table: Table, *, reverse: bool = False) -> dict[bytes, bytes | None]:
    """Every row of the table by a scan, in the order of the chunks (rows ascend inside a chunk)."""
    return {key: value for chunk in table.chunks(b"", None, reverse=reverse) for key, value in rows_of(chunk)}


def rows_of(columns: Columns) -> Iterator[tuple[bytes, bytes | None]]:
    for index, key in enumerate(columns.keys):
        yield key, None if columns.kind(index) == DELETE else columns.values[index]


def value_in(table: Table, key: bytes) -> bytes | str | None:
    """The value, None for a delete, "absent" when the table has no such key."""
    found = TableLookup([table]).find(key)
    if found is None:
        return "absent"
    columns, row = found
    assert columns.keys[row] == key
    return None if columns.kind(row) == DELETE else columns.values[row]


def open_table(vfs: Vfs, path: str, meta: TableMeta, *, cache_bytes: int | None = 1 << 20) -> Table:
    return Table.open(vfs, path, meta, None if cache_bytes is None else BlockCache(cache_bytes))


KEYS = [b"%04d" % n for n in range(1500)]
"""Of the tables of a `TableWorld`."""


class TableWorld:
    """Tables over one cache, and what a reader should see of them."""

    def __init__(self, cache_bytes: int) -> None:
        self.vfs = CrashVfs()
        self.cache = BlockCache(cache_bytes)
        self.rows: dict[bytes, bytes | None] = {}
        self._tables = 0

    def table(self, rows: Rows, *, start: bytes = b"", stop: bytes | None = None) -> Table | ClippedTable:
        """A table of the rows, seen in [start, stop), newer than all tables made before."""
        path = f"/{self._tables:06d}-00000000.sst"
        self._tables += 1
        meta = write_table(self.vfs, path, rows, options=options(block_bytes=128))
        table = Table.open(self.vfs, path, meta, self.cache)
        self.rows |= {key: value for key, value in rows.items() if key >= start and (stop is None or key < stop)}
        return view(table, msgspec.structs.replace(meta, start=start, stop=stop))

    def expected(self, start: bytes, stop: bytes | None) -> list[tuple[bytes, bytes | None]]:
        wanted = sorted(key for key in self.rows if key >= start and (stop is None or key < stop))
        return [(key, self.rows[key]) for key in wanted if self.rows[key] is not None]


def some_rows(rng: random.Random, count: int) -> dict[bytes, bytes | None]:
    return {key: rng.randbytes(rng.randrange(40)) if rng.random() < 0.8 else None for key in rng.sample(KEYS, count)}


def overlapping_runs(world: TableWorld, rng: random.Random, *, clips: bool) -> list[SortedRun | Table | ClippedTable]:
    """A sorted level under three tables of level 0, oldest first. `clips`: its tables are parts of one."""
    bottom = some_rows(rng, 700)
    thirds = [(b"", KEYS[500]), (KEYS[500], KEYS[1000]), (KEYS[1000], None)]
    level = [
        world.table({key: value for key, value in bottom.items() if low <= key and (high is None or key < high)})
        if not clips
        else world.table(bottom, start=low, stop=high)
        for low, high in thirds
    ]
    young = [world.table(some_rows(rng, count)) for count in (300, 5)]
    young.append(world.table(some_rows(rng, 200), start=KEYS[200], stop=KEYS[900]))
    return [SortedRun(level), *young]
