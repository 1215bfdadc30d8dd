"""Requests that came together, of one connection or several, and go to one node together: a bundle.

A reply that is no error goes to the client as it came. Every other member becomes a `Part`, at the point where it would
be had it been sent alone, and the `Forwarder` sees to it from there.

Invariants: a member is answered by the bundle or becomes a part, once; all members have one deadline.
"""

from __future__ import annotations

from collections.abc import Callable

from shardkv.errors import ShardKVError
from shardkv.transport.lone import reply_to_all
from shardkv.transport.peer import Peer
from shardkv.transport.server import Connection
from shardkv.wire.messages import OK, RawReply, Request
from shardkv_router.forwarding import Forwarder
from shardkv_router.part import Part

PartOf = Callable[[Connection, int, Request, float | None], Part]
"""The part for a request: who asks, the id it came with, the request, its deadline. The request names the shard."""


class Bundle:
    """The members are requests with shard and epoch set, and the ids they came with; the bundle makes them its own."""

    __slots__ = (
        "_askers",
        "_first",
        "_forwarder",
        "_ids",
        "_left",
        "_part_of",
        "_peer",
        "_requests",
        "answer_by",
        "came",
        "deadline",
    )

    def __init__(
        self,
        forwarder: Forwarder,
        askers: list[Connection],
        requests: list[Request],
        deadline: float | None,
        part_of: PartOf,
    ) -> None:
        self._forwarder = forwarder
        self._askers = askers
        self._ids = [request.id for request in requests]
        self._requests: list[Request | None] = [*requests]
        """None: no longer of this bundle."""
        self._left = len(requests)
        self._part_of = part_of
        self._peer: Peer | None = None
        self._first = 0
        self.deadline = deadline
        self.answer_by: float | None = None
        self.came: list[RawReply] = []

    def ask(self, peer: Peer, left_ms: int | None) -> None:
        """Send all to `peer`."""
        requests = [request for request in self._requests if request is not None]
        for request in requests:
            request.ctx = 0
            request.deadline_ms = left_ms
        self._peer, self._first = peer, peer.send_run(requests, self)

    def take(self, replies: list[RawReply]) -> None:
        """Some members were answered."""
        refused = [reply for reply in replies if reply.status != OK]
        if refused:
            replies = [reply for reply in replies if reply.status == OK]
        first, ids, requests = self._first, self._ids, self._requests
        indexes = [reply.id - first for reply in replies]
        for reply, index in zip(replies, indexes, strict=True):
            requests[index] = None
            reply.id = ids[index]
        self._left -= len(replies)
        if replies:
            askers = [self._askers[index] for index in indexes]
            reply_to_all(askers, replies, sum([len(reply.payload) for reply in replies]))
        for reply in refused:
            self._forwarder.answered(self._leave(reply.id - first), reply)
        if not self._left:
            self._forwarder.ended(self)

    def lost(self, request_id: int, error: ShardKVError) -> None:
        """A member will not be answered."""
        self._forwarder.answered(self._leave(request_id - self._first), error)
        if not self._left:
            self._forwarder.ended(self)

    def give_up(self) -> list[Part]:
        """What was not answered, as parts; its answers are no longer wanted."""
        indexes = [index for index, request in enumerate(self._requests) if request is not None]
        if self._peer is not None:
            for index in indexes:
                self._peer.forget(self._first + index)
        return [self._leave(index) for index in indexes]

    def _leave(self, index: int) -> Part:
        """A member as a part."""
        request, self._requests[index] = self._requests[index], None
        assert request is not None
        self._left -= 1
        part = self._part_of(self._askers[index], self._ids[index], request, self.deadline)
        part.epoch = request.epoch
        return part
