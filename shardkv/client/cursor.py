"""Cursors: what is left of a scan, as text that any client can go on from, on any router, after any restart.

    cursor = base64url without padding of: check u32 LE | body
    body   = msgpack [1, keyspace, reverse, start, stop]        what is left: [start, stop), stop nil for no end
    check  = crc32c of the body

Users must not look into one: the first number is the version, and a later release may write another. It holds bounds
and a direction, nothing that a restart or a move of shards could spoil, so it does not expire.
"""

from __future__ import annotations

import base64
import binascii

import google_crc32c
import msgspec

from shardkv.errors import InvalidArgument

VERSION = 1
_CHECK_BYTES = 4


class Cursor(msgspec.Struct, array_like=True, frozen=True, tag=VERSION):
    """What is left of a scan: the keys of [start, stop), highest first with `reverse`."""

    keyspace: str
    reverse: bool
    start: bytes
    stop: bytes | None


_decode = msgspec.msgpack.Decoder(Cursor).decode


def encode_cursor(cursor: Cursor) -> str:
    """The text a user keeps."""
    body = msgspec.msgpack.encode(cursor)
    check = google_crc32c.value(body).to_bytes(_CHECK_BYTES, "little")
    return base64.urlsafe_b64encode(check + body).rstrip(b"=").decode()


def decode_cursor(text: object, *, keyspace: str) -> Cursor:
    """What `encode_cursor` was given. Raises InvalidArgument for anything else, or for another keyspace's cursor."""
    if not isinstance(text, str):
        raise InvalidArgument(f"A cursor is the text that a scan's `cursor` gave, not {type(text).__name__}.")
    try:
        packed = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        body = packed[_CHECK_BYTES:]
        if google_crc32c.value(body).to_bytes(_CHECK_BYTES, "little") != packed[:_CHECK_BYTES]:
            raise ValueError("its checksum is wrong")
        cursor = _decode(body)
    except (binascii.Error, ValueError) as error:  # msgspec's errors are ValueErrors, too
        raise InvalidArgument(
            f"The cursor {text[:40]!r} is not whole: {str(error).rstrip('.')}.",
            hint="Pass a scan's `cursor` as it was given, or begin anew without one.",
        ) from None
    if cursor.keyspace != keyspace:
        raise InvalidArgument(
            f"The cursor belongs to keyspace {cursor.keyspace!r}; this client reads {keyspace!r}.",
            hint="Use a client of that keyspace.",
        )
    return cursor
