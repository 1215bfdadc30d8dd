"""`TableMeta`: what the manifest stores about a table, and what a table must agree with when it is opened."""

from __future__ import annotations

import msgspec


class TableMeta(msgspec.Struct, array_like=True, frozen=True):
    """Facts about one table file. Written as a msgpack array: never reorder, add only at the end with a default.

    The level is not part of it: the manifest says where a table stands, and a table may change its level unread.
    """

    file_name: str
    """Name inside the tables directory, see filenames.py."""
    size: int
    """Bytes of the file."""
    crc32c: int
    """Of the whole file."""
    tablet: int
    """The tablet it was written for, in the store that wrote it. After a split or an import another one has it: which,
    the manifest says, and not this."""
    first_key: bytes
    last_key: bytes
    """Included."""
    min_version: int
    max_version: int
    count: int
    """Rows, deletes included."""
    tombstones: int
    expiring: int
    """Rows with an expiry."""
    raw_bytes: int
    """Keys and values, before compression."""
    start: bytes = b""
    """A clip: of the file, only rows with keys in [start, stop) belong to the tablet. Counts are of the whole file."""
    stop: bytes | None = None
    """None: no clip at this end."""

    @property
    def low(self) -> bytes:
        """No row that counts is below it."""
        return max(self.first_key, self.start)

    @property
    def high(self) -> bytes:
        """Every row that counts is below it."""
        return self.last_key + b"\0" if self.stop is None else min(self.last_key + b"\0", self.stop)

    @property
    def clipped(self) -> bool:
        """Rows of the file may lie outside the clip."""
        return self.start > self.first_key or (self.stop is not None and self.stop <= self.last_key)

    def clip(self, start: bytes, stop: bytes | None) -> TableMeta | None:
        """The same file seen through a narrower clip, or None when no row can be left."""
        start = max(start, self.start)
        stop = self.stop if stop is None else stop if self.stop is None else min(stop, self.stop)
        narrowed = msgspec.structs.replace(self, start=start, stop=stop)
        return narrowed if narrowed.low < narrowed.high else None

    def without(self, start: bytes, stop: bytes | None) -> list[TableMeta]:
        """What is left of the file outside [start, stop): at most two pieces, in key order."""
        below = self.clip(b"", start)
        above = None if stop is None else self.clip(stop, None)
        return [piece for piece in (below, above) if piece is not None]
