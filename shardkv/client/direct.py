"""Which calls a client sends to nodes itself, and how: one request to each node, answers put together. Without I/O.

Reads and writes go to the nodes that own their keys, as the newest known routes say. Everything else goes through a
router, and so does what a node refused because it is not its own (any more), or what a broken connection lost, if it
may be sent again: the router waits for what moves or restarts.

Invariants: a call goes to nodes whole or not at all. What an outcome means for it is decided in `calls`, as for a
router's answer; a write that may have been applied is told as that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from shardkv.client.answers import DecodeAnswer
from shardkv.client.calls import Call, Lost, Outcome, State, settle
from shardkv.client.connection import Ask
from shardkv.errors import (
    DeadlineExceeded,
    InvalidArgument,
    OutcomeUnknown,
    Overloaded,
    RemoteProtocolError,
    RoutingError,
    ShardKVError,
    ShardUnavailable,
    from_wire,
)
from shardkv.topology.documents import ShardDocument
from shardkv.topology.gathering import Split, node_part, pick, split_by_shard
from shardkv.topology.routes import Routes, told_routes
from shardkv.wire.messages import (
    OK,
    Op,
    PartialRead,
    PartialReadReply,
    RawReply,
    Read,
    ReadReply,
    ShardProblem,
    SharedRead,
    Write,
    WriteReply,
    WriteResult,
    decode_partial_read_reply,
    decode_routes_reply,
    decode_write_reply,
    raw,
    reply_error,
)

Members = list[tuple[ShardDocument, list[int]]]
"""Shards of one node, with the indexes of their keys in the call."""


class Leg:
    """A node's share of a call: what it is asked, and how to decode the answer (see `Call`). `deliver` takes what came
    of it, once."""

    __slots__ = ("ask", "decode_answer", "deliver", "node")

    def __init__(
        self,
        node: str,
        ask: Ask,
        deliver: Callable[[Outcome], None],
        decode_answer: DecodeAnswer | None = None,
    ) -> None:
        self.node = node
        self.ask = ask
        self.deliver = deliver
        self.decode_answer = decode_answer


def legs_of(call: Call, routes: Routes) -> list[Leg]:
    """What to ask nodes for this call; nothing: it goes through a router."""
    if call.error is not None and not isinstance(call.error, Overloaded):
        return []
    message = call.message()
    if isinstance(message, Write):
        return _legs_of_write(call, message, routes)
    if isinstance(message, Read) and not isinstance(message, PartialRead):
        return _legs_of_read(call, message, routes)
    return []


def routes_of(outcome: Outcome, keyspace: str) -> Routes | None:
    """What a router told of the routes; None: they are as known. Raises ShardKVError when it told nothing."""
    return told_routes(decode_routes_reply(_payload(outcome)), keyspace)


def left_for_router(calls: Sequence[Call]) -> list[Call]:
    """Those of the calls, which nodes were asked for, that are to go on through a router at once."""
    left = [call for call in calls if call.state is State.WAITING and not _goes_on(call)]
    for call in left:
        if isinstance(call.error, RoutingError):  # the client's affair: no caller is told that it asked the wrong node
            call.error = ShardUnavailable(call.error.message, detail=call.error.detail, hint=call.error.hint)
    return left


def _goes_on(call: Call) -> bool:
    """Whether it is asked for again in its turn: it has more to ask, or was told to come back later."""
    return call.error is None or isinstance(call.error, Overloaded)


def _alone(call: Call, shard: ShardDocument) -> list[Leg]:
    """A call on keys of one shard goes as it is."""
    return [
        Leg(shard.node, (call.op, call.message(), shard.id, shard.epoch), partial(settle, call), call.decode_answer)
    ]


def _legs_of_read(call: Call, read: Read, routes: Routes) -> list[Leg]:
    keys, view = read.keys, routes.view
    if len(keys) == 1:
        return _alone(call, view.shard_for(keys[0]))
    split = split_by_shard(view, keys)
    if len(split) == 1:
        return _alone(call, routes.shards[split[0][0]])
    shares = _by_node(split, routes)
    reading = _Reading(call, len(keys), len(shares), versions=read.want_versions)
    legs = []
    for node, members in shares.items():
        indexes = _indexes(members)
        payload = raw(SharedRead(pick(keys, indexes), read.want_versions, shards=_spans(members)))
        legs.append(Leg(node, (Op.READ, payload, None, None), partial(reading.end, indexes)))
    return legs


def _legs_of_write(call: Call, write: Write, routes: Routes) -> list[Leg]:
    keys, view = write.keys, routes.view
    if write.conditions is not None:
        keys = [*keys, *write.conditions.keys]
    if len(keys) == 1:
        return _alone(call, view.shard_for(keys[0]))
    split = split_by_shard(view, keys)
    if len(split) == 1:
        return _alone(call, routes.shards[split[0][0]])
    if write.conditions is not None:
        return []  # if these routes are right, the router says what is wrong
    shares = _by_node(split, routes)
    writing = _Writing(call, len(keys), len(shares))
    return [
        Leg(
            node,
            (Op.WRITE, node_part(write, _indexes(members), _spans(members)), None, None),
            partial(writing.end, members),
        )
        for node, members in shares.items()
    ]


def _by_node(split: Split, routes: Routes) -> dict[str, Members]:
    shares = defaultdict[str, Members](list)
    for shard_id, indexes in split:
        shard = routes.shards[shard_id]
        shares[shard.node].append((shard, indexes))
    return shares


def _indexes(members: Members) -> list[int]:
    return [index for _, indexes in members for index in indexes]


def _spans(members: Members) -> list[tuple[int, int, int]]:
    return [(shard.id, shard.epoch, len(indexes)) for shard, indexes in members]


class _Reading:
    """Puts the shares of a read together; when one lacks something, the whole read has failed."""

    def __init__(self, call: Call, count: int, shares: int, *, versions: bool) -> None:
        self._call = call
        self._values: list[bytes | None] = [None] * count
        self._versions = [0] * count if versions else None
        self._left = shares
        self._error: ShardKVError | None = None

    def end(self, indexes: list[int], outcome: Outcome) -> None:
        """This came of the share with the keys at `indexes`."""
        try:
            self._take(indexes, decode_partial_read_reply(_payload(outcome)))
        except ShardKVError as error:
            self._error = self._error or error
        self._left -= 1
        if not self._left:
            whole = ReadReply(self._values, self._versions)
            settle(self._call, self._error or RawReply(0, OK, raw(whole)))

    def _take(self, indexes: list[int], reply: PartialReadReply) -> None:
        if reply.problems:
            raise _error_of(reply.problems[0])
        versions = reply.versions if self._versions is not None else ()
        if len(reply.values) != len(indexes) or versions is None or (self._versions and len(versions) != len(indexes)):
            raise RemoteProtocolError(f"A node answered a read of {len(indexes)} keys with something else.")
        for index, value in zip(indexes, reply.values, strict=True):
            self._values[index] = value
        if self._versions is not None:
            for index, version in zip(indexes, versions, strict=True):
                self._versions[index] = version


class _Writing:
    """Puts the shares of a write together: what became of every operation, shard by shard."""

    def __init__(self, call: Call, count: int, shares: int) -> None:
        self._call = call
        self._results = bytearray(count)
        self._problems: list[ShardProblem] = []
        self._left = shares

    def end(self, members: Members, outcome: Outcome) -> None:
        """This came of the share with these shards."""
        indexes = _indexes(members)
        try:
            results = self._results_of(outcome, len(indexes))
        except ShardKVError as error:
            unknown = isinstance(error, OutcomeUnknown)
            results = bytes((WriteResult.UNKNOWN if unknown else WriteResult.REFUSED,)) * len(indexes)
            told = error.code, error.message, error.detail, error.hint
            self._problems += [ShardProblem(shard.id, *told) for shard, _ in members]
        if any(results):
            for index, result in zip(indexes, results, strict=True):
                self._results[index] = result
        self._left -= 1
        if not self._left:
            whole = WriteReply(bytes(self._results), None, self._problems)
            settle(self._call, RawReply(0, OK, raw(whole)))

    def _results_of(self, outcome: Outcome, count: int) -> bytes:
        if isinstance(outcome, Lost) and outcome.sent:
            raise OutcomeUnknown(outcome.reason, hint=_READ_AGAIN)
        payload = _payload(outcome)
        try:
            reply: WriteReply = decode_write_reply(payload)
        except InvalidArgument:
            reply = WriteReply(b"", None, [])
        if len(reply.results) != count:
            raise OutcomeUnknown("A node answered a write with something else.", hint=_READ_AGAIN)
        self._problems += reply.problems
        return reply.results


_READ_AGAIN = "Read the keys before writing them again."


def _payload(outcome: Outcome) -> msgspec.Raw:
    """What was answered. Raises the error that was, or what a lost answer to a read, or an unsent request, comes to."""
    if isinstance(outcome, Lost):
        raise DeadlineExceeded(outcome.reason) if outcome.timed_out else ShardUnavailable(outcome.reason)
    if isinstance(outcome, ShardKVError):
        raise outcome
    if outcome.status != OK:
        raise reply_error(outcome.payload)
    return outcome.payload


def _error_of(problem: ShardProblem) -> ShardKVError:
    return from_wire(problem.code, problem.message, {"shard": problem.shard, **problem.detail}, problem.hint)
