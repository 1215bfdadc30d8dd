"""Reads log segments and manifests, and tells a torn tail from damage. The format is in log_format.py.

The rule: a group that cannot be read is a *torn tail* only when it may never have been on disk, that is, when
nothing in the file says it was synced, and the file is the last one. Everything else is `Corruption`, with the
place; no group is ever skipped. Concretely, with the first bad byte at B:
  - in a segment whose end is known (its successor names it), anything bad before that end is corruption;
  - in the last one, a readable group header behind B that claims bytes past B were synced makes it corruption;
  - zeros from B to its end are no group but what was reserved ahead: the log ends at B;
  - otherwise the bytes from B on are a torn tail.

It holds at most one window of the file in memory, or one group if that is larger. Groups are read a window at once;
what is not plainly in order there is looked at alone, and judged.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

import google_crc32c
import msgspec

from shardkv.errors import Corruption, StoreMismatch, UnsupportedFormat
from shardkv_node.engine.entries import Entry
from shardkv_node.engine.log_format import (
    FORMAT_VERSION,
    GROUP,
    GROUP_BYTES,
    GROUP_CRC,
    GROUP_MAGIC,
    GROUP_MAGIC_BYTES,
    HEADER,
    HEADER_BYTES,
    HEADER_CRC,
    LOG_MAGIC,
    PLACE,
    PLACED_GROUP,
    WHOLE_GROUP,
)
from shardkv_node.engine.vfs import ReadableFile, Vfs

_WINDOW_BYTES = 1 << 17
_WITNESS = "the next segment, or the manifest of the closed store,"
"""Of the file. With a larger one, what was decoded leaves the caches of the processor before it is used."""
_crc = google_crc32c.value
_extend_crc = google_crc32c.extend
_unpack_group = WHOLE_GROUP.unpack_from
_pack_placed = PLACED_GROUP.pack

ENTRY_DECODER: msgspec.msgpack.Decoder[list[Entry]] = msgspec.msgpack.Decoder(list[Entry])

E = TypeVar("E")


class FileHeader(msgspec.Struct, frozen=True, gc=False):
    """The header of a segment or manifest."""

    store_id: bytes
    number: int
    previous_number: int
    previous_end: int


class Group(msgspec.Struct, frozen=True, gc=False):
    """One readable group: where it starts and ends, and its undecoded payload (b"" for a sync mark)."""

    offset: int
    end: int
    hlc: int
    synced_offset: int
    payload: bytes


class GroupRun(msgspec.Struct, gc=False):
    """Readable groups, each directly behind the one before; one list per field of `Group`."""

    offsets: list[int]
    hlcs: list[int]
    synced_offsets: list[int]
    payloads: list[bytes]
    end: int
    """Of the last one."""

    def ends(self) -> list[int]:
        return [*self.offsets[1:], self.end]


class TornTail(msgspec.Struct, frozen=True, gc=False):
    """Bytes at the end of the last segment that were never known to be on disk, and were dropped."""

    path: str
    offset: int
    bytes: int
    problem: str


class SegmentReader(Generic[E]):
    """Reads one file. After `groups()` ended, `valid_end`, `synced_end` and `torn_tail` say what was found.

    `end`: the file must be valid up to here and is not read further; None: it is the last one, see the module.
    """

    def __init__(
        self,
        vfs: Vfs,
        path: str,
        *,
        decoder: msgspec.msgpack.Decoder[list[E]],
        end: int | None = None,
        magic: bytes = LOG_MAGIC,
    ) -> None:
        self._file = vfs.open_read(path)
        self.path = path
        self.torn_tail: TornTail | None = None
        self._decoder = decoder
        self._end = end
        try:
            self._size = self._file.size()
            self.header = parse_file_header(self._file, path, magic)
        except BaseException:
            self._file.close()
            raise
        if end is not None and not HEADER_BYTES <= end <= self._size:
            self._file.close()
            raise Corruption(
                "A log segment is shorter than it was",
                path=path,
                offset=self._size,
                expected=f"{end} bytes, as {_WITNESS} says",
                got=f"{self._size} bytes",
            )
        self._limit = self._size if end is None else end
        self.valid_end = HEADER_BYTES
        self.synced_end = HEADER_BYTES
        """Known to be on disk: the largest claim of the groups read so far."""
        self._window = b""
        self._window_start = 0

    def close(self) -> None:
        self._file.close()

    def groups(self) -> Iterator[Group]:
        """The groups in order, sync marks included. Raises `Corruption`."""
        for run in self.runs():
            yield from map(Group, run.offsets, run.ends(), run.hlcs, run.synced_offsets, run.payloads)

    def runs(self) -> Iterator[GroupRun]:
        """As `groups`, as many at once as fit in a window. None is empty."""
        while self.valid_end < self._limit:
            run = self._run_at(self.valid_end)
            if not run.offsets:
                found = self._group_at(self.valid_end)
                if isinstance(found, str):
                    self._judge(found)
                    return
                run = GroupRun([found.offset], [found.hlc], [found.synced_offset], [found.payload], found.end)
            self.valid_end = run.end
            self.synced_end = max(self.synced_end, *run.synced_offsets)
            yield run

    def decode_run(self, run: GroupRun) -> list[list[E]]:
        """As `decode` for each group."""
        decode = self._decoder.decode
        try:
            return [decode(payload) if payload else [] for payload in run.payloads]
        except msgspec.DecodeError:
            groups = map(Group, run.offsets, run.ends(), run.hlcs, run.synced_offsets, run.payloads)
            return list(map(self.decode, groups))  # raises, and says where

    def decode(self, group: Group) -> list[E]:
        """The entries of a group. Raises `Corruption` for a payload that passes its checksum and is no such list."""
        try:
            return self._decoder.decode(group.payload) if group.payload else []
        except msgspec.DecodeError as error:
            raise Corruption(
                "A log group holds no known entries",
                path=self.path,
                offset=group.offset,
                expected="a msgpack array of entries",
                got=str(error),
            ) from error

    def _run_at(self, offset: int) -> GroupRun:
        """The groups from `offset` on that lie in one window and pass every check; maybe none."""
        window = self._read(offset, _WINDOW_BYTES)
        number, length = self.header.number, len(window)
        offsets: list[int] = []
        hlcs: list[int] = []
        claims: list[int] = []
        payloads: list[bytes] = []
        at = 0
        while at + GROUP_BYTES <= length:
            magic, payload_bytes, hlc, claim, payload_crc, header_crc = _unpack_group(window, at)
            place, start = offset + at, at + GROUP_BYTES
            end = start + payload_bytes
            if magic != GROUP_MAGIC or claim > place or end > length:
                break
            if _crc(_pack_placed(number, place, magic, payload_bytes, hlc, claim, payload_crc)) != header_crc:
                break
            payload = window[start:end]
            if _crc(payload) != payload_crc:
                break
            offsets.append(place)
            hlcs.append(hlc)
            claims.append(claim)
            payloads.append(payload)
            at = end
        return GroupRun(offsets, hlcs, claims, payloads, offset + at)

    def _group_at(self, offset: int) -> Group | str:
        """The group at `offset`, or what is wrong with it."""
        head = self._read(offset, GROUP_BYTES)
        if len(head) < GROUP_BYTES:
            return f"{len(head)} bytes where a group header of {GROUP_BYTES} should be"
        magic, payload_bytes, hlc, synced_offset, payload_crc = GROUP.unpack_from(head)
        if magic != GROUP_MAGIC or not self._header_crc_ok(head, offset):
            return "a group header that fails its checksum"
        if synced_offset > offset:
            return f"a group that claims {synced_offset} bytes were on disk before it was written"
        start = offset + GROUP_BYTES
        if start + payload_bytes > self._limit:
            return f"a payload of {payload_bytes} bytes of which {self._limit - start} are there"
        payload = self._read(start, payload_bytes) if payload_bytes else b""
        if payload and _crc(payload) != payload_crc:
            return "a payload that fails its checksum"
        return Group(offset, start + payload_bytes, hlc, synced_offset, payload)

    def _header_crc_ok(self, head: bytes, offset: int) -> bool:
        place = PLACE.pack(self.header.number, offset)
        (expected,) = GROUP_CRC.unpack_from(head, GROUP.size)
        return bool(_extend_crc(_crc(place), head[: GROUP.size]) == expected)

    def _read(self, offset: int, size: int) -> bytes:
        """[offset, offset + size) of the part to be read, through a window."""
        size = min(size, self._limit - offset)
        at = offset - self._window_start
        if not 0 <= at <= len(self._window) - size:
            self._window = self._file.pread(offset, max(size, min(_WINDOW_BYTES, self._limit - offset)))
            self._window_start = offset
            at = 0
        return self._window[at : at + size]

    def _judge(self, problem: str) -> None:
        """Decide what the bad bytes at `valid_end` are: note a torn tail, or raise."""
        offset = self.valid_end
        rest = b"" if self._end is not None else self._file.pread(offset, self._size - offset)
        claim = self._claim_behind(offset, rest)
        if self._end is not None:
            why = f"valid groups up to {self._end}, as {_WITNESS} says"
        elif claim is not None:
            why = f"a valid group, since the one at {claim} says it was on disk"
        else:
            torn_bytes = len(without_reserve(rest))
            if torn_bytes:
                self.torn_tail = TornTail(self.path, offset, torn_bytes, problem)
            return
        raise Corruption("Damaged log", path=self.path, offset=offset, expected=why, got=problem)

    def _claim_behind(self, bad: int, rest: bytes) -> int | None:
        """Offset of a readable group header behind `bad` that says bytes past `bad` were synced, or None."""
        at = rest.find(GROUP_MAGIC_BYTES, 1)
        while at >= 0:
            head = rest[at : at + GROUP_BYTES]
            if len(head) == GROUP_BYTES and self._header_crc_ok(head, bad + at):
                synced_offset = GROUP.unpack_from(head)[3]
                if bad < synced_offset <= bad + at:
                    return bad + at
            at = rest.find(GROUP_MAGIC_BYTES, at + 1)
        return None


def without_reserve(rest: bytes) -> bytes:
    """The end of a last segment without the zeros behind it, if they are more than a torn group may well end with."""
    written = rest.rstrip(b"\0")
    return rest if written and len(rest) - len(written) < GROUP_BYTES else written


def parse_file_header(file: ReadableFile, path: str, magic: bytes) -> FileHeader:
    """The header of a segment or manifest. Raises `Corruption` or `UnsupportedFormat`."""
    head = file.pread(0, HEADER_BYTES)
    if len(head) < HEADER_BYTES or head[:8] != magic:
        raise Corruption(
            "No file header", path=path, offset=0, expected=f"{HEADER_BYTES} bytes from {magic!r}", got=repr(head[:8])
        )
    _magic, version, store_id, number, previous_number, previous_end = HEADER.unpack_from(head)
    (crc,) = HEADER_CRC.unpack_from(head, HEADER.size)
    actual = _crc(head[: HEADER.size])
    if crc != actual:
        raise Corruption("Damaged file header", path=path, offset=0, expected=f"checksum {crc}", got=actual)
    if version != FORMAT_VERSION:
        raise UnsupportedFormat(
            f"{path} has log format {version}; this program knows format {FORMAT_VERSION}.",
            detail={"path": path, "found": version, "known": FORMAT_VERSION},
            hint="Open it with the shardkv release that wrote it, or a newer one.",
        )
    return FileHeader(store_id, number, previous_number, previous_end)


def check_identity(header: FileHeader, path: str, store_id: bytes, number: int) -> None:
    """Raise unless the file belongs to this store and carries the number its name says."""
    if header.store_id != store_id:
        raise StoreMismatch(
            f"{path} belongs to store {header.store_id.hex()}, not to {store_id.hex()}.",
            hint="Put the files of each store back into their own directory.",
        )
    if header.number != number:
        raise Corruption("A file under another's name", path=path, offset=0, expected=number, got=header.number)
