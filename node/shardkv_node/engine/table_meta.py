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
