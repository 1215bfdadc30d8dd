"""What the log says: the typed entries inside a group's payload.

An entry is a msgpack array whose first element is its type. Types are on disk: never renumber, never reuse; 0 stays
reserved; a field is added only at the end, with a default. Version 1 writes `WriteEntry` and reads them all, so that
replicas and moves need no new format.

    1 write          tablet, term, seqno, token, keys, kinds, expiries, values
    2 truncate       tablet, seqno          writes of the tablet above seqno are void
    3 term no-op     tablet, term, seqno    a new primary's first entry
    4 commit mark    tablet, seqno          everything up to seqno is committed
    5 fence          tablet, seqno, epoch   nothing is sequenced after seqno under this epoch
    6 tablet create  tablet, label
    7 tablet drop    tablet
    8 dedupe         tablet, term, seqno, token, operations, result, expiry_ms       not written: see below

What a write with an idempotency token came to is a row of the records tablet (dedupe.py), so it stands in the log as
a `WriteEntry` of that tablet, in the group of the write itself. The token of a `WriteEntry` is nil.
"""

from __future__ import annotations

import msgspec

WRITE = 1
"""Type of a `WriteEntry`, for those who encode one as a plain tuple of its fields."""

Token = tuple[bytes, int]
"""Idempotency token: (lane, number in the lane), see dedupe.py."""


class WriteEntry(msgspec.Struct, array_like=True, tag=WRITE, gc=False):
    """One write request: all its operations, or none, are in the store. Keys may repeat; the last one wins."""

    tablet: int
    term: int
    seqno: int
    token: Token | None
    keys: list[bytes]
    kinds: int | bytes
    """One kind for all operations, or one byte each."""
    expiries: int | bytes
    """Milliseconds since 1970, 0 = never: one int for all, or n little-endian u64."""
    values: list[bytes]
    """b"" for a delete."""


class TruncateEntry(msgspec.Struct, array_like=True, tag=2, gc=False):
    tablet: int
    seqno: int


class TermEntry(msgspec.Struct, array_like=True, tag=3, gc=False):
    tablet: int
    term: int
    seqno: int


class CommitEntry(msgspec.Struct, array_like=True, tag=4, gc=False):
    tablet: int
    seqno: int


class FenceEntry(msgspec.Struct, array_like=True, tag=5, gc=False):
    tablet: int
    seqno: int
    epoch: int


class TabletCreateEntry(msgspec.Struct, array_like=True, tag=6, gc=False):
    tablet: int
    label: bytes


class TabletDropEntry(msgspec.Struct, array_like=True, tag=7, gc=False):
    tablet: int


class DedupeEntry(msgspec.Struct, array_like=True, tag=8, gc=False):
    tablet: int
    term: int
    seqno: int
    token: Token
    operations: int
    result: bytes
    expiry_ms: int


Entry = (
    WriteEntry
    | TruncateEntry
    | TermEntry
    | CommitEntry
    | FenceEntry
    | TabletCreateEntry
    | TabletDropEntry
    | DedupeEntry
)


def shape_error(entry: Entry) -> str | None:
    """What is wrong with the columns of a decoded write, or None."""
    if not isinstance(entry, WriteEntry):
        return None
    n = len(entry.keys)
    if len(entry.values) != n:
        return f"{len(entry.values)} values for {n} keys"
    if isinstance(entry.kinds, bytes) and len(entry.kinds) != n:
        return f"{len(entry.kinds)} kinds for {n} keys"
    if isinstance(entry.expiries, bytes) and len(entry.expiries) != 8 * n:
        return f"{len(entry.expiries)} bytes of expiries for {n} keys"
    return None
