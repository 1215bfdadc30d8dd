"""The table file, format version 1: sorted rows of one tablet, one row per key, never changed after it was made.

    table      = partition+ top-index properties footer
    partition  = data-block+ partition-block
    data-block, partition-block, top-index, properties = block            see block.py for the frame

Raw bodies, msgpack:
    data-block       [keys, kinds, versions, expiries, values]            Columns, keys ascending through the file
    partition-block  [last_keys, offsets, sizes, filter]                  one entry per data block of the partition:
                     its last key, its offset in the file, its size; filter = words over the partition's keys
                     as bytes, see filter.py
    top-index        [last_keys, offsets, sizes]                          one entry per partition block
    properties       [tablet, first_key, last_key, min_version, max_version, count, tombstones, expiring,
                      raw_bytes, stored_bytes]                            stored_bytes: size of all partitions

    footer     = index_offset u64 | index_size u32 | properties_size u32 | check u32 | version u32 | magic 8 bytes
                 little-endian, 32 bytes; check = crc32c of the 16 bytes before it.
                 index_offset + index_size + properties_size + 32 = size of the file; nothing lies in between.

Worked example: tablet 5, one put of "k" -> "v" with version 7, no compression, no filter (hex):

    00 95 91 c4 01 6b 01 07 00 91 c4 01 76 31 5f c6 b5                     data block at 0
    00 94 91 c4 01 6b 91 00 91 11 c4 00 d4 f9 db 60                        partition block at 17
    00 93 91 c4 01 6b 91 11 91 10 54 22 66 c0                              top index at 33
    00 9a 05 c4 01 6b c4 01 6b 07 07 01 00 00 02 21 75 3f 5d 86            properties at 47
    21 00 00 00 00 00 00 00 0e 00 00 00 14 00 00 00 5d 3a 28 ff            footer at 67
    01 00 00 00 73 6b 76 74 62 6c 0d 0a

Index and filter are cut into partition blocks, so that they live in the same byte-bounded cache as data: only the
top index stays in memory, some 40 bytes for each 64 data blocks.

Whatever the version, the last 16 bytes are check, version, magic, and the check covers the 16 bytes before it: so a
damaged footer and a newer format can be told apart. The magic ends in CR LF: a copy in text mode breaks it.
Never renumber, never reorder: a new layout is a new format version.
"""

from __future__ import annotations

import struct

import google_crc32c
import msgspec

from shardkv.errors import Corruption, UnsupportedFormat

MAGIC = b"skvtbl\r\n"
FORMAT_VERSION = 1

PARTITION_BLOCKS = 64
"""A partition ends after this many data blocks..."""
PARTITION_BYTES = 512 * 1024
"""...or this many stored bytes, so that one read of a whole partition stays small."""

_FOOTER = struct.Struct("<QIIII8s")
_CHECKED = struct.Struct("<QII")
FOOTER_BYTES = _FOOTER.size


class TopIndex(msgspec.Struct, array_like=True, frozen=True, gc=False):
    last_keys: list[bytes]
    offsets: list[int]
    sizes: list[int]


class PartitionBody(msgspec.Struct, array_like=True, frozen=True, gc=False):
    last_keys: list[bytes]
    offsets: list[int]
    sizes: list[int]
    filter: bytes


class Properties(msgspec.Struct, array_like=True, frozen=True):
    tablet: int
    first_key: bytes
    last_key: bytes
    min_version: int
    max_version: int
    count: int
    tombstones: int
    expiring: int
    raw_bytes: int
    stored_bytes: int


class Footer(msgspec.Struct, frozen=True):
    index_offset: int
    index_size: int
    properties_size: int

    @property
    def properties_offset(self) -> int:
        return self.index_offset + self.index_size


def encode_footer(footer: Footer) -> bytes:
    fields = (footer.index_offset, footer.index_size, footer.properties_size)
    check = google_crc32c.value(_CHECKED.pack(*fields))
    return _FOOTER.pack(*fields, check, FORMAT_VERSION, MAGIC)


def decode_footer(data: bytes, *, path: str, file_size: int) -> Footer:
    """The footer in the last 32 bytes of the file, given as `data`.

    Raises `Corruption`, or `UnsupportedFormat` when a newer shardkv wrote the table.
    """
    offset = file_size - FOOTER_BYTES
    if len(data) != FOOTER_BYTES:
        raise Corruption(
            "A table is too short for its footer", path=path, offset=0, expected=FOOTER_BYTES, got=file_size
        )
    index_offset, index_size, properties_size, check, version, magic = _FOOTER.unpack(data)
    if magic != MAGIC:
        raise Corruption("Bad table magic", path=path, offset=file_size - 8, expected=MAGIC.hex(), got=magic.hex())
    got = google_crc32c.value(data[: _CHECKED.size])
    if got != check:
        raise Corruption("Bad footer checksum", path=path, offset=offset, expected=f"{check:08x}", got=f"{got:08x}")
    if version != FORMAT_VERSION:
        raise UnsupportedFormat(
            f"The table {path} has format version {version}; this program knows version {FORMAT_VERSION}.",
            detail={"path": path, "found": version, "known": FORMAT_VERSION},
            hint="Open the store with the shardkv that wrote it, or a newer one.",
        )
    if index_offset + index_size + properties_size != offset:
        raise Corruption(
            "The parts of a table do not add up to its size",
            path=path,
            offset=offset,
            expected=offset,
            got=index_offset + index_size + properties_size,
        )
    return Footer(index_offset, index_size, properties_size)
