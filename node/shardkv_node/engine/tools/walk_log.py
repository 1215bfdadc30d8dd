"""Walks a log segment or manifest from end to end, past damage. The format is in log_format.py.

`SegmentReader` stops at the first thing that is wrong, as it must. The walk goes on behind it: a group header has a
checksum that covers the place where it lies, so a stretch of bytes that passes for one is one.
Invariant: groups come in file order; every byte behind the header is in a group, in a `Damage` or in the `TornTail`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import google_crc32c
import msgspec

from shardkv.errors import Corruption
from shardkv_node.engine import filenames
from shardkv_node.engine.entries import WriteEntry, shape_error
from shardkv_node.engine.log_format import (
    GROUP,
    GROUP_BYTES,
    GROUP_CRC,
    GROUP_MAGIC,
    GROUP_MAGIC_BYTES,
    HEADER_BYTES,
    LOG_MAGIC,
    PLACE,
)
from shardkv_node.engine.log_reader import FileHeader, TornTail, parse_file_header, without_reserve
from shardkv_node.engine.manifest import Edit
from shardkv_node.engine.tools.damage import Damage, damage_of
from shardkv_node.engine.tools.salvage_file import SalvageFile
from shardkv_node.engine.vfs import ReadableFile, Vfs

_WINDOW_BYTES = 1 << 20

EDIT_DECODER: msgspec.msgpack.Decoder[list[Edit]] = msgspec.msgpack.Decoder(list[Edit])
"""For manifests; `log_reader.ENTRY_DECODER` is that for segments."""
E = TypeVar("E")


@dataclass(frozen=True, slots=True)
class WalkedGroup(Generic[E]):
    """One readable group and its entries; no entries in a sync mark."""

    offset: int
    end: int
    hlc: int
    synced_offset: int
    entries: list[E]


class LogWalk(Generic[E]):
    """Reads one file. `header` is None, and `header_damage` set, when the header is damaged.

    `end`: where the file's valid part ends, when its successor says so; None: it is the last one and may have a torn
    tail. Raises `UnsupportedFormat` for a file of a newer format.
    """

    def __init__(
        self,
        vfs: Vfs,
        path: str,
        *,
        decoder: msgspec.msgpack.Decoder[list[E]],
        magic: bytes = LOG_MAGIC,
        end: int | None = None,
    ) -> None:
        self.path = path
        self.header: FileHeader | None = None
        self.header_damage: Damage | None = None
        self._decoder = decoder
        self._end = end
        self._file: ReadableFile = SalvageFile(vfs, path)
        try:
            self.size = self._file.size()
            try:
                self.header = parse_file_header(self._file, path, magic)
            except Corruption as error:
                self.header_damage = damage_of(error, path, size=min(HEADER_BYTES, self.size))
        except BaseException:
            self._file.close()
            raise
        self._limit = self.size if end is None else min(end, self.size)
        self._number = self.header.number if self.header is not None else _number_in_name(path)

    def close(self) -> None:
        self._file.close()

    def steps(self) -> Iterator[WalkedGroup[E] | Damage | TornTail]:
        """What the file holds, in order. Closes the file at its end."""
        try:
            if self.header_damage is not None:
                yield self.header_damage
            at = HEADER_BYTES
            while at < self._limit:
                found = self._group_at(at)
                if not isinstance(found, str):
                    yield found
                    at = found.end
                    continue
                if self._end is None and not self._claimed_behind(at):
                    torn_bytes = len(without_reserve(self._file.pread(at, self._limit - at)))
                    if torn_bytes:
                        yield TornTail(self.path, at, torn_bytes, found)
                    return
                behind = self._next_group(at)
                yield Damage(self.path, at, behind - at, found)
                at = behind
            if self._end is not None and self.size < self._end:
                yield Damage(
                    self.path, self.size, self._end - self.size, f"the file ends before {self._end}, where it should"
                )
        finally:
            self._file.close()

    def _group_at(self, offset: int) -> WalkedGroup[E] | str:
        head = self._file.pread(offset, min(GROUP_BYTES, self._limit - offset))
        if not self._header_ok(head, offset):
            return "a group header fails its checksum"
        _, payload_bytes, hlc, synced_offset, payload_crc = GROUP.unpack_from(head)
        end = offset + GROUP_BYTES + payload_bytes
        if end > self._limit:
            return f"a group of {payload_bytes} bytes is cut off"
        payload = self._file.pread(offset + GROUP_BYTES, payload_bytes) if payload_bytes else b""
        if payload and google_crc32c.value(payload) != payload_crc:
            return "the payload of a group fails its checksum"
        try:
            found = self._decoder.decode(payload) if payload else []
        except msgspec.DecodeError as error:
            return f"a group holds no known entries ({error})"
        for entry in found:
            problem = shape_error(entry) if isinstance(entry, WriteEntry) else None
            if problem is not None:
                return f"an entry contradicts itself: {problem}"
        return WalkedGroup(offset, end, hlc, synced_offset, found)

    def _header_ok(self, head: bytes, offset: int) -> bool:
        if len(head) < GROUP_BYTES or GROUP.unpack_from(head)[0] != GROUP_MAGIC:
            return False
        crc = google_crc32c.extend(google_crc32c.value(PLACE.pack(self._number, offset)), head[: GROUP.size])
        return bool(crc == GROUP_CRC.unpack_from(head, GROUP.size)[0])

    def _headers_behind(self, bad: int) -> Iterator[tuple[int, int]]:
        """(offset, synced offset) of every readable group header behind `bad`."""
        start = bad + 1
        while start < self._limit:
            window = self._file.pread(start, min(_WINDOW_BYTES + GROUP_BYTES, self._limit - start))
            at = window.find(GROUP_MAGIC_BYTES)
            while 0 <= at < _WINDOW_BYTES:
                head = window[at : at + GROUP_BYTES]
                if self._header_ok(head, start + at):
                    yield start + at, GROUP.unpack_from(head)[3]
                at = window.find(GROUP_MAGIC_BYTES, at + 1)
            start += _WINDOW_BYTES

    def _claimed_behind(self, bad: int) -> bool:
        """Something behind says that bytes past `bad` were on disk: then they are damaged, not torn."""
        return any(bad < synced_offset <= offset for offset, synced_offset in self._headers_behind(bad))

    def _next_group(self, bad: int) -> int:
        return next((offset for offset, _ in self._headers_behind(bad)), self._limit)


def _number_in_name(path: str) -> int:
    name = os.path.basename(path)
    return filenames.parse_segment_name(name) or filenames.parse_manifest_name(name) or 0
