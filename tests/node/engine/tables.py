"""Building blocks for the tests of tables: columns and tables out of plain dicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from shardkv_node.engine.block import CODEC_LZ4
from shardkv_node.engine.block_cache import BlockCache
from shardkv_node.engine.columns import DELETE, PUT, Columns, collapse, pack_u64
from shardkv_node.engine.job import TableOptions
from shardkv_node.engine.table_meta import TableMeta
from shardkv_node.engine.table_reader import Table
from shardkv_node.engine.table_writer import TableWriter
from shardkv_node.engine.vfs import Vfs

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
    found = table.find(key)
    if found is None:
        return "absent"
    columns, row = found
    assert columns.keys[row] == key
    return None if columns.kind(row) == DELETE else columns.values[row]


def open_table(vfs: Vfs, path: str, meta: TableMeta, *, cache_bytes: int | None = 1 << 20) -> Table:
    return Table.open(vfs, path, meta, None if cache_bytes is None else BlockCache(cache_bytes))
