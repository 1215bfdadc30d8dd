"""Walks a table file from end to end, past damage. The layout is in table_format.py.

Where the index and a partition block are whole they say where the data blocks lie. Where they are not, blocks are
found by their checksums: a block ends where the checksum of what is before agrees with the four bytes that follow,
and the place of the block is in its checksum, so a chance hit is one in four thousand million.

Invariant: blocks come in file order, with keys that ascend from one to the next; what cannot be used is reported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import google_crc32c
import msgspec

from shardkv.errors import Corruption, UnsupportedFormat
from shardkv_node.engine.block import OVERHEAD_BYTES, Decompressor
from shardkv_node.engine.columns import Columns
from shardkv_node.engine.table_format import (
    FOOTER_BYTES,
    Footer,
    PartitionBody,
    Properties,
    TopIndex,
    decode_footer,
)
from shardkv_node.engine.table_meta import TableMeta
from shardkv_node.engine.tools.damage import Damage, damage_of, text_of
from shardkv_node.engine.tools.salvage_file import SalvageFile
from shardkv_node.engine.vfs import ReadableFile, Vfs

_READ_BYTES = 1 << 20
_decode_columns = msgspec.msgpack.Decoder(Columns).decode
_decode_partition = msgspec.msgpack.Decoder(PartitionBody).decode
_decode_index = msgspec.msgpack.Decoder(TopIndex).decode
_decode_properties = msgspec.msgpack.Decoder(Properties).decode
_MALFORMED = (msgspec.MsgspecError, UnicodeDecodeError, ValueError)

_BLOCK_START = re.compile(rb"\x00\x95[\x90-\x9f\xdc\xdd]|\x01[\s\S]{3}[\x00-\x0f][\s\S]\x95|\x02\x28\xb5\x2f\xfd")
"""How a data block may begin, by codec: its body is an array of 5; the frame of lz4 has its length, zstd a magic."""


@dataclass(frozen=True, slots=True)
class WalkedBlock:
    """One readable data block."""

    offset: int
    size: int
    columns: Columns


class TableWalk:
    """Reads one table. `footer`, `index` and `properties` are None where they are damaged.

    Raises `UnsupportedFormat` for a table of a newer format, `StorageError` when the file cannot be read at all.
    `meta`, what the manifest says of it, tells a newer format from a damaged version number.
    """

    def __init__(self, vfs: Vfs, path: str, meta: TableMeta | None = None) -> None:
        self.path = path
        self._meta = meta
        self.footer: Footer | None = None
        self.index: TopIndex | None = None
        self.properties: Properties | None = None
        self.damages: list[Damage] = []
        """What is wrong with the end of the file: footer, index, properties."""
        self._decompressor = Decompressor()
        self._last_key: bytes | None = None
        self._file: ReadableFile = SalvageFile(vfs, path)
        try:
            self.size = self._file.size()
            self._read_tail()
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        self._file.close()

    def steps(self) -> Iterator[WalkedBlock | Damage]:
        """Data blocks and damage, in file order. Closes the file at its end."""
        try:
            yield from self.damages
            if self.index is None:
                end = self.size - FOOTER_BYTES if self.footer is None else self.footer.index_offset
                yield from self._scanned_blocks(0, max(0, end))
                return
            base = 0
            for offset, size in zip(self.index.offsets, self.index.sizes, strict=False):
                yield from self._partition_blocks(base, offset, size)
                base = offset + size
        finally:
            self._file.close()

    def partitions(self) -> Iterator[tuple[int, int, PartitionBody | Damage]]:
        """(offset, size, contents) of each partition block, by the index."""
        if self.index is not None:
            for offset, size in zip(self.index.offsets, self.index.sizes, strict=False):
                yield offset, size, self._partition(offset, size)

    # --- the end of the file ---

    def _read_tail(self) -> None:
        try:
            tail = self._file.pread(max(0, self.size - FOOTER_BYTES), FOOTER_BYTES)
            footer = decode_footer(tail, path=self.path, file_size=self.size)
        except Corruption as error:
            self.damages.append(damage_of(error, self.path))
            return
        except UnsupportedFormat as error:
            if self._meta is None or self._whole_crc() == self._meta.crc32c:
                raise
            self.damages.append(damage_of(error, self.path))
            return
        self.footer = footer
        try:
            index = _decode_index(self._body(footer.index_offset, footer.index_size))
            if not len(index.offsets) == len(index.sizes) == len(index.last_keys):
                raise ValueError("its columns differ in length")
            self.index = index
        except (Corruption, *_MALFORMED) as error:
            self.damages.append(self._damage(error, footer.index_offset, footer.index_size, "the index"))
        try:
            self.properties = _decode_properties(self._body(footer.properties_offset, footer.properties_size))
        except (Corruption, *_MALFORMED) as error:
            self.damages.append(self._damage(error, footer.properties_offset, footer.properties_size, "the properties"))

    def _whole_crc(self) -> int:
        crc = 0
        for offset in range(0, self.size, _READ_BYTES):
            crc = google_crc32c.extend(crc, self._file.pread(offset, _READ_BYTES))
        return crc

    # --- blocks ---

    def _partition(self, offset: int, size: int) -> PartitionBody | Damage:
        try:
            body = _decode_partition(self._body(offset, size))
            if not len(body.offsets) == len(body.sizes) == len(body.last_keys):
                raise ValueError("its columns differ in length")
        except (Corruption, *_MALFORMED) as error:
            return self._damage(error, offset, size, "a partition block")
        return body

    def _partition_blocks(self, base: int, offset: int, size: int) -> Iterator[WalkedBlock | Damage]:
        """The data blocks of one partition, which lie in [base, offset), before its partition block."""
        partition = self._partition(offset, size)
        if isinstance(partition, Damage):
            yield partition
            yield from self._scanned_blocks(base, offset)
            return
        after = self._last_key
        for at, length, last_key in zip(partition.offsets, partition.sizes, partition.last_keys, strict=True):
            try:
                yield self._data_block(at, length, self._body(at, length))
            except (Corruption, *_MALFORMED) as error:
                since = "the first key" if after is None else f"after {text_of(after)}"
                yield self._damage(error, at, length, "a data block", f"rows from {since} up to {text_of(last_key)}")
            after = last_key

    def _data_block(self, offset: int, size: int, body: bytes) -> WalkedBlock:
        """Raises what is wrong with it."""
        columns = _decode_columns(body)
        problem = columns.check() if columns.keys else "no rows"
        if problem is not None:
            raise ValueError(problem)
        keys = columns.keys
        if (self._last_key is not None and keys[0] <= self._last_key) or any(map(bytes.__ge__, keys, keys[1:])):
            raise ValueError("its keys do not ascend")
        self._last_key = keys[-1]
        return WalkedBlock(offset, size, columns)

    def _scanned_blocks(self, base: int, end: int) -> Iterator[WalkedBlock | Damage]:
        """The data blocks found in [base, end) without an index."""
        data = self._file.pread(base, end - base)
        at = 0
        while at < len(data):
            size = _block_size(data, at, base + at)
            if size is None:
                match = _BLOCK_START.search(data, at + 1)
                while match is not None and _block_size(data, match.start(), base + match.start()) is None:
                    match = _BLOCK_START.search(data, match.start() + 1)
                behind = len(data) if match is None else match.start()
                since = "the first key" if self._last_key is None else f"after {text_of(self._last_key)}"
                yield Damage(self.path, base + at, behind - at, "no readable block", f"rows from {since} on")
                at = behind
                continue
            try:
                body = self._decompressor.open_block(data[at : at + size], path=self.path, offset=base + at)
                if _holds_rows(body):
                    yield self._data_block(base + at, size, body)
            except (Corruption, *_MALFORMED) as error:
                yield self._damage(error, base + at, size, "a data block")
            at += size

    def _body(self, offset: int, size: int) -> bytes:
        return self._decompressor.open_block(self._file.pread(offset, size), path=self.path, offset=offset)

    def _damage(self, error: Exception, offset: int, size: int, what: str, lost: str = "") -> Damage:
        if isinstance(error, Corruption):
            found = damage_of(error, self.path, size=size, lost=lost)
            return Damage(found.path, found.offset, size, f"{what}: {found.problem}", lost)
        return Damage(self.path, offset, size, f"{what} does not decode ({error})", lost)


def _holds_rows(body: bytes) -> bool:
    """It is a data block, not one of index or properties: those are arrays of another length."""
    return body[:1] == b"\x95"


def _block_size(data: bytes, at: int, offset: int) -> int | None:
    """Size of the block that begins at `data[at]`, which is `offset` of the file, or None."""
    if data[at] > 2:
        return None
    extend, mask = google_crc32c.extend, offset & 0xFFFFFFFF
    crc = google_crc32c.value(data[at : at + 1])
    for end in range(at + 1, len(data) - OVERHEAD_BYTES + 2):
        if crc ^ mask == int.from_bytes(data[end : end + 4], "little") and end > at + 1:
            return end + 4 - at
        crc = extend(crc, data[end : end + 1])
    return None
