"""`SalvageFile`: reads a file on a disk that cannot read all of it. What it cannot read comes as zeros.

The checksums then find the zeros, so that a bad sector is damage at a place like any other, and not the end.
"""

from __future__ import annotations

from shardkv.errors import StorageError
from shardkv_node.engine.vfs import Vfs

_SECTOR_BYTES = 4096


class SalvageFile:
    """A `ReadableFile`. Raises `StorageError` only when it cannot be opened at all."""

    def __init__(self, vfs: Vfs, path: str) -> None:
        self.path = path
        self._file = vfs.open_read(path)

    def pread(self, offset: int, size: int) -> bytes:
        try:
            return self._file.pread(offset, size)
        except StorageError:
            end = min(offset + size, self._file.size())
            return b"".join(self._sector(at, end) for at in range(offset, end, _SECTOR_BYTES))

    def _sector(self, offset: int, end: int) -> bytes:
        size = min(_SECTOR_BYTES, end - offset)
        try:
            return self._file.pread(offset, size)
        except StorageError:
            return bytes(size)

    def size(self) -> int:
        return self._file.size()

    def close(self) -> None:
        self._file.close()
