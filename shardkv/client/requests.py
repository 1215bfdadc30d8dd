"""User operations as calls, and calls' results as what users get. Pure.

Invariant: every argument is checked before the first call is returned, so bad input sends nothing at all.
Operations on many keys are cut into requests of at most REQUEST_OPERATIONS and about REQUEST_BYTES each; an atomic
batch is never cut, it is refused with BatchTooLarge instead.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, chain, compress
from typing import TypeVar, cast

from shardkv.client.arguments import Decode, Out, as_given, to_amount, to_column, to_ttl_ms, to_version
from shardkv.client.calls import EXISTED, Call, PartialReadCall, ReadCall, VersionedReadCall, WriteCall
from shardkv.client.deleting import DeleteRangeCall
from shardkv.client.missing import Missing, PartialCount, PartialDict, missing_of
from shardkv.client.scan import check_limit, to_bounds
from shardkv.errors import BatchTooLarge, InvalidArgument, RemoteProtocolError
from shardkv.limits import MIB, Limits
from shardkv.whole_number import format_number
from shardkv.wire.checks import check_keys, check_values
from shardkv.wire.messages import NOTHING, Conditions, Count, Kind, Op, decode_any, decode_count_reply
from shardkv.write_batch import Text, WriteBatch, pack_text

REQUEST_OPERATIONS = 1_000
REQUEST_BYTES = 1 * MIB
WINDOW = 4
"""Requests of one operation on many keys that are in flight at once."""
OPERATION_OVERHEAD_BYTES = 12
REQUEST_OVERHEAD_BYTES = 256

PUT, DELETE, INCR = int(Kind.PUT), int(Kind.DELETE), int(Kind.INCR)

Key = TypeVar("Key")


def get(key: Text, limits: Limits, *, with_version: bool = False) -> ReadCall:
    """Read one key."""
    keys = [key if type(key) is bytes else pack_text(key, "key")]
    check_keys(keys, limits)
    return VersionedReadCall(keys) if with_version else ReadCall(keys)


def put(
    key: Text,
    value: Text,
    limits: Limits,
    *,
    ttl: float | None = None,
    if_version: int | None = None,
    if_absent: bool = False,
) -> WriteCall:
    """Write one key."""
    keys, values = [pack_text(key, "key")], [value if type(value) is bytes else pack_text(value, "value")]
    check_keys(keys, limits)
    check_values(values, limits)
    if ttl is None and if_version is None and not if_absent:
        return WriteCall(PUT, keys, values, want_existed=False)
    conditions = _condition(keys, if_version, if_absent=if_absent)
    return WriteCall(PUT, keys, values, want_existed=False, conditions=conditions, ttl_ms=to_ttl_ms(ttl))


def delete(key: Text, limits: Limits, *, if_version: int | None = None) -> WriteCall:
    """Delete one key and learn whether it existed."""
    keys = [pack_text(key, "key")]
    check_keys(keys, limits)
    return WriteCall(DELETE, keys, [b""], want_existed=True, conditions=_condition(keys, if_version))


def incr(key: Text, by: int, limits: Limits, *, ttl: float | None = None) -> WriteCall:
    """Add to the number of one key; the sum is the call's `number`."""
    keys = [pack_text(key, "key")]
    check_keys(keys, limits)
    return WriteCall(INCR, keys, [format_number(to_amount(by))], want_existed=False, ttl_ms=to_ttl_ms(ttl))


def _condition(keys: list[bytes], if_version: int | None, *, if_absent: bool = False) -> Conditions | None:
    if if_absent and if_version is not None:
        raise InvalidArgument(
            "A put takes if_absent or if_version, not both.", hint="A version of 0 means absent, too."
        )
    if if_absent:
        return Conditions(keys, [0])
    return None if if_version is None else Conditions(keys, [to_version(if_version)])


def listed(keys: Iterable[Key]) -> list[Key]:
    """The keys of a `get_many`, to be gone through twice. Raises InvalidArgument for a lone str or bytes."""
    if isinstance(keys, str | bytes | bytearray | memoryview) or not isinstance(keys, Iterable):
        raise InvalidArgument(f"Several keys are expected, not {type(keys).__name__}.", hint="Pass a list of keys.")
    return list(keys)


def get_many(keys: Sequence[str] | Sequence[bytes], limits: Limits, *, with_version: bool = False) -> list[ReadCall]:
    """Read many keys; `by_key` or `versioned_by_key` puts the answers together."""
    column = to_column(keys, "key")
    kind = VersionedReadCall if with_version else ReadCall
    return [kind(column[part]) for part in _cut(column, [], limits)]


def get_some(
    keys: Sequence[str] | Sequence[bytes], limits: Limits, *, with_version: bool = False
) -> list[PartialReadCall]:
    """Read many keys, without those of shards that are away; `some_by_key` puts the answers together."""
    column = to_column(keys, "key")
    return [PartialReadCall(column[part], with_versions=with_version) for part in _cut(column, [], limits)]


def put_many(
    mapping: Mapping[str, Text] | Mapping[bytes, Text], limits: Limits, *, ttl: float | None = None
) -> list[WriteCall]:
    """Write many keys; not atomic."""
    if not isinstance(mapping, Mapping):
        raise InvalidArgument(
            f"put_many takes a mapping of keys to values, not {type(mapping).__name__}.",
            hint="Use batch_put(keys, values) for two lists.",
        )
    return batch_put(list(mapping), list(mapping.values()), limits, ttl=ttl)


def batch_put(
    keys: Sequence[Text], values: Sequence[Text], limits: Limits, *, ttl: float | None = None
) -> list[WriteCall]:
    """Write many keys; not atomic. The last value wins when a key comes twice."""
    key_column, value_column = to_column(keys, "key"), to_column(values, "value")
    if len(key_column) != len(value_column):
        raise InvalidArgument(f"There are {len(key_column)} keys and {len(value_column)} values.")
    if len(set(key_column)) < len(key_column):
        unique = dict(zip(key_column, value_column, strict=True))
        key_column, value_column = list(unique), list(unique.values())
    ttl_ms = to_ttl_ms(ttl)
    return [
        WriteCall(PUT, key_column[part], value_column[part], want_existed=False, may_cut=True, ttl_ms=ttl_ms)
        for part in _cut(key_column, value_column, limits)
    ]


def delete_many(keys: Iterable[Text], limits: Limits) -> list[WriteCall]:
    """Delete many keys and learn how many existed; not atomic."""
    column = list(dict.fromkeys(to_column(keys, "key")))
    return [
        WriteCall(DELETE, column[part], [b""] * len(column[part]), want_existed=True, may_cut=True)
        for part in _cut(column, [], limits)
    ]


def write(
    batch: WriteBatch, limits: Limits, *, if_versions: Mapping[str, int] | Mapping[bytes, int] | None = None
) -> list[WriteCall]:
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
    conditions = _batch_conditions(if_versions, limits)
    return [WriteCall(batch.kinds, keys, values, want_existed=False, conditions=conditions)]


def _batch_conditions(if_versions: Mapping[str, int] | Mapping[bytes, int] | None, limits: Limits) -> Conditions | None:
    if if_versions is None:
        return None
    if not isinstance(if_versions, Mapping):
        raise InvalidArgument(f"if_versions is a mapping of keys to versions, not {type(if_versions).__name__}.")
    keys = to_column(if_versions, "key")
    check_keys(keys, limits)
    return Conditions(keys, [to_version(version) for version in if_versions.values()]) if keys else None


def count(start: Text, stop: Text | None, prefix: Text | None, limits: Limits, *, partial: bool = False) -> list[Call]:
    """Count a range; no call for an empty one."""
    low, high = to_bounds(start, stop, prefix, limits)
    if high is not None and low >= high:
        return []
    return [Call(Op.COUNT, Count(low, high, partial), decode_count_reply)]


def counted(
    calls: Sequence[Call], start: Text, stop: Text | None, prefix: Text | None, limits: Limits, *, partial: bool
) -> int | PartialCount:
    """What `count` of this range returns."""
    total: int = sum(call.result.count for call in calls)
    if not partial:
        return total
    low, high = to_bounds(start, stop, prefix, limits)
    return PartialCount(total, [missing_of(problem, low, high) for call in calls for problem in call.result.problems])


def delete_range(
    start: Text, stop: Text | None, prefix: Text | None, limit: int | None, limits: Limits
) -> list[DeleteRangeCall]:
    """Delete a range, or the first keys of it; no call for an empty one."""
    low, high = to_bounds(start, stop, prefix, limits)
    if check_limit(limit) == 0 or (high is not None and low >= high):
        return []
    return [DeleteRangeCall(low, high, limit)]


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
    if decode is as_given:
        return cast(dict[Key, Out | None], dict(zip(keys, values, strict=True)))
    return {key: None if value is None else decode(value) for key, value in zip(keys, values, strict=True)}


def versioned_by_key(
    keys: Sequence[Key], calls: Sequence[ReadCall], decode: Decode[Out]
) -> dict[Key, tuple[Out, int] | None]:
    """What `get_many` with versions returns."""
    rows = chain.from_iterable(versioned(call, decode) for call in calls)
    return dict(zip(keys, rows, strict=True))


def some_by_key(
    keys: Sequence[Key], calls: Sequence[PartialReadCall], decode: Decode[Out]
) -> PartialDict[Key, Out | None]:
    """What a partial `get_many` returns: what was read, by key as given, in order of asking, and what was not."""
    values = chain.from_iterable(call.values for call in calls)
    found = zip(keys, values, strict=True)
    return PartialDict(
        ((key, None if value is None else decode(value)) for key, value in compress(found, _was_read(calls))),
        _missing_of_reads(calls),
    )


def some_versioned_by_key(
    keys: Sequence[Key], calls: Sequence[PartialReadCall], decode: Decode[Out]
) -> PartialDict[Key, tuple[Out, int] | None]:
    """What a partial `get_many` with versions returns."""
    values = chain.from_iterable(call.values for call in calls)
    versions = chain.from_iterable(call.versions for call in calls)
    found = zip(keys, values, versions, strict=True)
    return PartialDict(
        (
            (key, None if value is None else (decode(value), version))
            for key, value, version in compress(found, _was_read(calls))
        ),
        _missing_of_reads(calls),
    )


def _was_read(calls: Sequence[PartialReadCall]) -> Iterator[bool]:
    return (place not in call.lacking for call in calls for place in range(len(call.keys)))


def _missing_of_reads(calls: Sequence[PartialReadCall]) -> list[Missing]:
    """Each shard once, whole: the keys of a read lie anywhere in it."""
    problems = {problem.shard: problem for call in calls for problem in call.problems}
    return [missing_of(problem, b"", None) for problem in problems.values()]


def versioned(call: ReadCall, decode: Decode[Out]) -> list[tuple[Out, int] | None]:
    """(value, version) of each key of a call that asked for versions; None where there is no value."""
    assert isinstance(call, VersionedReadCall)
    return [
        None if value is None else (decode(value), version)
        for value, version in zip(call.values, call.versions, strict=True)
    ]


def version_of(call: WriteCall) -> int:
    """The version of a write of one key. Raises RemoteProtocolError."""
    if call.reply is None or call.reply.version is None:
        raise RemoteProtocolError("The router said that a write was applied, and not its version.")
    return call.reply.version


def sum_of(call: WriteCall) -> int:
    """What an incr came to. Raises RemoteProtocolError."""
    if call.reply is None or call.reply.number is None:
        raise RemoteProtocolError("The router said that an incr was applied, and not its sum.")
    return call.reply.number


def shared_version(calls: Sequence[WriteCall]) -> int | None:
    """The version of a batch; None when it was empty, or several shards took part."""
    return calls[0].reply.version if calls and calls[0].reply is not None else None


def _cut(keys: list[bytes], values: list[bytes], limits: Limits) -> list[slice]:
    """Where to cut columns, whose keys and values are checked first, into requests. No values: those are left out."""
    key_bytes, value_bytes = sum(map(len, keys)), sum(map(len, values))
    if key_bytes > limits.key_bytes_max or value_bytes > limits.value_bytes_max or not all(keys):
        _check_columns(keys, values, limits)  # otherwise none can be too long
    most = min(REQUEST_OPERATIONS, limits.operations_max)
    if len(keys) <= most and key_bytes + value_bytes <= REQUEST_BYTES:
        return [slice(0, len(keys))] if keys else []
    return list(_parts(keys, values, most))


def _check_columns(keys: list[bytes], values: list[bytes], limits: Limits) -> None:
    if len(keys) > limits.operations_max:
        limits = replace(limits, operations_max=len(keys))
    check_keys(keys, limits)
    check_values(values, limits)


def _parts(keys: list[bytes], values: list[bytes], most: int) -> Iterator[slice]:
    """Slices of at most so many operations and about REQUEST_BYTES each."""
    ends = list(accumulate(map(int.__add__, map(len, keys), map(len, values)) if values else map(len, keys)))
    start = 0
    while start < len(keys):
        before = ends[start - 1] if start else 0
        stop = bisect_right(ends, before + REQUEST_BYTES, start, min(start + most, len(keys)))
        stop = max(stop, start + 1)
        yield slice(start, stop)
        start = stop
