"""The one seam through which the engine touches files: the protocol `Vfs`, and `OsVfs`, the real thing.

Invariants:
  - An `OSError` never leaves this module: it becomes `DiskFull` or `StorageError` here, once, with the
    operation, the path and the system's words, and stays reachable as `__cause__`.
  - `create` never opens a file that exists; `write` returns only after the kernel took every byte.
  - Nothing is durable before `sync` (the bytes) and `sync_dir` (the name) have returned.

What to do after a failure (retry, refuse, poison the store) is the caller's to decide. After a failed `sync`
the only right answer is to stop: the kernel may have dropped the pages and the next sync would lie.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from contextlib import suppress
from typing import Protocol

from shardkv.errors import DiskFull, StorageError, StoreLocked

_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
_NO_LINK = frozenset({errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS})
_COPY_BYTES = 1024 * 1024
_TMP_SUFFIX = ".tmp"
DEAD_HOLDER_WAIT_S = 1.0
_LOCK_RETRY_S = 0.01


class WritableFile(Protocol):
    """A new file, written from its start to its end and never rewritten."""

    path: str
    offset: int
    """Bytes the kernel has taken so far; the next `write` lands here."""

    def write(self, data: bytes | bytearray | memoryview) -> None: ...
    def reserve(self, size: int) -> None:
        """Have the file be `size` bytes long, with its place on disk taken and zeros past `offset`. Requires: more
        than `offset`. Writes go on at `offset`; a `sync` of what lies inside need not make a new length durable."""
        ...

    def trim(self) -> None:
        """Give back what was reserved and not written: the file ends at `offset`."""
        ...

    def sync(self) -> None: ...
    def close(self) -> None: ...


class ReadableFile(Protocol):
    """A file opened for positional reads. Stays readable after its name was removed."""

    path: str

    def pread(self, offset: int, size: int) -> bytes:
        """The bytes [offset, offset + size); shorter only where the file ends."""
        ...

    def size(self) -> int: ...
    def close(self) -> None: ...


class Lock(Protocol):
    def release(self) -> None:
        """Let others in, whatever forked children there are. Safe to call twice."""
        ...

    def leave(self) -> None:
        """In a forked child: have no part in the lock, which stays its parent's."""
        ...


class Vfs(Protocol):
    """What the engine may ask of a file system. Paths are strings; sizes and offsets are bytes.

    Every method raises `DiskFull` when there is no space or quota, `StorageError` for any other failure.
    """

    def create(self, path: str) -> WritableFile:
        """A new empty file. Raises `StorageError` when the path exists."""
        ...

    def open_read(self, path: str) -> ReadableFile: ...
    def size(self, path: str) -> int: ...
    def rename(self, source: str, target: str) -> None:
        """Atomic; replaces `target`. Durable only after `sync_dir`."""
        ...

    def link(self, source: str, target: str) -> bool:
        """Give the file a second name, durable after `sync_dir`. False: it cannot have one there; copy it.

        Raises `StorageError` when the target exists.
        """
        ...

    def sync_file(self, path: str) -> None:
        """Make the bytes of a file durable that somebody else may have written."""
        ...

    def remove(self, path: str) -> None: ...
    def list(self, directory: str) -> list[str]:
        """Names (not paths) in the directory, sorted."""
        ...

    def exists(self, path: str) -> bool: ...
    def make_dirs(self, path: str) -> None:
        """Make the directory and its parents; one that exists is fine."""
        ...

    def sync_dir(self, directory: str) -> None: ...
    def lock(self, path: str) -> Lock:
        """Take the exclusive lock on this file, or raise `StoreLocked` naming the holder when it is known."""
        ...

    def free_bytes(self, directory: str) -> int: ...

    def read_all(self, path: str) -> bytes:
        """The whole file. For small files (identity, pointer); tables and logs are read in pieces."""
        file = self.open_read(path)
        try:
            return file.pread(0, file.size())
        finally:
            file.close()

    def copy(self, source: str, target: str) -> None:
        """A new file at `target` with the bytes of `source`, synced; its name is durable after `sync_dir`.

        After a failure the target may be there, in part.
        """
        reader = self.open_read(source)
        try:
            file = self.create(target)
            try:
                while data := reader.pread(file.offset, _COPY_BYTES):
                    file.write(data)
                file.sync()
            finally:
                file.close()
        finally:
            reader.close()

    def write_atomic(self, path: str, data: bytes) -> None:
        """Replace the file at `path` by one that holds `data`; after a crash it holds the old or the new bytes.

        Returns when both the bytes and the name are durable. A leftover `path.tmp` of an earlier crash is removed.
        """
        tmp = path + _TMP_SUFFIX
        if self.exists(tmp):
            self.remove(tmp)
        file = self.create(tmp)
        try:
            file.write(data)
            file.sync()
        finally:
            file.close()
        self.rename(tmp, path)
        self.sync_dir(os.path.dirname(path) or ".")


def storage_error(operation: str, path: str, error: OSError) -> StorageError:
    """The error of the tree that stands for this `OSError`: `DiskFull` or plain `StorageError`."""
    what = f"Could not {operation} {path}: {error.strerror or error}."
    detail = {"operation": operation, "path": path, "errno": error.errno or 0}
    if error.errno in _NO_SPACE:
        return DiskFull(what, detail=detail, hint="Free space on this disk.")
    return StorageError(what, detail=detail)


class OsVfs(Vfs):
    """The file system of the machine. Descriptors are never inherited by programs this process starts."""

    def create(self, path: str) -> WritableFile:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except OSError as error:
            raise storage_error("create", path, error) from error
        return _OsWritableFile(path, descriptor)

    def open_read(self, path: str) -> ReadableFile:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise storage_error("open", path, error) from error
        return _OsReadableFile(path, descriptor)

    def size(self, path: str) -> int:
        try:
            return os.stat(path).st_size
        except OSError as error:
            raise storage_error("look at", path, error) from error

    def rename(self, source: str, target: str) -> None:
        try:
            os.rename(source, target)
        except OSError as error:
            raise storage_error("rename", source, error) from error

    def link(self, source: str, target: str) -> bool:
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno in _NO_LINK:
                return False
            raise storage_error("link", source, error) from error
        return True

    def sync_file(self, path: str) -> None:
        try:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise storage_error("sync", path, error) from error

    def remove(self, path: str) -> None:
        try:
            os.unlink(path)
        except OSError as error:
            raise storage_error("remove", path, error) from error

    def list(self, directory: str) -> list[str]:
        try:
            return sorted(os.listdir(directory))
        except OSError as error:
            raise storage_error("list", directory, error) from error

    def exists(self, path: str) -> bool:
        try:
            os.stat(path)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise storage_error("look at", path, error) from error
        return True

    def make_dirs(self, path: str) -> None:
        try:
            os.makedirs(path, exist_ok=True)
        except OSError as error:
            raise storage_error("make the directory", path, error) from error

    def sync_dir(self, directory: str) -> None:
        try:
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise storage_error("sync the directory", directory, error) from error

    def lock(self, path: str) -> Lock:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise storage_error("open the lock", path, error) from error
        try:
            _take_lock(path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return _OsLock(descriptor)

    def free_bytes(self, directory: str) -> int:
        try:
            stat = os.statvfs(directory)
        except OSError as error:
            raise storage_error("look at the free space of", directory, error) from error
        return stat.f_bavail * stat.f_frsize


class _OsWritableFile:
    __slots__ = ("_descriptor", "offset", "path")

    def __init__(self, path: str, descriptor: int) -> None:
        self.path = path
        self.offset = 0
        self._descriptor = descriptor

    def write(self, data: bytes | bytearray | memoryview) -> None:
        try:
            written = os.write(self._descriptor, data)
            self.offset += written
            if written < len(data):
                self._write_rest(memoryview(data)[written:])
        except OSError as error:
            raise storage_error("write to", self.path, error) from error

    def _write_rest(self, rest: memoryview) -> None:
        while rest:
            written = os.write(self._descriptor, rest)
            self.offset += written
            rest = rest[written:]

    def reserve(self, size: int) -> None:
        try:
            os.posix_fallocate(self._descriptor, self.offset, size - self.offset)
        except OSError as error:
            raise storage_error("reserve space for", self.path, error) from error

    def trim(self) -> None:
        try:
            os.ftruncate(self._descriptor, self.offset)
        except OSError as error:
            raise storage_error("cut", self.path, error) from error

    def sync(self) -> None:
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            raise storage_error("sync", self.path, error) from error

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            try:
                os.close(descriptor)
            except OSError as error:
                raise storage_error("close", self.path, error) from error


class _OsReadableFile:
    __slots__ = ("_descriptor", "path")

    def __init__(self, path: str, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    def pread(self, offset: int, size: int) -> bytes:
        try:
            data = os.pread(self._descriptor, size, offset)
            while data and len(data) < size:
                more = os.pread(self._descriptor, size - len(data), offset + len(data))
                if not more:
                    break
                data += more
        except OSError as error:
            raise storage_error("read", self.path, error) from error
        return data

    def size(self) -> int:
        try:
            return os.fstat(self._descriptor).st_size
        except OSError as error:
            raise storage_error("look at", self.path, error) from error

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class _OsLock:
    __slots__ = ("_descriptor",)

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def release(self) -> None:
        """The lock file stays: removing it would let two processes lock two different files."""
        if self._descriptor >= 0:
            with suppress(OSError):
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # a close alone leaves it with forked children
        self.leave()

    def leave(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def _take_lock(path: str, descriptor: int) -> None:
    """A holder that is dead may have left a child between fork and exec, which has the lock for a moment longer."""
    give_up_at = time.monotonic() + DEAD_HOLDER_WAIT_S
    while (holder := _try_lock(path, descriptor)) is not None:
        lives = _lives(holder)
        if lives or time.monotonic() >= give_up_at:
            who = f"process {holder}" if holder else "another process"
            who = who if lives else f"a child of {who}, which is gone"
            raise StoreLocked(
                f"The store at {os.path.dirname(path) or '.'} is in use by {who}.",
                detail={"path": path, "pid": holder},
                hint="Stop that process first, or choose another data directory.",
            )
        time.sleep(_LOCK_RETRY_S)  # flock can wait, but not for a bounded time
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
    except OSError as error:
        raise storage_error("write to the lock", path, error) from error


def _try_lock(path: str, descriptor: int) -> int | None:
    """None: it was taken. Else the process that has it, by its own word; 0: nobody knows."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
        return int(holder) if holder.isdigit() else 0
    except OSError as error:
        raise storage_error("lock", path, error) from error
    return None


def _lives(process: int) -> bool:
    """Whether there is such a process, or may be."""
    if process:
        with suppress(PermissionError, OverflowError):
            try:
                os.kill(process, 0)
            except ProcessLookupError:
                return False
    return True
