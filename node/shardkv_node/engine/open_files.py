"""`OpenFiles`: positional reads of many files through a bounded number of descriptors.

Invariant: at most `open_files_max` files are open; the least recently used is closed first, and reopened by name
when it is read again. So a file must keep its name for as long as somebody may read it. Not thread-safe.
"""

from __future__ import annotations

from collections import OrderedDict

from shardkv_node.engine.block import Decompressor
from shardkv_node.engine.vfs import ReadableFile, Vfs


class OpenFiles:
    def __init__(self, vfs: Vfs, open_files_max: int = 256) -> None:
        self._vfs = vfs
        self._open_files_max = max(1, open_files_max)
        self._files: OrderedDict[str, ReadableFile] = OrderedDict()
        self.decompressor = Decompressor()
        """For the blocks of all of them: the state of a codec takes more memory than a table does."""

    def __len__(self) -> int:
        return len(self._files)

    def get(self, path: str) -> ReadableFile:
        """The file, open. Valid until the next `get` or `close`: do not keep it."""
        file = self._files.get(path)
        if file is not None:
            self._files.move_to_end(path)
            return file
        file = self._vfs.open_read(path)
        while len(self._files) >= self._open_files_max:
            self._files.popitem(last=False)[1].close()
        self._files[path] = file
        return file

    def close(self, path: str) -> None:
        """Close this file if it is open. It may be opened again by `get`."""
        file = self._files.pop(path, None)
        if file is not None:
            file.close()

    def close_all(self) -> None:
        while self._files:
            self._files.popitem()[1].close()
