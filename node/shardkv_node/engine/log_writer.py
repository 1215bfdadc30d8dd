"""`LogWriter`: appends groups to one log segment or manifest. The format is in log_format.py.

Invariants:
  - the file has its header, its name and its directory entry on disk before the first group is appended;
  - `synced_offset` never runs ahead of what a finished sync covered, and each group carries its value.

It does not decide when to sync, and it never retries: after any error the caller must write nothing more.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence

import google_crc32c
import msgspec

from shardkv.errors import InvalidArgument, StorageError
from shardkv_node.engine.filenames import tmp_path
from shardkv_node.engine.log_format import (
    FORMAT_VERSION,
    GROUP_BYTES,
    GROUP_MAGIC,
    HEADER,
    HEADER_CRC,
    LOG_MAGIC,
    NO_SEGMENT,
    PAYLOAD_BYTES_MAX,
    PLACE,
    PLACED_GROUP,
)
from shardkv_node.engine.vfs import Vfs, WritableFile

JOINED_PAYLOADS = 1024
JOINED_PAYLOAD_BYTES = 4096
"""At most so many payloads, of at most so many bytes each, become one: 4 MiB."""
_NEVER = 1 << 62
_FIXARRAY = 0x90
_ARRAY32_HEAD = 0xDD
_ARRAY32 = struct.Struct(">BI")

_encode = msgspec.msgpack.Encoder().encode
_crc = google_crc32c.value
_pack_placed = PLACED_GROUP.pack
_PLACE_BYTES = PLACE.size


def file_header(magic: bytes, store_id: bytes, number: int, previous: tuple[int, int]) -> bytes:
    """The first bytes of a segment or manifest."""
    head = HEADER.pack(magic, FORMAT_VERSION, store_id, number, *previous)
    return head + HEADER_CRC.pack(_crc(head))


def join_payloads(payloads: Sequence[bytes]) -> list[bytes]:
    """The same entries in the same order in fewer payloads; those of sync marks, which are empty, fall away.

    For groups that become durable together: then it does not matter which entries share one.
    """
    joined: list[bytes] = []
    filled = list(filter(None, payloads))
    for low in range(0, len(filled), JOINED_PAYLOADS):
        part = filled[low : low + JOINED_PAYLOADS]
        heads = [payload[0] for payload in part]
        if max(map(len, part)) <= JOINED_PAYLOAD_BYTES and min(heads) >= _FIXARRAY and max(heads) <= _FIXARRAY + 15:
            count = sum(heads) - _FIXARRAY * len(heads)
            joined.append(_ARRAY32.pack(_ARRAY32_HEAD, count) + b"".join([payload[1:] for payload in part]))
        else:  # not worth it, or not how msgpack writes an array of up to 15
            joined += part
    return joined


class LogWriter:
    """One open segment. `offset` is where the next group goes; `number` is the segment's."""

    __slots__ = (
        "_ahead_bytes",
        "_file",
        "_mark_end",
        "_reserve_at",
        "_write",
        "hlc",
        "number",
        "offset",
        "path",
        "synced_offset",
    )

    def __init__(self, file: WritableFile, path: str, number: int, hlc: int) -> None:
        self._file = file
        self._write = file.write
        self.path = path
        self.number = number
        self.hlc = hlc
        self.offset = file.offset
        self.synced_offset = file.offset
        self._mark_end = 0
        self._ahead_bytes = 0
        """How much of the file is kept reserved ahead of `offset`, 0: nothing is."""
        self._reserve_at = _NEVER

    @classmethod
    def create(
        cls,
        vfs: Vfs,
        path: str,
        *,
        store_id: bytes,
        number: int,
        previous: tuple[int, int] = (NO_SEGMENT, 0),
        magic: bytes = LOG_MAGIC,
        payloads: Sequence[bytes] = (),
        hlc: int = 0,
    ) -> LogWriter:
        """Make the file at `path`, already holding `payloads` as groups; all of it is durable on return."""
        tmp = tmp_path(path)
        if vfs.exists(tmp):
            vfs.remove(tmp)
        file = vfs.create(tmp)
        try:
            file.write(file_header(magic, store_id, number, previous))
            writer = cls(file, path, number, hlc)
            for payload in payloads:
                writer.append_payload(payload, hlc)
            if payloads:
                file.sync()
                writer.note_synced(file.offset)
                writer.mark(hlc)
            file.sync()
            vfs.rename(tmp, path)
            vfs.sync_dir(os.path.dirname(path) or ".")
        except BaseException:
            file.close()
            raise
        writer.synced_offset = file.offset
        return writer

    def append(self, entries: Sequence[object], hlc: int) -> int:
        """As `append_payload`, for a group of these entries."""
        return self.append_payload(_encode(entries), hlc)

    def append_payload(self, payload: bytes, hlc: int) -> int:
        """Write one group with one call to the file; returns the offset of its end."""
        size = len(payload)
        if size > PAYLOAD_BYTES_MAX:
            raise InvalidArgument(
                f"A group of {size} bytes is over the {PAYLOAD_BYTES_MAX} the log allows. Write less at once."
            )
        offset = self.offset
        placed = _pack_placed(self.number, offset, GROUP_MAGIC, size, hlc, self.synced_offset, _crc(payload))
        self._write(placed[_PLACE_BYTES:] + _crc(placed).to_bytes(4, "little") + payload)
        self.hlc = hlc
        self.offset = end = offset + GROUP_BYTES + size
        if end > self._reserve_at:
            self._reserve()
        return end

    def reserve_ahead(self, size: int) -> None:
        """From now on have about `size` bytes of the file ready before they are written. For a log that is synced
        again and again: inside them a sync has only the bytes to bring to disk, not the length of the file."""
        self._ahead_bytes = size
        self._reserve()

    def _reserve(self) -> None:
        try:
            self._file.reserve(self.offset + self._ahead_bytes)
        except StorageError:  # no space for it, or no such file system: then the file grows write by write
            self._reserve_at = _NEVER
        else:
            self._reserve_at = self.offset + self._ahead_bytes * 3 // 4

    def trim(self) -> None:
        """End the file at `offset`. Nothing may be appended after it but a mark."""
        if self._ahead_bytes:
            self._reserve_at = _NEVER
            self._file.trim()

    def sync(self) -> None:
        """Make everything written so far durable. May run in another thread, beside nothing but reads."""
        self._file.sync()

    def note_synced(self, offset: int) -> None:
        """A finished sync covered the bytes before `offset`."""
        if offset > self.synced_offset:
            self.synced_offset = offset

    @property
    def needs_sync(self) -> bool:
        """It holds something that is not known to be on disk, other than a mark at its end."""
        return self.synced_offset < self.offset != self._mark_end

    def mark(self, hlc: int) -> None:
        """Append a sync mark. It need not be synced, but no later group may say that it was."""
        self._mark_end = self.append_payload(b"", hlc)

    def close(self) -> None:
        self._file.close()
