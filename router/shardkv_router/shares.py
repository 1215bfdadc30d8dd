"""A node's share of a request over several shards: one request for all of its shards.

A share that is answered as it should be ends as one part of the gathering. What one of its shards refused, or all of
it when the share as a whole failed, becomes a `Part` for each such shard, at the point where it would be had it been
sent alone, and the `Forwarder` sees to it from there.

Invariant: each shard of a share ends once, with the share or as a part.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from shardkv.errors import BatchTooLarge, InvalidArgument, OutcomeUnknown, ShardKVError
from shardkv.topology.documents import ShardDocument
from shardkv.topology.gathering import (
    PartialReadGather,
    ReadGather,
    WriteGather,
    node_part,
    pick,
    read_part,
    write_part,
)
from shardkv.transport.peer import Peer
from shardkv.wire.messages import (
    OK,
    Op,
    RawReply,
    Read,
    ReadReply,
    ShardProblem,
    SharedRead,
    Write,
    WriteReply,
    decode_read_problems,
    decode_read_reply,
    decode_write_reply,
    problem_reply,
    raw,
)
from shardkv_router.forwarding import Forwarder
from shardkv_router.part import Part

Spans = list[tuple[int, int, int]]
Members = list[tuple[ShardDocument, list[int]]]
"""Shards, with the indexes of their keys in the request."""


class Gathering(Protocol):
    """A request over several shards, of which shares are sent."""

    @property
    def op(self) -> Op: ...

    def payload(self, spans: Spans, indexes: list[int]) -> msgspec.Raw:
        """Of a share: what is at `indexes`, the shards of which are named by `spans`."""

    def part(self, shard: ShardDocument, indexes: list[int], deadline: float | None) -> Part:
        """One of several parts a share falls apart into."""

    def more(self, parts: int) -> None:
        """A share fell apart into one part, and so many more."""

    def problems(self, answer: msgspec.Raw, count: int) -> list[ShardProblem] | None:
        """What an answer for `count` keys says went wrong. None: it is no such answer."""

    def take(self, answer: msgspec.Raw, places: list[int] | None, indexes: list[int]) -> None:
        """Take what an answer says at `places` (None: all of it) for the keys at `indexes`, as the end of one part."""


class Share:
    """Sent by `Forwarder.send_together`."""

    __slots__ = ("_asked", "_forwarder", "_gathering", "_members", "answer_by", "deadline")

    def __init__(self, forwarder: Forwarder, gathering: Gathering, members: Members, deadline: float | None) -> None:
        self._forwarder = forwarder
        self._gathering = gathering
        self._members = members
        """Empty when the share has ended, or fallen apart."""
        self._asked: tuple[Peer, int] | None = None
        self.deadline = deadline
        self.answer_by: float | None = None

    def ask(self, peer: Peer, left_ms: int | None) -> None:
        """Send it to `peer`."""
        spans = [(shard.id, shard.epoch, len(indexes)) for shard, indexes in self._members]
        payload = self._gathering.payload(spans, _all_indexes(self._members))
        self._asked = peer, peer.send(self._gathering.op, payload, on_reply=self._replied, deadline=self.deadline)

    def give_up(self) -> list[Part]:
        """All of it as parts; its answer is no longer wanted."""
        if self._asked is not None:
            peer, request_id = self._asked
            peer.forget(request_id)
        members, self._members = self._members, []
        return self._fall_apart(members)

    def _replied(self, reply: RawReply | ShardKVError) -> None:
        self._forwarder.ended(self)
        members, self._members = self._members, []
        if isinstance(reply, RawReply) and reply.status == OK:
            self._take(members, reply.payload)
            return
        for part in self._fall_apart(members):
            if isinstance(reply, BatchTooLarge):
                self._forwarder.send(part)  # no frame holds the share, so it was not sent
            else:
                self._forwarder.answered(part, reply)

    def _take(self, members: Members, answer: msgspec.Raw) -> None:
        problems = self._gathering.problems(answer, sum([len(indexes) for _, indexes in members]))
        if problems is None:
            for part in self._fall_apart(members):
                self._forwarder.answered(part, _NONSENSE)
        elif not problems:
            self._gathering.take(answer, None, _all_indexes(members))
        else:
            self._take_some(members, answer, {problem.shard: problem for problem in problems})

    def _take_some(self, members: Members, answer: msgspec.Raw, problems: dict[int, ShardProblem]) -> None:
        """Take what is said of the shards without a problem; the others go on as parts."""
        refused = [(shard, indexes) for shard, indexes in members if shard.id in problems]
        fine = [(shard, indexes) for shard, indexes in members if shard.id not in problems]
        parts = self._fall_apart(refused, others=bool(fine))
        if fine:
            self._gathering.take(answer, _places(members, problems), _all_indexes(fine))
        for part in parts:
            self._forwarder.answered(part, problem_reply(problems[part.shard_id]))

    def _fall_apart(self, members: Members, *, others: bool = False) -> list[Part]:
        """These members as parts. `others`: the share ends for others of its shards."""
        self._gathering.more(len(members) - (not others))
        parts = [self._gathering.part(shard, indexes, self.deadline) for shard, indexes in members]
        for part, (shard, _) in zip(parts, members, strict=True):
            part.epoch = shard.epoch
        return parts


class SharedReading:
    """A read of several shards, or of one that may be missing."""

    op = Op.READ

    def __init__(self, read: Read, gather: ReadGather) -> None:
        self._read = read
        self._gather = gather
        self.more = gather.more

    def payload(self, spans: Spans, indexes: list[int]) -> msgspec.Raw:
        return raw(SharedRead(pick(self._read.keys, indexes), self._read.want_versions, shards=spans))

    def part(self, shard: ShardDocument, indexes: list[int], deadline: float | None) -> Part:
        payload, gather = read_part(self._read, indexes), self._gather
        if isinstance(gather, PartialReadGather):
            return Part(Op.READ, payload, shard.id, deadline, gather.part_of(shard, indexes), waits=False)
        return Part(Op.READ, payload, shard.id, deadline, gather.part(indexes))

    def problems(self, answer: msgspec.Raw, count: int) -> list[ShardProblem] | None:
        try:
            problems: list[ShardProblem] = decode_read_problems(answer).problems
            if problems and len(decode_read_reply(answer).values) != count:
                return None
        except InvalidArgument:
            return None
        return problems

    def take(self, answer: msgspec.Raw, places: list[int] | None, indexes: list[int]) -> None:
        if places is not None:
            told: ReadReply = decode_read_reply(answer)
            versions = [told.versions[place] for place in places] if told.versions else None
            answer = raw(ReadReply([told.values[place] for place in places], versions))
        self._gather.part(indexes)(answer)


class SharedWriting:
    """A write to several shards, without conditions."""

    op = Op.WRITE

    def __init__(self, write: Write, gather: WriteGather) -> None:
        self._write = write
        self._gather = gather
        self.more = gather.more

    def payload(self, spans: Spans, indexes: list[int]) -> msgspec.Raw:
        return node_part(self._write, indexes, spans)

    def part(self, shard: ShardDocument, indexes: list[int], deadline: float | None) -> Part:
        done = self._gather.part(shard.id, indexes)
        return Part(Op.WRITE, write_part(self._write, indexes), shard.id, deadline, done)

    def problems(self, answer: msgspec.Raw, count: int) -> list[ShardProblem] | None:
        try:
            told: WriteReply = decode_write_reply(answer)
        except InvalidArgument:
            return None
        return told.problems if len(told.results) == count else None

    def take(self, answer: msgspec.Raw, places: list[int] | None, indexes: list[int]) -> None:
        if places is not None:
            told: WriteReply = decode_write_reply(answer)
            answer = raw(WriteReply(bytes(map(told.results.__getitem__, places)), None, []))
        self._gather.part(0, indexes)(answer)


_NONSENSE = OutcomeUnknown("A node answered with something else than it was asked for.")


def _all_indexes(members: Members) -> list[int]:
    return [index for _, indexes in members for index in indexes]


def _places(members: Members, problems: dict[int, ShardProblem]) -> list[int]:
    """Where in the answer to a share the keys are of the shards without a problem."""
    places: list[int] = []
    at = 0
    for shard, indexes in members:
        if shard.id not in problems:
            places += range(at, at + len(indexes))
        at += len(indexes)
    return places
