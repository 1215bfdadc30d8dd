"""Blocks: the framed, checksummed, maybe compressed pieces a table is made of.

    block   = codec u8 | body | check u32 LE
    codec   = 0 body is raw | 1 body is lz4: raw length u32 LE, lz4 block | 2 body is one zstd frame with its length
    check   = crc32c(codec body)  xor  (offset of the block in its file, low 32 bits)

The raw body is msgpack; what it holds depends on who points at it (see table_format.py); for a data block it is
`Columns` as an array: [keys, kinds, versions, expiries, values].

Worked example, one put of "k" -> "v" with version 7 and no compression, at offset 16 (hex, 17 bytes):

    example = 00 95 91 c4 01 6b 01 07 00 91 c4 01 76 21 5f c6 b5
        00                 codec 0
        95                 array of 5
        91 c4 01 6b        keys: [b"k"]
        01 07 00           kinds, versions, expiries: collapsed, all rows are PUT, version 7, no expiry
        91 c4 01 76        values: [b"v"]
        21 5f c6 b5        check

Why the offset is in the check: a block that a disk or a copy put in the wrong place is whole and has a right
crc; only its place tells. Codec numbers are on disk: never renumber.

Invariant: `open_block` returns exactly the bytes given to `seal_block` or raises `Corruption`; it never allocates more
than RAW_BYTES_MAX for a block, whatever the block claims.
"""

from __future__ import annotations

import struct

import google_crc32c
import lz4.block
import zstandard

from shardkv.errors import Corruption, InvalidArgument

CODEC_NONE = 0
CODEC_LZ4 = 1
CODEC_ZSTD = 2

RAW_BYTES_MAX = 256 * 1024 * 1024
"""No block is larger before compression. Far above block_bytes, because one row may be a large value."""

OVERHEAD_BYTES = 5
_U32 = struct.Struct("<I")
_U32_MASK = 0xFFFFFFFF
_CODECS = {codec: bytes((codec,)) for codec in (CODEC_NONE, CODEC_LZ4, CODEC_ZSTD)}
_ZSTD_LEVEL = 3


class Compressor:
    """Seals blocks with one codec. Holds codec state: one per thread."""

    def __init__(self, codec: int) -> None:
        if codec not in _CODECS:
            raise InvalidArgument(f"Unknown block codec {codec}: 0 is none, 1 is lz4, 2 is zstd.")
        self._codec = codec
        self._zstd = zstandard.ZstdCompressor(level=_ZSTD_LEVEL) if codec == CODEC_ZSTD else None

    def seal(self, raw: bytes, offset: int) -> bytes:
        """The block that holds `raw` at this offset of its file; uncompressed where compression does not pay."""
        if len(raw) > RAW_BYTES_MAX:
            raise InvalidArgument(f"A block of {len(raw)} bytes is over the limit of {RAW_BYTES_MAX}.")
        codec, body = CODEC_NONE, raw
        if self._codec == CODEC_LZ4:
            body = lz4.block.compress(raw)
        elif self._zstd is not None:
            body = self._zstd.compress(raw)
        if len(body) < len(raw):
            codec = self._codec
        else:
            body = raw
        framed = _CODECS[codec] + body
        return framed + _U32.pack(google_crc32c.value(framed) ^ (offset & _U32_MASK))


class Decompressor:
    """Opens blocks of any codec. Holds codec state: one per thread."""

    def __init__(self) -> None:
        self._zstd = zstandard.ZstdDecompressor()

    def open_block(self, block: bytes, *, path: str, offset: int) -> bytes:
        """The raw body of the block read at `offset` of `path`, or `Corruption`."""
        if len(block) <= OVERHEAD_BYTES:
            raise Corruption("A block is too short", path=path, offset=offset, expected="6 bytes", got=len(block))
        framed = block[:-4]
        check = google_crc32c.value(framed) ^ (offset & _U32_MASK)
        stored = _U32.unpack_from(block, len(framed))[0]
        if check != stored:
            raise Corruption(
                "Bad block checksum", path=path, offset=offset, expected=f"{stored:08x}", got=f"{check:08x}"
            )
        codec = framed[0]
        if codec == CODEC_NONE:
            return framed[1:]
        try:
            if codec == CODEC_LZ4:
                _check_raw_length(_U32.unpack_from(framed, 1)[0])
                raw: bytes = lz4.block.decompress(memoryview(framed)[1:])
                return raw
            if codec == CODEC_ZSTD:
                return self._open_zstd(framed)
        except (lz4.block.LZ4BlockError, zstandard.ZstdError, ValueError, struct.error) as error:
            raise Corruption(
                "A block does not decompress", path=path, offset=offset, expected="valid data", got=error
            ) from error
        raise Corruption("Unknown block codec", path=path, offset=offset, expected="0, 1 or 2", got=codec)

    def _open_zstd(self, framed: bytes) -> bytes:
        body = memoryview(framed)[1:]
        _check_raw_length(zstandard.frame_content_size(body))
        return self._zstd.decompress(body)


def _check_raw_length(length: int) -> None:
    # zstd reports an unknown length as -1.
    if not 0 <= length <= RAW_BYTES_MAX:
        raise ValueError(f"the block claims {length} bytes, the limit is {RAW_BYTES_MAX}")
