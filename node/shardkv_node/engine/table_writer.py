"""`TableWriter`: makes one table file from rows that arrive in key order (table_format.py has the layout).

Invariant: after `finish` returned, the file is complete and its bytes are synced. Its name is not: the caller syncs the
directory, once for all tables of a job, before anyone refers to them.

Python runs per block here, never per row, except in the filter (one short step per key).
"""

from __future__ import annotations

import os
from array import array
from bisect import bisect_left
from collections.abc import Sequence

import google_crc32c
import msgspec

from shardkv.errors import InvalidArgument
from shardkv_node.engine import filter as key_filter
from shardkv_node.engine.block import Compressor
from shardkv_node.engine.columns import DELETE, EMPTY, Columns, collapse, concat, expand_u64, row_ends
from shardkv_node.engine.job import TableOptions
from shardkv_node.engine.table_format import (
    PARTITION_BLOCKS,
    PARTITION_BYTES,
    Footer,
    PartitionBody,
    Properties,
    TopIndex,
    encode_footer,
)
from shardkv_node.engine.table_meta import TableMeta
from shardkv_node.engine.vfs import Vfs

_WRITE_BYTES = 64 * 1024


class _BlockList:
    """Last key, offset and size of a sequence of blocks: what the two kinds of index hold."""

    __slots__ = ("last_keys", "offsets", "sizes", "stored_bytes")

    def __init__(self) -> None:
        self.last_keys: list[bytes] = []
        self.offsets: list[int] = []
        self.sizes: list[int] = []
        self.stored_bytes = 0

    def append(self, last_key: bytes, offset: int, size: int) -> None:
        self.last_keys.append(last_key)
        self.offsets.append(offset)
        self.sizes.append(size)
        self.stored_bytes += size


class TableWriter:
    """Writes one table. `add` rows in ascending order, then `finish`, or `abandon` to remove the file.

    Raises what the file seam raises; after any error the only thing left to do is `abandon`.
    """

    def __init__(self, vfs: Vfs, path: str, *, tablet: int, options: TableOptions) -> None:
        self._vfs = vfs
        self._path = path
        self._tablet = tablet
        self._options = options
        self._compressor = Compressor(options.codec)
        self._encode = msgspec.msgpack.Encoder().encode
        self._pending = EMPTY
        self._pending_bytes = 0
        self._partition = _BlockList()
        self._partition_keys: list[bytes] = []
        self._top = _BlockList()
        self._buffer: list[bytes] = []
        self._buffered_bytes = 0
        self._crc32c = 0
        self._first_key: bytes | None = None
        self._last_key: bytes | None = None
        self._min_version = 0
        self._max_version = 0
        self._count = self._tombstones = self._expiring = self._raw_bytes = 0
        self.stored_bytes = 0
        """Bytes of the file so far, without the rows that do not fill a block yet."""
        self._file = vfs.create(path)

    def add(self, columns: Columns, ends: Sequence[int] | None = None) -> None:
        """Add rows. Keys ascend and are greater than all added before. `ends`: their `row_ends`, if at hand."""
        if not columns.keys:
            return
        if self._last_key is not None and columns.keys[0] <= self._last_key:
            raise InvalidArgument(
                f"Rows for the table {self._path} are out of order: {columns.keys[0]!r} after {self._last_key!r}."
            )
        if self._first_key is None:
            self._first_key = columns.keys[0]
        self._last_key = columns.keys[-1]
        ends = row_ends(columns) if ends is None else ends
        self._count_rows(columns, ends[-1])
        self._write_full_blocks(columns, ends)

    def finish(self) -> TableMeta:
        """Complete and sync the file. Requires: at least one row was added."""
        if self._first_key is None or self._last_key is None:
            raise InvalidArgument(f"The table {self._path} would be empty.")
        if self._pending.keys:
            self._write_data_block(self._pending)
        self._end_partition()
        properties = Properties(
            self._tablet,
            self._first_key,
            self._last_key,
            self._min_version,
            self._max_version,
            self._count,
            self._tombstones,
            self._expiring,
            self._raw_bytes,
            self.stored_bytes,
        )
        index_offset = self.stored_bytes
        index_size = self._write_block(TopIndex(self._top.last_keys, self._top.offsets, self._top.sizes))
        properties_size = self._write_block(properties)
        self._write(encode_footer(Footer(index_offset, index_size, properties_size)))
        self._write_out()
        self._file.sync()
        self._file.close()
        return TableMeta(
            os.path.basename(self._path),
            self.stored_bytes,
            self._crc32c,
            *msgspec.structs.astuple(properties)[:-1],
        )

    def abandon(self) -> None:
        """Close and remove the file."""
        self._file.close()
        self._vfs.remove(self._path)

    def _count_rows(self, columns: Columns, raw_bytes: int) -> None:
        n = len(columns)
        self._raw_bytes += raw_bytes
        kinds, expiries = columns.kinds, columns.expiries
        versions = expand_u64(columns.versions, 1 if isinstance(columns.versions, int) else n)
        low, high = min(versions), max(versions)
        self._min_version = min(self._min_version, low) if self._count else low
        self._max_version = max(self._max_version, high)
        self._count += n
        if isinstance(kinds, int):
            self._tombstones += n if kinds == DELETE else 0
        else:
            self._tombstones += kinds.count(DELETE)
        if isinstance(expiries, int):
            self._expiring += n if expiries else 0
        else:
            self._expiring += n - array("Q", expiries).count(0)

    def _write_full_blocks(self, rows: Columns, ends: Sequence[int]) -> None:
        """Write all blocks that the rows left over and these fill; keep the rest of them."""
        block_bytes, n = self._options.block_bytes, len(ends)
        low, taken = 0, 0
        while low < n and self._pending_bytes + ends[-1] - taken >= block_bytes:
            high = bisect_left(ends, taken + block_bytes - self._pending_bytes, low) + 1
            self._write_data_block(self._after_pending(rows.slice(low, high)))
            self._pending, self._pending_bytes = EMPTY, 0
            low, taken = high, ends[high - 1]
        if low < n:
            self._pending = self._after_pending(rows.slice(low, n) if low else rows)
            self._pending_bytes += ends[-1] - taken

    def _after_pending(self, rows: Columns) -> Columns:
        return concat([self._pending, rows]) if self._pending.keys else rows

    def _write_data_block(self, rows: Columns) -> None:
        if not isinstance(rows.kinds, int):
            rows.kinds = collapse(rows.kinds, 1)
        if not isinstance(rows.versions, int):
            rows.versions = collapse(rows.versions, 8)
        if not isinstance(rows.expiries, int):
            rows.expiries = collapse(rows.expiries, 8)
        offset = self.stored_bytes
        size = self._write_block(rows)
        self._partition.append(rows.keys[-1], offset, size)
        self._partition_keys += rows.keys
        if len(self._partition.sizes) >= PARTITION_BLOCKS or self._partition.stored_bytes >= PARTITION_BYTES:
            self._end_partition()

    def _end_partition(self) -> None:
        blocks = self._partition
        if not blocks.sizes:
            return
        words = key_filter.build(self._partition_keys, self._options.filter_bits_per_key)
        offset = self.stored_bytes
        size = self._write_block(
            PartitionBody(blocks.last_keys, blocks.offsets, blocks.sizes, key_filter.to_bytes(words))
        )
        self._top.append(blocks.last_keys[-1], offset, size)
        self._partition = _BlockList()
        self._partition_keys = []

    def _write_block(self, content: msgspec.Struct) -> int:
        block = self._compressor.seal(self._encode(content), self.stored_bytes)
        self._write(block)
        return len(block)

    def _write(self, data: bytes) -> None:
        self._buffer.append(data)
        self.stored_bytes += len(data)
        self._buffered_bytes += len(data)
        if self._buffered_bytes >= _WRITE_BYTES:
            self._write_out()

    def _write_out(self) -> None:
        data = b"".join(self._buffer)
        self._crc32c = google_crc32c.extend(self._crc32c, data)
        self._file.write(data)
        self._buffer = []
        self._buffered_bytes = 0
