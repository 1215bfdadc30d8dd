"""Time to live: a row of kind PUT_EXPIRING ends when the clock reaches its expiry.

From then on it is a delete like any other: it reads as absent, hides older rows of its key, and is carried along until
no older row can be below it. Whoever meets it first turns it into one, a scan for its page, a flush or compaction for
good. The time is an argument: a clock that never goes back, so that what has ended once never comes back.
"""

from __future__ import annotations

from shardkv_node.engine.columns import DELETE, NO_EXPIRY, Columns, collapse, expand_kinds, expand_u64, pack_u64


def end_expired(columns: Columns, now_ms: int) -> Columns:
    """The same rows, those that ended by `now_ms` (milliseconds since 1970) as deletes. May return what it got."""
    if not columns.expiries:
        return columns
    n = len(columns)
    expiries = expand_u64(columns.expiries, n)
    ended = [NO_EXPIRY < expiry <= now_ms for expiry in expiries]
    if not any(ended):
        return columns
    rows = zip(expand_kinds(columns.kinds, n), ended, strict=True)
    kinds = bytes(DELETE if end else kind for kind, end in rows)
    left = pack_u64(NO_EXPIRY if end else expiry for expiry, end in zip(expiries, ended, strict=True))
    values = [b"" if end else value for value, end in zip(columns.values, ended, strict=True)]
    return Columns(columns.keys, collapse(kinds, 1), columns.versions, collapse(left, 8), values)
