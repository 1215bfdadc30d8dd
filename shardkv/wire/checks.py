"""Checks of user keys, values and ranges against the limits: one place, for clients, routers and nodes.

Every function returns None when all is well and raises a RequestError that says which limit and by how much.
Columns are checked with C loops (`min`, `max` over `map(len)`); Python looks for the culprit only when there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress

from shardkv.errors import (
    BatchTooLarge,
    InvalidArgument,
    InvalidKey,
    InvalidRange,
    KeyTooLarge,
    ValueTooLarge,
)
from shardkv.limits import TTL_MS_MAX, Limits
from shardkv.whole_number import parse_number
from shardkv.wire.messages import TOKEN_LANE_BYTES, Conditions, Kind, Token, Write

_MIXED = bytes((Kind.PUT, Kind.DELETE))
"""Kinds that may stand side by side in one write."""
_IS_DELETE = bytes(kind == Kind.DELETE for kind in range(256))


def check_keys(keys: Sequence[bytes], limits: Limits) -> None:
    """Raises InvalidKey for an empty key, KeyTooLarge, BatchTooLarge."""
    if not keys or (len(keys) == 1 and 0 < len(keys[0]) <= limits.key_bytes_max):
        return
    if len(keys) > limits.operations_max:
        raise BatchTooLarge(
            f"A request holds {len(keys)} keys; the limit is {limits.operations_max}.",
            detail={"count": len(keys), "limit": limits.operations_max},
            hint="Split it into several requests.",
        )
    lengths = list(map(len, keys))
    if not min(lengths):
        raise InvalidKey("A key is empty.", detail={"index": lengths.index(0)}, hint="Use at least one byte.")
    longest = max(lengths)
    if longest > limits.key_bytes_max:
        raise KeyTooLarge(
            f"A key is {longest} bytes long; the limit is {limits.key_bytes_max} bytes.",
            detail={"index": lengths.index(longest), "bytes": longest, "limit": limits.key_bytes_max},
            hint="Use a shorter key, for example a hash of this one.",
        )


def check_values(values: Sequence[bytes], limits: Limits) -> None:
    """Raises ValueTooLarge."""
    if len(values) == 1 and len(values[0]) <= limits.value_bytes_max:
        return
    longest = max(map(len, values), default=0)
    if longest > limits.value_bytes_max:
        index = [len(value) for value in values].index(longest)
        raise ValueTooLarge(
            f"A value is {longest} bytes long; the limit is {limits.value_bytes_max} bytes.",
            detail={"index": index, "bytes": longest, "limit": limits.value_bytes_max},
            hint="Cut it into several values.",
        )


def check_read(keys: Sequence[bytes], limits: Limits) -> None:
    """Raises InvalidArgument for no keys at all, and what `check_keys` raises."""
    if not keys:
        raise InvalidArgument("A read holds no key.")
    check_keys(keys, limits)


def check_write(write: Write, limits: Limits) -> None:
    """Keys, values and that the columns of a write agree."""
    count = len(write.keys)
    if not count:
        raise InvalidArgument("A write holds no operation.")
    check_token(write.token)
    if len(write.values) != count:
        raise InvalidArgument(f"A write has {count} keys and {len(write.values)} values.")
    if write.kinds != Kind.PUT:
        _check_kinds(write, count)
    check_keys(write.keys, limits)
    check_values(write.values, limits)
    if write.conditions is not None:
        _check_conditions(write.conditions, limits)
    if write.ttl_ms is not None:
        _check_ttl(write)


def check_token(token: Token | None) -> None:
    """Raises InvalidArgument."""
    if token is None:
        return
    if len(token.lane) != TOKEN_LANE_BYTES or not 0 < token.number < 1 << 64:
        raise InvalidArgument(
            f"The token of a write is {TOKEN_LANE_BYTES} bytes and a number from 1 to 2**64 - 1, not "
            f"{len(token.lane)} bytes and {token.number}."
        )


def _check_conditions(conditions: Conditions, limits: Limits) -> None:
    if not conditions.keys or len(conditions.keys) != len(conditions.versions):
        raise InvalidArgument(
            f"The conditions of a write are {len(conditions.keys)} keys and {len(conditions.versions)} versions."
        )
    check_keys(conditions.keys, limits)


def _check_ttl(write: Write) -> None:
    if not 0 < (write.ttl_ms or 0) <= TTL_MS_MAX:
        raise InvalidArgument(f"A time to live is 1 to {TTL_MS_MAX} milliseconds, not {write.ttl_ms}.")
    if write.kinds not in (Kind.PUT, Kind.INCR):
        raise InvalidArgument("A write with a time to live holds puts only, or an incr.")


def _check_incr(write: Write) -> None:
    if len(write.keys) != 1 or parse_number(write.values[0]) is None:
        raise InvalidArgument("An incr is alone in its write, and its value a whole number of 64 bits as decimal text.")


def _check_kinds(write: Write, count: int) -> None:
    if write.kinds == Kind.INCR:
        _check_incr(write)
        return
    known = isinstance(write.kinds, bytes) or 0 < write.kinds < 256
    kinds = write.kinds if isinstance(write.kinds, bytes) else bytes((write.kinds if known else 0,)) * count
    if kinds.strip(_MIXED):
        raise InvalidArgument("A write has an operation that is neither a put nor a delete.")
    if len(kinds) != count:
        raise InvalidArgument(f"A write has {count} keys and {len(kinds)} kinds.")
    if any(compress(write.values, kinds.translate(_IS_DELETE))):
        raise InvalidArgument("A write has a delete with a value.", hint="The value of a delete is empty.")


def check_range(start: bytes, stop: bytes | None, limits: Limits) -> None:
    """Raises InvalidRange when `stop` is before `start`; an empty range (equal bounds) is fine."""
    if stop is not None and stop < start:
        raise InvalidRange(
            f"The range stops at {stop[:40]!r}, before it starts at {start[:40]!r}.",
            hint="Give the smaller key first; use reverse to read backwards.",
        )
    for bound in (start, stop):
        if bound is not None and len(bound) > limits.key_bytes_max + 1:
            raise KeyTooLarge(
                f"A bound of a range is {len(bound)} bytes long; the limit is {limits.key_bytes_max} bytes.",
                detail={"bytes": len(bound), "limit": limits.key_bytes_max},
            )
