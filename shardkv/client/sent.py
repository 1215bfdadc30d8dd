"""A request of the asyncio client on its way to a router or node."""

from __future__ import annotations

import asyncio
from typing import cast

import msgspec

from shardkv.client.calls import Lost, Outcome, Payload
from shardkv.client.connection import CTX, told_deadline
from shardkv.client.deadlines import Deadlines
from shardkv.errors import ShardKVError, UnavailableError
from shardkv.transport.peer import Peer
from shardkv.wire.messages import Op, RawReply


class Sent:
    """`answer` always ends, at the deadline at the latest."""

    __slots__ = ("_deadlines", "_id", "_peer", "answer")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        peer: Peer,
        deadlines: Deadlines,
        op: Op,
        payload: Payload,
        deadline: float,
        *,
        shard: int | None = None,
        epoch: int | None = None,
    ) -> None:
        self.answer: asyncio.Future[Outcome] = loop.create_future()
        self._peer = peer
        self._deadlines = deadlines
        self._id: int | None = None
        told = told_deadline(deadline, loop.time())
        try:
            encoded = cast(msgspec.Raw, payload)  # with all that leaves in this turn of the loop
            self._id = peer.send(op, encoded, on_reply=self._deliver, ctx=CTX, shard=shard, epoch=epoch, deadline=told)
        except UnavailableError as error:
            self.answer.set_result(Lost(error.message, sent=False))
        else:
            deadlines.watch(self, deadline)

    def forget(self) -> None:
        """No more interested in the answer, or it came."""
        self._deadlines.forget(self)
        if self._id is not None and not (self.answer.done() and not self.answer.cancelled()):
            self._peer.forget(self._id)

    def _deliver(self, reply: RawReply | ShardKVError) -> None:
        if not self.answer.done():
            sent = not isinstance(reply, UnavailableError)
            self.answer.set_result(reply if isinstance(reply, RawReply) else Lost(reply.message, sent=sent))

    def time_out(self) -> None:
        """As `Deadlines` tells it."""
        if not self.answer.done():
            self.answer.set_result(Lost(f"{self._peer.label} did not answer in time.", sent=True, timed_out=True))
            if self._id is not None:
                self._peer.forget(self._id)
