"""`Table`: reads one table file (table_format.py has the layout). Point look-ups, ordered chunks, verification.

Invariants:
  - A row is returned only out of a block whose checksum was right; anything wrong raises `Corruption` with path and
    offset. A table never answers "not there" because of damage.
  - In memory it holds the top index. Data blocks are in the shared `BlockCache`; so are partition blocks, or they stay
    with the table, as long as those of all tables are a small part of the cache.

Without a cache (jobs) it reads a whole partition at a time, once. Not thread-safe, like its cache.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from typing import Any, cast

import google_crc32c
import msgspec

from shardkv.errors import Corruption
from shardkv_node.engine import filter as key_filter
from shardkv_node.engine.block import Decompressor
from shardkv_node.engine.block_cache import BlockCache, columns_charge, index_charge
from shardkv_node.engine.columns import Columns
from shardkv_node.engine.open_files import OpenFiles
from shardkv_node.engine.table_format import (
    FOOTER_BYTES,
    PartitionBody,
    Properties,
    TopIndex,
    decode_footer,
)
from shardkv_node.engine.table_meta import TableMeta
from shardkv_node.engine.vfs import Vfs

_TAIL_BYTES = 16 * 1024
_VERIFY_BYTES = 256 * 1024
_decode_columns = msgspec.msgpack.Decoder(Columns).decode
_decode_partition = msgspec.msgpack.Decoder(PartitionBody).decode
_decode_index = msgspec.msgpack.Decoder(TopIndex).decode
_decode_properties = msgspec.msgpack.Decoder(Properties).decode


class Partition:
    """A decoded partition block."""

    __slots__ = ("filter", "last_keys", "offsets", "resident", "sizes")

    def __init__(self, body: PartitionBody, *, resident: bool = False) -> None:
        self.last_keys = body.last_keys
        self.offsets = body.offsets
        self.sizes = body.sizes
        self.filter: array[int] = key_filter.from_bytes(body.filter) or _EVERY_KEY
        """At least one word, see filter.py."""
        self.resident = resident
        """The table keeps it for as long as it is open."""


_EVERY_KEY = array("Q", [(1 << 64) - 1])
NOWHERE = Partition(PartitionBody([], [], [], bytes(8)), resident=True)
"""Has no key."""


class Table:
    """One open table; a `Source`. Made by `Table.open`."""

    __slots__ = (
        "_cache",
        "_cache_base",
        "_files",
        "_last_keys",
        "_offsets",
        "_open_block",
        "_reserved_bytes",
        "_resident",
        "_sizes",
        "_stops",
        "meta",
        "path",
        "properties",
    )

    def __init__(
        self,
        path: str,
        meta: TableMeta,
        cache: BlockCache | None,
        files: OpenFiles,
        decompressor: Decompressor,
        index: TopIndex,
        properties: Properties,
    ) -> None:
        self.path = path
        self.meta = meta
        self.properties = properties
        self._cache = cache
        self._cache_base = cache.new_base() if cache is not None else 0
        self._files = files
        self._open_block = decompressor.open_block
        self._last_keys, self._offsets, self._sizes = index.last_keys, index.offsets, index.sizes
        self._stops = [key + b"\0" for key in index.last_keys]
        self._resident: list[Partition | None] = [None] * len(index.offsets)
        self._reserved_bytes = 0

    @classmethod
    def open(
        cls,
        vfs: Vfs,
        path: str,
        meta: TableMeta,
        cache: BlockCache | None,
        files: OpenFiles | None = None,
    ) -> Table:
        """Open the table and check its size, its tail, and that it is the table `meta` describes.

        `files` bounds the descriptors of all tables that share it; without it the table keeps one for itself.
        Raises `Corruption`, `UnsupportedFormat`, `StorageError`.
        """
        files = files if files is not None else OpenFiles(vfs, 1)
        file = files.get(path)
        size = file.size()
        if size != meta.size:
            raise Corruption("Wrong size of a table", path=path, offset=0, expected=meta.size, got=size)
        tail_offset = max(0, size - _TAIL_BYTES)
        tail = file.pread(tail_offset, size - tail_offset)
        footer = decode_footer(tail[-FOOTER_BYTES:], path=path, file_size=size)
        if footer.index_offset < tail_offset:
            tail_offset = footer.index_offset
            tail = file.pread(tail_offset, size - tail_offset)
        decompressor = files.decompressor

        def part(offset: int, length: int) -> bytes:
            block = tail[offset - tail_offset : offset - tail_offset + length]
            return decompressor.open_block(block, path=path, offset=offset)

        index_body = part(footer.index_offset, footer.index_size)
        properties_body = part(footer.properties_offset, footer.properties_size)
        try:
            index, properties = _decode_index(index_body), _decode_properties(properties_body)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise _malformed(path, footer.index_offset, error) from error
        table = cls(path, meta, cache, files, decompressor, index, properties)
        table._check_tail(footer.index_offset)
        return table

    def close(self) -> list[Any]:
        """Close the descriptor and drop all cached blocks. Returns those: freeing many takes time."""
        self._files.close(self.path)
        if self._cache is None:
            return []
        held = [*self._cache.forget(self._cache_base), *self._resident]
        self._cache.release(self._reserved_bytes)
        self._reserved_bytes = 0
        self._resident = [None] * len(self._offsets)
        return held

    def find_in(self, partition: Partition, key: bytes) -> tuple[Columns, int] | None:
        """The block that holds the key and the row in it, deletes included; None when it is not here.

        Requires: the key is at or below the last key of this partition, and above that of the one before.
        """
        block = bisect_left(partition.last_keys, key)
        offset = partition.offsets[block]
        cache = self._cache
        columns = None if cache is None else cache.get(self._cache_base + offset)
        if columns is None:
            columns = self._load_block(offset, partition.sizes[block])
        keys = columns.keys
        row = bisect_left(keys, key)
        # A key at or below the last key of a partition is at or below that of a block and of a row: row is in range.
        return (columns, row) if keys[row] == key else None

    def chunks(self, start: bytes, stop: bytes | None, *, reverse: bool, hold: bool = True) -> Iterator[Columns]:
        """The rows with keys in [start, stop), a block at a time; see `Source`.

        `hold`: have the cache keep the blocks; without it, the cache lets go of those that end before `stop`.
        """
        last_keys = self._last_keys
        low = bisect_left(last_keys, start)
        # The first partition whose last key is >= stop may still hold keys below it; none after it does.
        high = len(last_keys) if stop is None else min(len(last_keys), bisect_left(last_keys, stop) + 1)
        numbers = range(low, high)
        for number in reversed(numbers) if reverse else numbers:
            for columns in self._partition_chunks(number, start, stop, reverse=reverse, hold=hold):
                first = 0 if columns.keys[0] >= start else bisect_left(columns.keys, start)
                end = len(columns.keys)
                if stop is not None and columns.keys[-1] >= stop:
                    end = bisect_left(columns.keys, stop)
                if first == 0 and end == len(columns.keys):
                    yield columns
                elif first < end:
                    yield columns.slice(first, end)

    def partition_ends(self) -> list[bytes]:
        """The last key of each partition, ascending."""
        return self._last_keys

    def partition_stops(self) -> tuple[list[bytes], int]:
        """The first key after each partition that has rows, ascending, and the number of the first of these."""
        return self._stops, 0

    def block_ends(self, start: bytes, stop: bytes) -> list[bytes]:
        """The last keys of data blocks that lie in [start, stop), ascending."""
        ends: list[bytes] = []
        for number in range(bisect_left(self._last_keys, start), len(self._last_keys)):
            last_keys = self.partition(number).last_keys
            ends += last_keys[bisect_left(last_keys, start) : bisect_left(last_keys, stop)]
            if last_keys[-1] >= stop:
                break
        return ends

    def points(self) -> Iterator[tuple[bytes, int]]:
        """Where the bytes of the file lie, from the top index alone: the last key of each partition and its size."""
        end = 0
        for last_key, offset, size in zip(self._last_keys, self._offsets, self._sizes, strict=True):
            yield last_key, offset + size - end
            end = offset + size

    def block_points(self, number: int) -> Iterator[tuple[bytes, int]]:
        """As `points`, for the data blocks of one partition, from its partition block; `number`: as `points` counts."""
        partition = self.partition(number)
        return zip(partition.last_keys, partition.sizes, strict=True)

    def verify(self) -> None:
        """Re-read the file and check every checksum, the order of the keys and the counts. Raises `Corruption`."""
        verify_file(self._files, self.path, self.meta)
        count, previous = 0, None
        for number in range(len(self._offsets)):
            partition = self._read_partition(number)
            for columns in self._read_partition_blocks(partition, 0, len(partition.offsets), reverse=False):
                keys = columns.keys
                if (previous is not None and keys[0] <= previous) or any(map(bytes.__ge__, keys, keys[1:])):
                    raise self._wrong("Keys out of order", partition.offsets[0], "ascending keys", keys[0])
                previous = keys[-1]
                count += len(keys)
        if count != self.meta.count:
            raise self._wrong("Wrong number of rows in a table", 0, self.meta.count, count)

    # --- blocks ---

    def partition(self, number: int) -> Partition:
        """Where the data blocks of a partition are, and its filter."""
        held = self._resident[number]
        if held is None and self._cache is not None:
            held = self._cache.get(self._cache_base + self._offsets[number])
        return self._load_partition(number) if held is None else held

    def _load_partition(self, number: int) -> Partition:
        """Read it and keep it: for good while all tables together have room for that, else in the cache."""
        partition = self._read_partition(number)
        if self._cache is not None:
            raw = sum(map(len, partition.last_keys)) + 8 * len(partition.filter)
            charge = index_charge(len(partition.offsets), raw)
            if self._cache.reserve(charge):
                self._reserved_bytes += charge
                self._resident[number] = partition
                partition.resident = True
            else:
                self._cache.put(self._cache_base + self._offsets[number], partition, charge)
        return partition

    def _data_block(self, offset: int, size: int, *, hold: bool) -> Columns:
        cache = self._cache
        held = None if cache is None else cache.get(self._cache_base + offset)
        return self._load_block(offset, size, hold=hold) if held is None else cast(Columns, held)

    def _load_block(self, offset: int, size: int, *, hold: bool = True) -> Columns:
        columns, raw_bytes = self._read_columns(self._files.get(self.path).pread(offset, size), offset)
        if hold and self._cache is not None:
            self._cache.put(self._cache_base + offset, columns, columns_charge(len(columns.keys), raw_bytes))
        return columns

    def _partition_chunks(
        self, number: int, start: bytes, stop: bytes | None, *, reverse: bool, hold: bool
    ) -> Iterator[Columns]:
        """The data blocks of one partition that may hold keys of [start, stop)."""
        partition = self.partition(number)
        last_keys = partition.last_keys
        low = bisect_left(last_keys, start)
        high = len(last_keys) if stop is None else min(len(last_keys), bisect_left(last_keys, stop) + 1)
        if self._cache is None:
            yield from self._read_partition_blocks(partition, low, high, reverse=reverse)
            return
        blocks = range(low, high)
        for block in reversed(blocks) if reverse else blocks:
            offset = partition.offsets[block]
            yield self._data_block(offset, partition.sizes[block], hold=hold)
            if not hold and stop is not None and last_keys[block] < stop:
                self._cache.drop(self._cache_base + offset)

    def _read_partition(self, number: int) -> Partition:
        offset = self._offsets[number]
        block = self._files.get(self.path).pread(offset, self._sizes[number])
        body = self._open_block(block, path=self.path, offset=offset)
        try:
            partition = Partition(_decode_partition(body))
        except (msgspec.MsgspecError, ValueError) as error:
            raise _malformed(self.path, offset, error) from error
        if not len(partition.last_keys) == len(partition.offsets) == len(partition.sizes) > 0:
            raise self._wrong("A partition block does not add up", offset, "equal lengths", "others")
        if partition.last_keys[-1] != self._last_keys[number]:
            raise self._wrong(
                "A partition block is not the one its index names",
                offset,
                self._last_keys[number],
                partition.last_keys[-1],
            )
        return partition

    def _read_partition_blocks(self, partition: Partition, low: int, high: int, *, reverse: bool) -> Iterator[Columns]:
        """Data blocks [low, high) of a partition by one read: they lie next to each other."""
        if low >= high:
            return
        base = partition.offsets[low]
        end = partition.offsets[high - 1] + partition.sizes[high - 1]
        span = self._files.get(self.path).pread(base, end - base)
        blocks = range(low, high)
        for block in reversed(blocks) if reverse else blocks:
            offset = partition.offsets[block]
            yield self._read_columns(span[offset - base : offset - base + partition.sizes[block]], offset)[0]

    def _read_columns(self, block: bytes, offset: int) -> tuple[Columns, int]:
        """The rows of a data block as read from the file, and the size of its raw body."""
        body = self._open_block(block, path=self.path, offset=offset)
        try:
            columns = _decode_columns(body)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise _malformed(self.path, offset, error) from error
        problem = columns.check() if columns.keys else "no rows"
        if problem is not None:
            raise self._wrong("A data block does not add up", offset, "equal columns", problem)
        return columns, len(body)

    def _check_tail(self, offset: int) -> None:
        """The properties must be those of the manifest: else the file is another table's."""
        if not len(self._last_keys) == len(self._offsets) == len(self._sizes) > 0:
            raise self._wrong("The index of a table does not add up", offset, "equal lengths", "others")
        got = msgspec.structs.astuple(self.properties)[:-1]
        expected = msgspec.structs.astuple(self.meta)[3 : 3 + len(got)]
        if expected != got:
            raise self._wrong("A table is not the one the manifest names", offset, expected, got)

    def _wrong(self, what: str, offset: int, expected: object, got: object) -> Corruption:
        return Corruption(what, path=self.path, offset=offset, expected=expected, got=got)


def verify_file(files: OpenFiles, path: str, meta: TableMeta) -> None:
    """Re-read a table file and compare its size and whole-file checksum. Raises `Corruption`."""
    crc, offset = 0, 0
    while data := files.get(path).pread(offset, _VERIFY_BYTES):
        crc = google_crc32c.extend(crc, data)
        offset += len(data)
    if offset != meta.size:
        raise Corruption("Wrong size of a table", path=path, offset=0, expected=meta.size, got=offset)
    if crc != meta.crc32c:
        raise Corruption(
            "Bad checksum of a table", path=path, offset=0, expected=f"{meta.crc32c:08x}", got=f"{crc:08x}"
        )


def _malformed(path: str, offset: int, error: Exception) -> Corruption:
    return Corruption("A block does not decode", path=path, offset=offset, expected="its columns", got=error)
