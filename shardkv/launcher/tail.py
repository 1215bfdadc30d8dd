"""`cluster logs`: the last lines of the processes' logs, and what is added to them.

Invariant: every line is printed once, whole, also across a rotation.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

FOLLOW_PAUSE_S = 0.2
_BLOCK_BYTES = 64 * 1024


def last_lines(path: Path, count: int) -> list[str]:
    """The last `count` lines of a log, from its newest file only."""
    return _Follower(path).last(count)


def follow(paths: Sequence[Path], count: int, *, stopped: Callable[[], bool] = lambda: False) -> Iterator[str]:
    """The last `count` lines of each log, then every new one, until `stopped()`."""
    followers = [_Follower(path) for path in paths]
    for follower in followers:
        yield from follower.last(count)
    while not stopped():
        for follower in followers:
            yield from follower.more()
        time.sleep(FOLLOW_PAUSE_S)


class _Follower:
    """A place in one log."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = 0
        self._offset = 0
        self._half_line = b""

    def last(self, count: int) -> list[str]:
        try:
            with open(self._path, "rb") as file:
                self._inode = os.fstat(file.fileno()).st_ino
                data = _tail(file.fileno(), count)
                self._offset = file.seek(0, os.SEEK_END)
        except FileNotFoundError:
            return []
        return [line.decode(errors="replace") for line in data.splitlines()[-count:]] if count else []

    def more(self) -> list[str]:
        """Whole lines added since; after a rotation first the rest of the old file."""
        lines: list[bytes] = []
        try:
            rotated = os.stat(self._path).st_ino != self._inode
        except FileNotFoundError:
            return []
        if rotated:
            lines += self._read(self._path.with_name(f"{self._path.name}.1"))
            self._offset = 0
        lines += self._read(self._path)
        return [line.decode(errors="replace") for line in lines]

    def _read(self, path: Path) -> list[bytes]:
        try:
            with open(path, "rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if path == self._path:
                    self._inode = inode
                elif inode != self._inode:
                    return []
                file.seek(self._offset)
                data = self._half_line + file.read()
                self._offset = file.tell()
        except FileNotFoundError:
            return []
        *lines, self._half_line = data.split(b"\n")
        return lines


def _tail(fd: int, count: int) -> bytes:
    """The end of a file, holding at least `count` lines if it has them."""
    end = os.fstat(fd).st_size
    data = b""
    while end > 0 and data.count(b"\n") <= count:
        size = min(_BLOCK_BYTES, end)
        end -= size
        data = os.pread(fd, size, end) + data
    return data
