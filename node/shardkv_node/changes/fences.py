"""`FenceFile`: a node's fences, and the store revision it has acted on, in `fences.json` of its data directory.

Invariants: a fence counts once `add` has returned, and is gone once `remove` has: both are on disk by then. The file
is replaced as a whole, one change after the other. Where a fence is being added it `holds` already, so that nothing is
served that may be fenced.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable

import msgspec

from shardkv.control.duties import Fence
from shardkv.errors import StorageError, UnsupportedFormat
from shardkv_node.engine.vfs import OsVfs

FILE = "fences.json"
FORMAT = 1


class _Contents(msgspec.Struct, frozen=True, kw_only=True):
    format: int
    revision: int
    """The highest revision of the metadata store that was acted on."""
    fences: list[Fence]


class FenceFile:
    """Reads and writes the file of `directory`; used on one event loop."""

    def __init__(self, directory: str) -> None:
        self._path = os.path.join(directory, FILE)
        self._vfs = OsVfs()
        contents = self._load()
        self._revision = self._saved_revision = contents.revision
        self._fences = set(contents.fences)
        self._adding: set[Fence] = set()
        self._turn = asyncio.Lock()

    def _load(self) -> _Contents:
        if not self._vfs.exists(self._path):
            return _Contents(format=FORMAT, revision=0, fences=[])
        try:
            found = msgspec.json.decode(self._vfs.read_all(self._path), type=_Contents)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise StorageError(
                f"{self._path} cannot be read: {error}.", hint="Restore it from a copy of this data directory."
            ) from error
        if found.format > FORMAT:
            raise UnsupportedFormat(
                f"{self._path} has format {found.format}; this version of shardkv knows up to {FORMAT}.",
                hint="Start it with the version of shardkv that wrote it, or a newer one.",
            )
        return found

    @property
    def all(self) -> set[Fence]:
        """Those on disk and those that are being added."""
        return self._fences | self._adding

    def holds(self, shard: int, epoch: int) -> bool:
        """Whether a shard may not be served at this epoch."""
        return any(fence.shard == shard and fence.epoch >= epoch for fence in self.all)

    @property
    def revision(self) -> int:
        """The highest revision that was acted on."""
        return self._revision

    def note_revision(self, revision: int) -> None:
        """It is being acted on; on disk with the next change, or `save`."""
        self._revision = max(self._revision, revision)

    async def save(self) -> None:
        """Have the revision on disk. Raises StorageError."""
        if self._revision > self._saved_revision:
            async with self._turn:
                await self._write(self._fences)

    async def add(self, fences: Iterable[Fence]) -> None:
        """Promise these. Raises StorageError; then it is not known whether they are on disk."""
        new = set(fences)
        self._adding |= new
        async with self._turn:
            if not new <= self._fences:
                await self._write(self._fences | new)
            self._adding -= new

    async def remove(self, fences: Iterable[Fence]) -> None:
        """Forget these. Raises StorageError."""
        gone = set(fences)
        async with self._turn:
            await self._write(self._fences - gone)
            self._adding -= gone

    async def _write(self, fences: set[Fence]) -> None:
        contents = _Contents(format=FORMAT, revision=self._revision, fences=sorted(fences))
        data = msgspec.json.encode(contents) + b"\n"
        writing = asyncio.get_running_loop().run_in_executor(None, self._vfs.write_atomic, self._path, data)
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            await writing  # the next one must not overtake it
            self._fences, self._saved_revision = fences, contents.revision
            raise
        self._fences, self._saved_revision = fences, contents.revision
