"""A part whose shard is no more: it was split, or merged with its neighbour, while the part was on its way.

Its keys are those of the shards that were made from it, its *heirs*, and perhaps of theirs. A read or a write goes to
the shards that have its keys now, and their answers become the one answer of the part. A step over a range cannot be
told apart by keys: whoever took the step begins anew (`ShardEnded`).

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
from shardkv.wire.messages import Op, Read, ReadReply, Write, WriteReply, decode_read, decode_write, raw
from shardkv_router.part import Part


class ShardEnded(ShardUnavailable):
    """The shard was split or merged before the step was taken."""


def heirs_of(topology: Topology, shard_id: int) -> KeyspaceView | None:
    """The keyspace in which other shards have taken the place of this one; None when none have."""
    for shard in topology.shards.values():
        if shard_id in shard.parents:
            return topology.keyspaces.get(shard.keyspace)
    return None


def parts_for_heirs(
    part: Part, view: KeyspaceView, bytes_max: int, end: Callable[[Part, msgspec.Raw | ShardKVError], None]
) -> list[Part]:
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


def _read_parts(
    part: Part, view: KeyspaceView, bytes_max: int, end: Callable[[Part, msgspec.Raw | ShardKVError], None]
) -> list[Part]:
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


def _write_parts(part: Part, view: KeyspaceView, end: Callable[[Part, msgspec.Raw | ShardKVError], None]) -> list[Part]:
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


def _sent_to(part: Part, shard_id: int) -> Part:
    part.shard_id = shard_id
    return part
