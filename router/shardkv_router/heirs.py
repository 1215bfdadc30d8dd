"""A part whose shard is no more: it was split, or merged with its neighbour, while the part was on its way.

Its keys are those of the shards that were made from it, its *heirs*, and perhaps of theirs. A read or a write goes to
the shards that have its keys now, and their answers become the one answer of the part. A step over a range cannot be
told apart by keys: whoever took the step begins anew (`ShardEnded`).

Two parts of one request have one token. When the shards of both were merged, they must go there as one write: sent one
after the other, the second would pass for a repetition of the first.

Invariant: the part ends once, as if its shard had answered; a write that must be of one shard, and is not any more, was
not made, and says so.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from shardkv.errors import InvalidArgument, ShardKVError, ShardUnavailable
from shardkv.topology.gathering import (
    ReadGather,
    WriteGather,
    one_shard,
    read_part,
    split_by_shard,
    write_part,
)
from shardkv.topology.view import KeyspaceView, Topology
from shardkv.wire.messages import (
    Op,
    Read,
    ReadReply,
    Write,
    WriteReply,
    decode_read,
    decode_write,
    decode_write_reply,
    raw,
)
from shardkv_router.part import Part

End = Callable[[Part, msgspec.Raw | ShardKVError], None]
"""Ends a part with its answer."""


class ShardEnded(ShardUnavailable):
    """The shard was split or merged before the step was taken."""


def heirs_of(topology: Topology, shard_id: int) -> KeyspaceView | None:
    """The keyspace in which other shards have taken the place of this one; None when none have."""
    for shard in topology.shards.values():
        if shard_id in shard.parents:
            return topology.keyspaces.get(shard.keyspace)
    return None


def parts_for_heirs(part: Part, view: KeyspaceView, bytes_max: int, end: End) -> list[Part]:
    """What to send in place of the part, or the part itself with another shard's id. Empty: it was ended by `end`.

    `bytes_max`: of all values of an answer.
    """
    try:
        if part.op == Op.READ:
            return _read_parts(part, view, bytes_max, end)
        if part.op == Op.WRITE:
            return _write_parts(part, view, end)
    except ShardKVError as error:
        end(part, error)
        return []
    end(part, ShardEnded(f"Shard {part.shard_id} was split or merged meanwhile.", hint="Retry."))
    return []


def _read_parts(part: Part, view: KeyspaceView, bytes_max: int, end: End) -> list[Part]:
    read: Read = decode_read(part.payload)
    split = split_by_shard(view, read.keys)
    if len(split) == 1:
        return [_sent_to(part, split[0][0])]

    def done(reply: ReadReply | ShardKVError) -> None:
        end(part, reply if isinstance(reply, ShardKVError) else raw(reply))

    gather = ReadGather(len(read.keys), len(split), bytes_max, done, versions=read.want_versions)
    return [
        Part(Op.READ, read_part(read, indexes), shard, part.deadline, gather.part(indexes), waits=part.waits)
        for shard, indexes in split
    ]


def _write_parts(part: Part, view: KeyspaceView, end: End) -> list[Part]:
    write: Write = decode_write(part.payload)
    if write.conditions is not None:
        return [_sent_to(part, _one_shard(view, write))]
    split = split_by_shard(view, write.keys)
    if len(split) == 1:
        return [_sent_to(part, split[0][0])]

    def done(reply: WriteReply) -> None:
        end(part, raw(reply))

    gather = WriteGather(len(write.keys), len(split), done)
    parts = []
    for shard, indexes in split:
        one = Part(Op.WRITE, write_part(write, indexes), shard, part.deadline, gather.part(shard, indexes))
        one.doubt = part.doubt
        parts.append(one)
    return parts


def _one_shard(view: KeyspaceView, write: Write) -> int:
    conditions = write.conditions
    assert conditions is not None
    try:
        return one_shard(view, write.keys, conditions.keys)
    except InvalidArgument as error:
        error.message = f"The shard was split while the write was on its way. {error.message}"
        raise


Shared = tuple[bytes, int, int]
"""Lane and number of a token, and the shard: at most one write with it may be under way."""


def token_of(part: Part) -> Shared | None:
    """What parts that must go as one have in common; None for a part that has no token."""
    if part.op != Op.WRITE:
        return None
    token = decode_write(part.payload).token
    return None if token is None else (token.lane, token.number, part.shard_id)


def united(parts: list[Part], end: End) -> list[Part]:
    """The same parts, but those with one token and shard as one."""
    found: dict[Shared, list[Part]] = {}
    alone: list[Part] = []
    for part in parts:
        token = token_of(part)
        if token is None:
            alone.append(part)
        else:
            found.setdefault(token, []).append(part)
    return alone + [same[0] if len(same) == 1 else _as_one(same, end) for same in found.values()]


def _as_one(parts: list[Part], end: End) -> Part:
    """One write with the operations of all of these, each of which ends with what became of its own."""
    writes: list[Write] = [decode_write(part.payload) for part in parts]
    counts = [len(write.keys) for write in writes]

    def done(answer: msgspec.Raw | ShardKVError) -> None:
        at = 0
        for part, count in zip(parts, counts, strict=True):
            end(part, _share(answer, at, count))
            at += count

    whole = Write(
        token=writes[0].token,
        conditions=None,
        kinds=b"".join(_each_kind(write) for write in writes),
        keys=[key for write in writes for key in write.keys],
        values=[value for write in writes for value in write.values],
        want_existed=writes[0].want_existed,
        ttl_ms=writes[0].ttl_ms,
    )
    one = Part(Op.WRITE, raw(whole), parts[0].shard_id, parts[0].deadline, done)
    one.doubt = next((part.doubt for part in parts if part.doubt is not None), None)
    return one


def _each_kind(write: Write) -> bytes:
    return bytes((write.kinds,)) * len(write.keys) if isinstance(write.kinds, int) else write.kinds


def _share(answer: msgspec.Raw | ShardKVError, at: int, count: int) -> msgspec.Raw | ShardKVError:
    """Of the answer to the whole, what is said of `count` operations from `at` on."""
    if isinstance(answer, ShardKVError):
        return answer
    try:
        told: WriteReply = decode_write_reply(answer)
    except InvalidArgument:
        return answer
    return raw(WriteReply(told.results[at : at + count], told.version, told.problems))


def _sent_to(part: Part, shard_id: int) -> Part:
    part.shard_id = shard_id
    return part
