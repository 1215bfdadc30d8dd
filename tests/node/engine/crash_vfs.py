"""`CrashVfs`: an in-memory file system that loses what was not synced and fails where it is told to.

Model. A file is bytes, of which the first `synced` are durable. A directory is names; a change of a name (create,
rename, remove) is durable after `sync_dir` of its directory. `crash(keep)` gives a new `CrashVfs` as a machine would
find it after power was lost: `keep()` is asked once for each sector of 512 unsynced bytes and once for each unsynced
change of a name, in order. Names change in order, as on a journaled file system: the first change that is not kept
ends that directory's history. A lost sector before a kept one reads as zeros, and one at the end is not there, or
reads as zeros as far as a reserve that was synced goes. Each directory below the
root is a file system of its own: no link leads from one to another.

Faults. Every operation that a disk could refuse is counted in `operations` and named in `journal`.
`fail_at(n)` makes the n-th (from 1) raise; a failing write takes half of its bytes first. With `sticky` all
later ones fail too: nothing changes any more, as after a power cut at that point.
"""

from __future__ import annotations

import errno as errno_codes
import os
import random
from collections.abc import Callable

from shardkv.errors import StoreLocked
from shardkv_node.engine.vfs import Lock, ReadableFile, Vfs, WritableFile, storage_error

SECTOR_BYTES = 512


def keep_nothing() -> bool:
    return False


def keep_everything() -> bool:
    return True


def keep_some(seed: int, percent: int) -> Callable[[], bool]:
    """Keeps each unsynced thing with this probability, the same ones for the same seed."""
    chance = random.Random(seed)
    return lambda: chance.random() * 100 < percent


class _Inode:
    def __init__(self, data: bytes = b"", synced: int = 0) -> None:
        self.data = bytearray(data)
        self.synced = synced
        self.written = len(data)
        """What follows in `data` is reserved."""
        self.synced_size = synced
        """Of the file, with the reserve."""


class CrashVfs(Vfs):
    def __init__(self) -> None:
        self.files: dict[str, _Inode] = {}
        """Path -> file, as running programs see it."""
        self.durable_files: dict[str, _Inode] = {}
        """Path -> file, as the disk has the names."""
        self.directories: set[str] = {"/"}
        self.name_changes: dict[str, list[Callable[[dict[str, _Inode]], None]]] = {}
        self.operations = 0
        self.journal: list[str] = []
        self.free = 1 << 40
        self._locked: set[str] = set()
        self._fail_at = 0
        self._sticky = False
        self._errno = errno_codes.EIO

    # --- faults ---

    def fail_at(self, n: int, *, errno: int = errno_codes.EIO, sticky: bool = False) -> None:
        """Make the n-th operation from the start of counting fail (0: none)."""
        self._fail_at, self._errno, self._sticky = n, errno, sticky

    def crash(self, keep: Callable[[], bool] = keep_nothing) -> CrashVfs:
        """The file system after power was lost now. This one is not changed."""
        names = dict(self.durable_files)
        for changes in self.name_changes.values():
            for change in changes:
                if not keep():
                    break
                change(names)
        survivor = CrashVfs()
        survivor.directories = set(self.directories)
        survivor.free = self.free
        for path, inode in names.items():
            data = _after_crash(inode, keep)
            survivor.files[path] = survivor.durable_files[path] = _Inode(data, len(data))
        return survivor

    def operate(self, what: str, path: str) -> None:
        """Count one operation and fail it when it is its turn."""
        self.operations += 1
        self.journal.append(f"{what} {path}")
        if self._fail_at and (self.operations == self._fail_at or (self._sticky and self.operations > self._fail_at)):
            error = OSError(self._errno, os.strerror(self._errno))
            raise storage_error(what, path, error) from error

    def _change(self, path: str, change: Callable[[dict[str, _Inode]], None]) -> None:
        change(self.files)
        self.name_changes.setdefault(os.path.dirname(path) or ".", []).append(change)

    # --- Vfs ---

    def create(self, path: str) -> WritableFile:
        self.operate("create", path)
        if path in self.files:
            raise self._refuse("create", path, errno_codes.EEXIST)
        if os.path.dirname(path) not in self.directories:
            raise self._refuse("create", path, errno_codes.ENOENT)
        inode = _Inode()
        self._change(path, lambda names: names.__setitem__(path, inode))
        return _CrashWritableFile(self, path, inode)

    def open_read(self, path: str) -> ReadableFile:
        self.operate("open", path)
        return _CrashReadableFile(self, path, self._inode(path))

    def size(self, path: str) -> int:
        return len(self._inode(path).data)

    def rename(self, source: str, target: str) -> None:
        self.operate("rename", source)
        assert os.path.dirname(source) == os.path.dirname(target), "the model renames inside one directory"
        self._inode(source)

        def change(names: dict[str, _Inode]) -> None:
            names[target] = names.pop(source)

        self._change(target, change)

    def link(self, source: str, target: str) -> bool:
        self.operate("link", target)
        inode = self._inode(source)
        if target in self.files:
            raise self._refuse("link", target, errno_codes.EEXIST)
        if source.split("/")[1] != target.split("/")[1]:
            return False
        self._change(target, lambda names: names.__setitem__(target, inode))
        return True

    def sync_file(self, path: str) -> None:
        self.operate("sync", path)
        inode = self._inode(path)
        inode.synced = len(inode.data)

    def remove(self, path: str) -> None:
        self.operate("remove", path)
        self._inode(path)
        self._change(path, lambda names: names.__delitem__(path))

    def list(self, directory: str) -> list[str]:
        if directory not in self.directories:
            raise self._refuse("list", directory, errno_codes.ENOENT)
        inside = [path for path in (*self.files, *self.directories) if os.path.dirname(path) == directory]
        return sorted(os.path.basename(path) for path in inside if path != directory)

    def exists(self, path: str) -> bool:
        return path in self.files or path in self.directories

    def make_dirs(self, path: str) -> None:
        while path not in self.directories:
            self.directories.add(path)
            path = os.path.dirname(path) or "/"

    def sync_dir(self, directory: str) -> None:
        self.operate("sync the directory", directory)
        for change in self.name_changes.pop(directory, []):
            change(self.durable_files)

    def lock(self, path: str) -> Lock:
        if path in self._locked:
            raise StoreLocked(f"The store at {os.path.dirname(path)} is in use by this process.")
        self._locked.add(path)
        return _CrashLock(self._locked, path)

    def free_bytes(self, directory: str) -> int:
        return self.free

    # --- for tests that damage files ---

    def replace(self, path: str, data: bytes) -> None:
        """Put these bytes in the file, durable, whatever it held or whether it existed."""
        self.files[path] = self.durable_files[path] = _Inode(data, len(data))

    def _inode(self, path: str) -> _Inode:
        inode = self.files.get(path)
        if inode is None:
            raise self._refuse("open", path, errno_codes.ENOENT)
        return inode

    def _refuse(self, operation: str, path: str, code: int) -> Exception:
        error = OSError(code, os.strerror(code))
        refusal = storage_error(operation, path, error)
        refusal.__cause__ = error
        return refusal


def _after_crash(inode: _Inode, keep: Callable[[], bool]) -> bytes:
    data = bytearray(inode.data[: inode.synced])
    position = inode.synced
    while position < inode.written:
        end = min(inode.written, (position // SECTOR_BYTES + 1) * SECTOR_BYTES)
        if keep():
            data += bytes(position - len(data))
            data += inode.data[position:end]
        position = end
    return bytes(data) + bytes(max(0, inode.synced_size - len(data)))


class _CrashWritableFile:
    def __init__(self, vfs: CrashVfs, path: str, inode: _Inode) -> None:
        self.path = path
        self.offset = 0
        self._vfs = vfs
        self._inode = inode

    def write(self, data: bytes | bytearray | memoryview) -> None:
        try:
            self._vfs.operate("write to", self.path)
        except Exception:
            if not (self._vfs._sticky and self._vfs.operations > self._vfs._fail_at):
                self._take(data[: len(data) // 2])
            raise
        self._take(data)

    def _take(self, data: bytes | bytearray | memoryview) -> None:
        self._inode.data[self.offset : self.offset + len(data)] = data
        self.offset += len(data)
        self._inode.written = self.offset

    def reserve(self, size: int) -> None:
        self._vfs.operate("reserve space for", self.path)
        self._inode.data += bytes(max(0, size - len(self._inode.data)))

    def trim(self) -> None:
        self._vfs.operate("cut", self.path)
        del self._inode.data[self.offset :]

    def sync(self) -> None:
        self._vfs.operate("sync", self.path)
        self._inode.synced = self._inode.written
        self._inode.synced_size = len(self._inode.data)

    def close(self) -> None:
        pass


class _CrashReadableFile:
    def __init__(self, vfs: CrashVfs, path: str, inode: _Inode) -> None:
        self.path = path
        self._vfs = vfs
        self._inode = inode

    def pread(self, offset: int, size: int) -> bytes:
        self._vfs.operate("read", self.path)
        return bytes(self._inode.data[offset : offset + size])

    def size(self) -> int:
        return len(self._inode.data)

    def close(self) -> None:
        pass


class _CrashLock:
    def __init__(self, locked: set[str], path: str) -> None:
        self._locked = locked
        self._path = path

    def release(self) -> None:
        self._locked.discard(self._path)

    def leave(self) -> None:
        pass
