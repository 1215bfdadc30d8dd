"""`Fetcher`: brings the files of a round here, several pieces at a time, at the rate that is asked for.

Invariants: a file has its name in the directory only when it is complete, on disk, and its checksum is right; so what
an earlier round brought is used again. Nothing is asked for while the change is paused, nor faster than its rate.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial

import google_crc32c

from shardkv.errors import Corruption
from shardkv.wire.moves import MovePiece
from shardkv_node.changes.link import Link
from shardkv_node.changes.pace import Pace
from shardkv_node.changes.progress import Progress
from shardkv_node.changes.site import Site
from shardkv_node.engine.staging import Verified
from shardkv_node.engine.table_meta import TableMeta
from shardkv_node.engine.vfs import storage_error

PIECE_BYTES = 1024 * 1024
PIECES_IN_FLIGHT = 6
_PART = ".part"
_READ_BYTES = 4 * 1024 * 1024


class Fetcher:
    """Of one round."""

    def __init__(self, site: Site, link: Link, directory: str, pace: Pace, progress: Progress) -> None:
        self._site = site
        self._link = link
        self._directory = directory
        self._pace = pace
        self._progress = progress

    async def fetch(self, metas: Sequence[TableMeta], verified: Verified) -> None:
        """Bring these files; what was found right is added to `verified`.

        Raises Corruption, StorageError, and what a `Link` raises.
        """
        await self._site.in_thread(partial(os.makedirs, self._directory, exist_ok=True))
        files = iter([_File(self._directory, meta) for meta in metas])
        pieces = self._pieces(files)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(PIECES_IN_FLIGHT):
                    group.create_task(self._fetch_pieces(pieces, verified))
        except ExceptionGroup as errors:  # the first one says why
            raise errors.exceptions[0] from None

    def _pieces(self, files: Iterator[_File]) -> Iterator[tuple[_File, int]]:
        for file in files:
            for offset in range(0, file.meta.size, PIECE_BYTES):
                yield file, offset

    async def _fetch_pieces(self, pieces: Iterator[tuple[_File, int]], verified: Verified) -> None:
        for file, offset in pieces:
            size = min(PIECE_BYTES, file.meta.size - offset)
            await self._pace.take(size)
            piece = await self._link.file(file.meta.file_name, offset, size)
            await self._in_thread(partial(file.put, offset, size, piece))
            self._progress.add(size)
            file.left -= size
            if not file.left:
                await self._in_thread(file.finish)
                verified.add((file.meta.file_name, file.meta.crc32c))

    async def _in_thread(self, call: Callable[[], None]) -> None:
        await self._site.in_thread(call)


class _File:
    """A file that is being put together from pieces. `put` and `finish` run in threads."""

    def __init__(self, directory: str, meta: TableMeta) -> None:
        self.meta = meta
        self._path = os.path.join(directory, meta.file_name)
        self._directory = directory
        self.left = meta.size
        """Bytes that have not come."""

    def put(self, offset: int, size: int, piece: MovePiece) -> None:
        got = google_crc32c.value(piece.data)
        if len(piece.data) != size or got != piece.crc32c:
            raise Corruption(
                "A piece of a file was damaged on its way",
                path=self._path,
                offset=offset,
                expected=f"{size} bytes, {piece.crc32c:08x}",
                got=f"{len(piece.data)} bytes, {got:08x}",
            )
        try:
            descriptor = os.open(self._path + _PART, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                _write_all(descriptor, piece.data, offset)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise storage_error("write", self._path, error) from error

    def finish(self) -> None:
        """Check the whole, and give it its name."""
        try:
            descriptor = os.open(self._path + _PART, os.O_RDONLY)
            try:
                self._check(descriptor)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.rename(self._path + _PART, self._path)
        except OSError as error:
            raise storage_error("finish", self._path, error) from error

    def _check(self, descriptor: int) -> None:
        got, offset = 0, 0
        while data := os.pread(descriptor, _READ_BYTES, offset):
            got, offset = google_crc32c.extend(got, data), offset + len(data)
        if (offset, got) != (self.meta.size, self.meta.crc32c):
            with suppress(OSError):
                os.unlink(self._path + _PART)
            raise Corruption(
                "A file is not what its owner's manifest says",
                path=self._path,
                offset=0,
                expected=f"{self.meta.size} bytes, {self.meta.crc32c:08x}",
                got=f"{offset} bytes, {got:08x}",
            )


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
