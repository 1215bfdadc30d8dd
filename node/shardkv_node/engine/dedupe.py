"""What a write that carries an idempotency token came to, kept so that the write, asked for again, is not made again.

A token is (lane, number). A *lane* is one caller's sequence of writes, one after the other, named by 16 bytes that are
nobody else's; its numbers rise. So of each lane the newest record is enough:

    number as recorded   the write was made, or refused for good: it gets the recorded outcome
    number below it      its caller has gone on since: refused, never made
    number above, or no record: a new write

A tablet's records are the rows of a second tablet, its *records tablet*: lane -> record, msgpack, with an expiry. They
are logged in the group of their writes, so that both are there after a crash or neither; and they are flushed,
compacted, ended, exported, imported, moved and given to both halves of a split as rows are. Each lane takes one row,
whatever it writes: the bytes are bounded by the lanes of one retention.

At a merge of two tablets the records of both are united (`united`): of a lane that has one in each, the higher number
wins. A record then tells of the keys of its own tablet only (coverage.py), so that the other part of the same request,
not made before the merge, is still new afterwards; two records of one number become one that tells of both parts.

A refusal is recorded only of a write that may have been sent before (`Write.again`): another copy of it may still be
on its way, and must not be made once its caller was told that it was refused. Other refusals are judged anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import msgspec
import xxhash

from shardkv.errors import InvalidArgument, OutcomeUnknown, ShardKVError, from_wire
from shardkv.whole_number import format_number
from shardkv_node.engine.columns import PUT_EXPIRING
from shardkv_node.engine.coverage import Bound, Coverage, coverage_of, covered, joined, narrowed
from shardkv_node.engine.entries import Token
from shardkv_node.engine.memtable import EXPIRING_HEADER_BYTES
from shardkv_node.engine.tablet import Tablet
from shardkv_node.engine.write import Write

RETENTION_MS = 25 * 3600 * 1000
"""How long a record is kept after the write: longer than any request may be under way (lone.DEADLINE_MS_MAX)."""
_HASH_BYTES = 8


class Record(msgspec.Struct, array_like=True, gc=False):
    """What a write came to. On disk: fields are added only at the end, with a default."""

    number: int
    version: int
    """0: it was refused."""
    operations: int
    existed: int | bytes | None = None
    """None: not asked for; one for all operations, or one byte each."""
    total: int | None = None
    """What a write with `add` came to."""
    keys: bytes = b""
    """Where `existed` has one byte each: the xxh3-64 of every key. After a split a part of the operations may be asked
    for again."""
    refusal: tuple[str, str, dict[str, Any], str] | None = None
    """Code, message, detail and hint of the error."""
    covers: Coverage | None = None
    """The keys it tells of; None: all of its tablet."""
    otherwise: int | None = None
    """Of a united record: whether a key that `keys` does not have existed. None: not united."""


Records = dict[bytes, Record]
"""By lane, those that a group makes."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Record).decode


def judge(write: Write, token: Token, tablet: Tablet, made: Records) -> bool | ShardKVError | Record:
    """What the records say of a write. False: nothing, it is new. True: it was made before, and now has the outcome it
    had then. An error: refuse it with that. A record: it is new, and its record is to be `with_part` of that one.
    `made`: records of what stands earlier in the group."""
    lane, number = token
    record = made.get(lane) or _find(tablet.records, lane)
    if record is None:
        return False
    if number > record.number:
        return False
    if number < record.number:
        return InvalidArgument(
            f"A write has number {number} of its lane, whose newest is {record.number}. It was not made now.",
            hint="A lane's writes are sent one after the other, each once the one before is answered or given up.",
        )
    if record.covers is not None:
        known = covered(record.covers, write.keys)
        if not any(known):
            return record
        if not all(known):
            return OutcomeUnknown(
                "A part of this write was made, or refused, before its shard was merged with the other part's.",
                hint="Read the keys before writing them again.",
            )
    if record.refusal is not None:
        return from_wire(*record.refusal)
    if len(write.keys) > record.operations:
        return InvalidArgument(
            f"A write of {len(write.keys)} operations has the token of one of {record.operations}.",
            hint="Another write needs another number.",
        )
    _repeat(write, record)
    return True


def all_new(writes: Iterable[tuple[int, Token]], tablets: Mapping[int, Tablet]) -> bool:
    """Whether none of these writes, (tablet, token), was made or refused before, and no two are of one lane."""
    seen: set[tuple[int, bytes]] = set()
    count = 0
    for number, (lane, place) in writes:
        tablet = tablets.get(number)
        record = None if tablet is None else _find(tablet.records, lane)
        if record is not None and place <= record.number:
            return False
        seen.add((number, lane))
        count += 1
    return len(seen) == count


def _find(records: Tablet | None, lane: bytes) -> Record | None:
    """The lane's record. Whether one in memory has ended is not asked: it does no harm."""
    if records is None:
        return None
    cell = records.active.cells.get(lane)
    if cell is not None:
        return _decode(cell[EXPIRING_HEADER_BYTES:])
    value = records.get(lane)
    return None if value is None else _decode(value)


def _repeat(write: Write, record: Record) -> None:
    """Give the write the outcome it had."""
    write.version = record.version
    if record.total is not None:
        write.values = [format_number(record.total)]
    if record.existed is not None:
        write.existed = _existed(record, write.keys)


def _existed(record: Record, keys: list[bytes]) -> list[bool]:
    existed = record.existed or 0
    if record.otherwise is not None:
        known = dict(zip(_hashes(record.keys), existed if isinstance(existed, bytes) else b"", strict=True))
        return [bool(known.get(xxhash.xxh3_64_digest(key), record.otherwise)) for key in keys]
    if isinstance(existed, int):
        return [bool(existed)] * len(keys)
    if len(keys) == record.operations:
        return list(map(bool, existed))
    told = list(zip(_hashes(record.keys), existed, strict=True))
    return [next((bool(was) for known, was in told if known == xxhash.xxh3_64_digest(key)), False) for key in keys]


def _hashes(keys: bytes) -> list[bytes]:
    ends = range(0, len(keys) + 1, _HASH_BYTES)
    return [keys[low:high] for low, high in pairwise(ends)]


def record_of(write: Write, number: int, version: int) -> Record:
    """Of a write that gets this version. Requires: `existed` and the values are what they will be."""
    operations = len(write.keys)
    record = Record(number, version, operations)
    if write.existed is not None:
        existed = bytes(write.existed)
        if existed.count(existed[0]) == operations:
            record.existed = existed[0]
        else:
            record.existed = existed
            record.keys = b"".join(map(xxhash.xxh3_64_digest, write.keys))
    if write.add is not None:
        record.total = int(write.values[0])
    return record


def refusal_of(write: Write, number: int, error: ShardKVError) -> Record:
    """Of a write that was refused for good."""
    return Record(number, 0, len(write.keys), refusal=(error.code, error.message, error.detail, error.hint))


def write_of(made: Records, records: Tablet, now_ms: int) -> Write:
    """The write that puts these records into the records tablet."""
    return Write(
        records.number, list(made), PUT_EXPIRING, list(map(_encode, made.values())), expiries=now_ms + RETENTION_MS
    )


def with_part(before: Record, part: Record, keys: list[bytes]) -> Record:
    """The record of a write that is another part of the one before, of the same number: it tells of both."""
    part.covers = coverage_of(keys, before.covers or [])
    return _both(before, part)


def united(left: bytes, right: bytes, boundary: Bound) -> bytes:
    """The record of a lane, as stored, out of those it has in two tablets: the one with keys below the boundary (a key,
    or a hash token), and the other one."""
    one, other = _decode(left), _decode(right)
    below, above = narrowed(one.covers, None, boundary), narrowed(other.covers, boundary, None)
    if one.number != other.number:
        newest = one if one.number > other.number else other
        newest.covers = below if newest is one else above
        return _encode(newest)
    one.covers, other.covers = below, above
    return _encode(_both(one, other))


def of_one_side(record: bytes, boundary: Bound, *, below: bool) -> bytes:
    """The record, as stored, of a lane that only the tablet with keys below the boundary has, or only the other one."""
    found = _decode(record)
    found.covers = narrowed(found.covers, None, boundary) if below else narrowed(found.covers, boundary, None)
    return _encode(found)


def _both(one: Record, other: Record) -> Record:
    """One record for two parts of a request. If a part was refused, the whole is told so: that is what its caller
    heard. Where a part has one answer for all its keys and the other part has another one, it is told by the keys that
    are known; two parts with one answer each that differ are told `existed` as the first one was.
    """
    covers = joined(one.covers, other.covers)
    if one.refusal is not None or other.refusal is not None:
        refusal = one.refusal or other.refusal
        return Record(one.number, 0, one.operations + other.operations, refusal=refusal, covers=covers)
    both = Record(one.number, max(one.version, other.version), one.operations + other.operations, covers=covers)
    both.total = one.total if one.total is not None else other.total
    if one.existed is not None and other.existed is not None:
        uniform = [part for part in (one, other) if isinstance(part.existed, int) or part.otherwise is not None]
        both.otherwise = next((_uniform(part) for part in uniform), 0)
        both.keys = one.keys + other.keys
        both.existed = b"".join(part.existed for part in (one, other) if isinstance(part.existed, bytes))
    return both


def _uniform(part: Record) -> int:
    return part.existed if isinstance(part.existed, int) else part.otherwise or 0
