"""User operations as calls, and calls' results as what users get. Pure.

Invariant: every argument is checked before the first call is returned, so bad input sends nothing at all.
Operations on many keys are cut into requests of at most REQUEST_OPERATIONS and about REQUEST_BYTES each; an atomic
batch is never cut, it is refused with BatchTooLarge instead.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, chain
from typing import TypeVar

from shardkv.client.arguments import Decode, Out, to_column
from shardkv.client.calls import EXISTED, Call, ReadCall, WriteCall
from shardkv.errors import BatchTooLarge, InvalidArgument
from shardkv.limits import MIB, Limits
from shardkv.wire.checks import check_keys, check_values
from shardkv.wire.messages import NOTHING, Kind, Op, decode_any
from shardkv.write_batch import Text, WriteBatch, pack_text

REQUEST_OPERATIONS = 1_000
REQUEST_BYTES = 1 * MIB
WINDOW = 4
"""Requests of one operation on many keys that are in flight at once."""
OPERATION_OVERHEAD_BYTES = 12
REQUEST_OVERHEAD_BYTES = 256

PUT, DELETE = int(Kind.PUT), int(Kind.DELETE)

Key = TypeVar("Key")


def get(key: Text, limits: Limits) -> ReadCall:
    """Read one key."""
    keys = [pack_text(key, "key")]
    check_keys(keys, limits)
    return ReadCall(keys)


def put(key: Text, value: Text, limits: Limits) -> WriteCall:
    """Write one key."""
    keys, values = [pack_text(key, "key")], [pack_text(value, "value")]
    _check_columns(keys, values, limits)
    return WriteCall(PUT, keys, values, want_existed=False)


def delete(key: Text, limits: Limits) -> WriteCall:
    """Delete one key and learn whether it existed."""
    keys = [pack_text(key, "key")]
    check_keys(keys, limits)
    return WriteCall(DELETE, keys, [b""], want_existed=True)


def listed(keys: Iterable[Key]) -> list[Key]:
    """The keys of a `get_many`, to be gone through twice. Raises InvalidArgument for a lone str or bytes."""
    if isinstance(keys, str | bytes | bytearray | memoryview) or not isinstance(keys, Iterable):
        raise InvalidArgument(f"Several keys are expected, not {type(keys).__name__}.", hint="Pass a list of keys.")
    return list(keys)


def get_many(keys: Sequence[str] | Sequence[bytes], limits: Limits) -> list[ReadCall]:
    """Read many keys; `by_key` puts the answers together."""
    column = to_column(keys, "key")
    _check_columns(column, [], limits)
    return [ReadCall(column[part]) for part in _parts(column, [], limits)]


def put_many(mapping: Mapping[str, Text] | Mapping[bytes, Text], limits: Limits) -> list[WriteCall]:
    """Write many keys; not atomic."""
    if not isinstance(mapping, Mapping):
        raise InvalidArgument(
            f"put_many takes a mapping of keys to values, not {type(mapping).__name__}.",
            hint="Use batch_put(keys, values) for two lists.",
        )
    return batch_put(list(mapping), list(mapping.values()), limits)


def batch_put(keys: Sequence[Text], values: Sequence[Text], limits: Limits) -> list[WriteCall]:
    """Write many keys; not atomic. The last value wins when a key comes twice."""
    key_column, value_column = to_column(keys, "key"), to_column(values, "value")
    if len(key_column) != len(value_column):
        raise InvalidArgument(f"There are {len(key_column)} keys and {len(value_column)} values.")
    unique = dict(zip(key_column, value_column, strict=True))
    if len(unique) < len(key_column):
        key_column, value_column = list(unique), list(unique.values())
    _check_columns(key_column, value_column, limits)
    return [
        WriteCall(PUT, key_column[part], value_column[part], want_existed=False, may_cut=True)
        for part in _parts(key_column, value_column, limits)
    ]


def delete_many(keys: Iterable[Text], limits: Limits) -> list[WriteCall]:
    """Delete many keys and learn how many existed; not atomic."""
    column = list(dict.fromkeys(to_column(keys, "key")))
    _check_columns(column, [], limits)
    return [
        WriteCall(DELETE, column[part], [b""] * len(column[part]), want_existed=True, may_cut=True)
        for part in _parts(column, [], limits)
    ]


def write(batch: WriteBatch, limits: Limits) -> list[WriteCall]:
    """A batch as one request, atomic per shard; no call for an empty one. Raises BatchTooLarge."""
    if not isinstance(batch, WriteBatch):
        raise InvalidArgument(f"write takes a WriteBatch, not {type(batch).__name__}.")
    keys, values = list(batch.keys), list(batch.values)
    if not keys:
        return []
    bytes_total = sum(map(len, keys)) + sum(map(len, values)) + OPERATION_OVERHEAD_BYTES * len(keys)
    if len(keys) > limits.operations_max or bytes_total > limits.frame_bytes_max - REQUEST_OVERHEAD_BYTES:
        raise BatchTooLarge(
            f"The batch holds {len(keys)} operations and {bytes_total} bytes; an atomic batch may hold "
            f"{limits.operations_max} operations and {limits.frame_bytes_max - REQUEST_OVERHEAD_BYTES} bytes.",
            detail={"count": len(keys), "bytes": bytes_total},
            hint="Use several batches, or put_many and delete_many, which are cut as needed but are not atomic.",
        )
    _check_columns(keys, values, limits)
    return [WriteCall(bytes(batch.kinds), keys, values, want_existed=False)]


def ping() -> Call:
    return Call(Op.PING, NOTHING, decode_any)


def status() -> Call:
    return Call(Op.STATUS, NOTHING, decode_any)


def existed(calls: Sequence[WriteCall]) -> int:
    """How many deleted keys existed."""
    return sum(call.results.count(EXISTED) for call in calls)


def by_key(keys: Sequence[Key], calls: Sequence[ReadCall], decode: Decode[Out]) -> dict[Key, Out | None]:
    """What `get_many` returns: the values of its calls, by key as given, in order of asking."""
    values = chain.from_iterable(call.values for call in calls)
    return {key: None if value is None else decode(value) for key, value in zip(keys, values, strict=True)}


def _check_columns(keys: list[bytes], values: list[bytes], limits: Limits) -> None:
    if len(keys) > limits.operations_max:
        limits = replace(limits, operations_max=len(keys))
    check_keys(keys, limits)
    check_values(values, limits)


def _parts(keys: list[bytes], values: list[bytes], limits: Limits) -> Iterator[slice]:
    """Where to cut columns into requests."""
    most = min(REQUEST_OPERATIONS, limits.operations_max)
    sizes = [*map(len, keys)] if not values else [*map(int.__add__, map(len, keys), map(len, values))]
    if len(keys) <= most and sum(sizes) <= REQUEST_BYTES:
        if keys:
            yield slice(0, len(keys))
        return
    ends = list(accumulate(sizes))
    start = 0
    while start < len(keys):
        before = ends[start - 1] if start else 0
        stop = bisect_right(ends, before + REQUEST_BYTES, start, min(start + most, len(keys)))
        stop = max(stop, start + 1)
        yield slice(start, stop)
        start = stop
