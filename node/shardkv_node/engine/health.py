"""`Health`: whether the store may take writes, and why not.

Invariant: once poisoned, always poisoned. After a failed write or sync nobody knows what the disk holds; only
recovery, which reads it, may decide that.
"""

from __future__ import annotations

from collections.abc import Callable

from shardkv.errors import DiskFull, ShardKVError, StorageError, StorePoisoned
from shardkv_node.engine.vfs import Vfs

_DISK_CHECK_INTERVAL_S = 1.0

FLUSH, COMPACTION, REMOVAL = "flush", "compaction", "removal of a file"
"""Kinds of background work."""


class Health:
    """`monotonic`: seconds that never go back."""

    __slots__ = (
        "_check_at",
        "_directory",
        "_free_bytes",
        "_monotonic",
        "_reserve_bytes",
        "_vfs",
        "cause",
        "failing",
        "on_poison",
    )

    def __init__(self, vfs: Vfs, directory: str, *, reserve_bytes: int, monotonic: Callable[[], float]) -> None:
        self._vfs = vfs
        self._directory = directory
        self._reserve_bytes = reserve_bytes
        self._monotonic = monotonic
        self._check_at = monotonic()
        self._free_bytes = reserve_bytes
        self.cause: BaseException | None = None
        """What poisoned the store."""
        self.failing: dict[str, StorageError] = {}
        """Why the last one failed, by kind of background work; out again once one of that kind succeeded."""
        self.on_poison: Callable[[], None] = lambda: None
        """Called when the store was poisoned, once."""

    @property
    def poisoned(self) -> bool:
        return self.cause is not None

    @property
    def background(self) -> StorageError | None:
        """Why background work fails; None while all of it succeeds."""
        return next(iter(list(self.failing.values())), None) if self.failing else None

    def poison(self, cause: BaseException) -> StorePoisoned:
        """Take no more writes, for good. Returns the error for the writes at hand; the first cause is kept."""
        if self.cause is None:
            self.cause = cause
            self.on_poison()
        return self._poison_error()

    def refusal(self, *, stalled: bool) -> StorageError | None:
        """Why a write cannot be taken now, or None."""
        if self.cause is not None:
            return self._poison_error()
        if self._free() < self._reserve_bytes:
            return DiskFull(
                f"The disk of {self._directory} has {self._free_bytes} bytes free, less than the reserve of "
                f"{self._reserve_bytes}; writes are refused, reads go on.",
                detail={"free_bytes": self._free_bytes, "reserve_bytes": self._reserve_bytes},
                hint="Free space on this disk, or lower disk_reserve_bytes; writes resume by themselves.",
            )
        if stalled and self.background is not None:
            kind = DiskFull if isinstance(self.background, DiskFull) else StorageError
            return kind(
                f"Writes wait for a flush or compaction that fails: {self.background.message}",
                hint=f"{self.background.hint} Writes resume by themselves once it succeeds.".lstrip(),
            )
        return None

    def _free(self) -> int:
        now = self._monotonic()
        if self._reserve_bytes and now >= self._check_at:
            self._check_at = now + _DISK_CHECK_INTERVAL_S
            self._free_bytes = self._vfs.free_bytes(self._directory)
        return self._free_bytes

    def _poison_error(self) -> StorePoisoned:
        cause = self.cause.message if isinstance(self.cause, ShardKVError) else self.cause
        first = "Free space on this disk first, then close" if isinstance(self.cause, DiskFull) else "Close"
        return StorePoisoned(
            f"The store at {self._directory} takes no more writes until it is closed and opened again, because one to "
            f"its disk failed: {cause} Writes not acknowledged before may or may not have been kept.",
            hint=f"{first} it and open it again: recovery keeps every acknowledged write.",
        )
