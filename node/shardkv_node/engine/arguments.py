"""What users of an `Engine` pass, checked and packed: keys, values, ranges.

Everything here returns bytes that the store takes as they are, or raises one sentence that says what is wrong.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import cast

from shardkv.errors import InvalidArgument, InvalidKey, InvalidRange, KeyTooLarge, ValueTooLarge
from shardkv.limits import TTL_MS_MAX
from shardkv.whole_number import LEAST, MOST, in_range
from shardkv.write_batch import Text, pack_text


def pack_key(key: Text, bytes_max: int) -> bytes:
    """Raises `InvalidArgument`, `InvalidKey`, `KeyTooLarge`."""
    packed = pack_text(key, "key")
    if not packed:
        raise InvalidKey("A key is empty.", hint="Use at least one byte.")
    if len(packed) > bytes_max:
        raise KeyTooLarge(
            f"A key is {len(packed)} bytes long; the limit is {bytes_max} bytes.",
            detail={"bytes": len(packed), "limit": bytes_max},
            hint="Use a shorter key, for example a hash of this one.",
        )
    return packed


def pack_keys(keys: Iterable[Text], bytes_max: int) -> list[bytes]:
    """As `pack_key` for each."""
    if not isinstance(keys, Iterable):
        raise InvalidArgument(f"Keys are a list, or anything to iterate over, not {type(keys).__name__}.")
    given = list(keys)
    if set(map(type, given)) == {bytes}:
        lengths = list(map(len, given))
        if min(lengths) and max(lengths) <= bytes_max:
            return cast(list[bytes], given)
    return [pack_key(key, bytes_max) for key in given]


def pair_columns(items: Iterable[tuple[Text, Text]]) -> tuple[list[Text], list[Text]]:
    """The keys and the values of (key, value) pairs. Raises `InvalidArgument`."""
    if not isinstance(items, Iterable):
        raise InvalidArgument(f"Pairs of key and value are expected, not {type(items).__name__}.")
    pairs = list(items)
    try:
        return [key for key, _ in pairs], [value for _, value in pairs]
    except (TypeError, ValueError):
        wrong = next(pair for pair in pairs if not isinstance(pair, tuple | list) or len(pair) != 2)
        raise InvalidArgument(
            f"Pairs of key and value are expected, not {wrong!r:.60}.", hint="Give a dict, or a list of (key, value)."
        ) from None


def pack_path(directory: object) -> str:
    """The path of a store's directory. Raises `InvalidArgument`."""
    try:
        path = os.fsdecode(cast(str, directory))
    except TypeError:
        raise InvalidArgument(f"A directory is a str or a path, not {type(directory).__name__}.") from None
    if not path or "\0" in path:
        raise InvalidArgument(f"The directory {path!r} cannot be: a path is not empty and has no NUL in it.")
    return path


def pack_value(value: Text, bytes_max: int) -> bytes:
    """Raises `InvalidArgument`, `ValueTooLarge`."""
    packed = pack_text(value, "value")
    if len(packed) > bytes_max:
        raise ValueTooLarge(
            f"A value is {len(packed)} bytes long; the limit is {bytes_max} bytes.",
            detail={"bytes": len(packed), "limit": bytes_max},
            hint="Cut it into several values.",
        )
    return packed


def check_columns(keys: list[bytes], values: list[bytes], key_bytes_max: int, value_bytes_max: int) -> None:
    """As `pack_key` and `pack_value` for every operation of a batch that is not empty."""
    lengths = list(map(len, keys))
    if not min(lengths) or max(lengths) > key_bytes_max:
        for key in keys:
            pack_key(key, key_bytes_max)
    if max(map(len, values)) > value_bytes_max:
        for value in values:
            pack_value(value, value_bytes_max)


def pack_bounds(start: Text, stop: Text | None, prefix: Text | None) -> tuple[bytes, bytes | None]:
    """The range to scan, as [start, stop) with None for no end. Raises `InvalidRange`."""
    low = pack_text(start, "start of a range")
    high = None if stop is None else pack_text(stop, "end of a range")
    if high is not None and high < low:
        raise InvalidRange(
            f"The range stops at {high[:40]!r}, before it starts at {low[:40]!r}.",
            hint="Give the smaller key first; use reverse to read backwards.",
        )
    if prefix is None:
        return low, high
    first = pack_text(prefix, "prefix")
    after = prefix_end(first)
    low = max(low, first)
    high = after if high is None else high if after is None else min(high, after)
    return low, high if high is None or high > low else low


def check_limit(limit: object) -> None:
    """Raises `InvalidArgument` unless it is None or a whole number of at least 0."""
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 0):
        raise InvalidArgument(f"A limit is a whole number of at least 0, not {limit!r}.")


def check_ttl(ttl_ms: object) -> None:
    """Raises `InvalidArgument` unless it is a whole number of milliseconds that may be added to any time of today."""
    if not isinstance(ttl_ms, int) or isinstance(ttl_ms, bool) or not 0 < ttl_ms <= TTL_MS_MAX:
        raise InvalidArgument(
            f"A time to live is a whole number of milliseconds from 1 to {TTL_MS_MAX}, not {ttl_ms!r}.",
            hint="Leave it out for a key that stays.",
        )


def check_amount(by: object) -> None:
    """Raises `InvalidArgument` unless it is a whole number of 64 bits."""
    if not isinstance(by, int) or isinstance(by, bool) or not in_range(by):
        raise InvalidArgument(f"An amount to count by is a whole number from {LEAST} to {MOST}, not {by!r}.")


def pack_condition(key: bytes, version: object, *, if_absent: bool = False) -> tuple[bytes, int]:
    """What `Write.conditions` takes. Raises `InvalidArgument`."""
    if if_absent and version is not None:
        raise InvalidArgument(
            "A put takes if_absent or if_version, not both.", hint="A version of 0 means absent, too."
        )
    if if_absent:
        return key, 0
    if not isinstance(version, int) or isinstance(version, bool) or version < 0:
        raise InvalidArgument(f"A version is a whole number of at least 0, not {version!r}.")
    return key, version


def prefix_end(prefix: bytes) -> bytes | None:
    """The first key after all keys with this prefix; None when there is none."""
    stem = prefix.rstrip(b"\xff")
    return stem[:-1] + bytes((stem[-1] + 1,)) if stem else None
