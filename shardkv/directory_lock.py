"""A directory that belongs to one process at a time.

Invariant: the lock goes with the process that holds it, however it dies; it is an flock, so a stale file means
nothing. The file holds the pid of the newest holder, for people and messages only. No child inherits it.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from shardkv.errors import StorageError, StoreLocked


class DirectoryLock:
    """The lock file `path`, held from construction to `release`."""

    def __init__(self, path: Path) -> None:
        """Make the directory if needed and lock it. Raises StoreLocked with the holder's pid, StorageError."""
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StorageError(
                f"{path.parent} cannot be used as a data directory: {error.strerror}.",
                hint="Choose a directory that can be written to.",
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            pid = lock_holder(path)
            raise StoreLocked(
                f"{path.parent} is in use by process {pid if pid else '(unknown)'}.",
                detail={"pid": pid},
                hint="Stop that process, or choose another directory.",
            ) from None
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Give the directory free."""
        os.close(self._file)


def lock_holder(path: Path) -> int | None:
    """The pid written in a lock file; None when there is none. Says nothing about whether it still runs."""
    try:
        text = path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return int(text) if text.isdigit() else None


def is_locked(path: Path) -> bool:
    """Whether some process holds the lock file `path` now."""
    try:
        probe = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(probe, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(probe)
    return False
