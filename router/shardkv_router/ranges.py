"""COUNT and DELETE_RANGE over the shards of a keyspace, in steps of one shard each.

COUNT goes on until every shard has been counted to its end, and answers once. DELETE_RANGE takes one step and says how
far it came, so that whoever asked knows what was deleted whatever happens next.

Invariants: a frontier is told only for what every shard has covered; every step covers something, so both come to an
end. Steps go through the `Forwarder`: through restarts and changes of owner, each to the end of the deadline at most.
What was begun on a shard that was split or merged meanwhile is begun anew on those that took its place.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec

from shardkv.errors import InvalidArgument, RemoteProtocolError, ShardKVError, ShardUnavailable
from shardkv.topology.documents import ShardDocument
from shardkv.topology.gathering import DISPENSABLE, missing_shard
from shardkv.topology.view import KeyspaceView
from shardkv.wire.messages import (
    Count,
    CountReply,
    DeleteRange,
    DeleteRangeReply,
    Message,
    Op,
    PayloadDecoder,
    ShardProblem,
    decode_count_reply,
    decode_delete_range_reply,
    raw,
)
from shardkv_router.forwarding import Forwarder
from shardkv_router.heirs import ShardEnded
from shardkv_router.part import Part
from shardkv_router.scanning import all_of

SHARDS_AT_ONCE = 16
"""Shards that are asked at the same time for one request."""
STEP_KEYS = 1000
"""A step of a delete goes on to the next shard of a range keyspace while it has deleted fewer."""


class Ranges:
    """One instance serves all requests of a router."""

    def __init__(self, forwarder: Forwarder) -> None:
        self._forwarder = forwarder
        self._loop = asyncio.get_running_loop()

    async def count(
        self, view: Callable[[], KeyspaceView], asked: Count, deadline: float | None, unwanted: Callable[[], bool]
    ) -> CountReply:
        """All keys of the range, or, when it may be partial, of the shards that could be counted to their ends. Ends
        early, with an error nobody reads, once the answer is `unwanted`. `view`: the newest there is."""
        while True:
            with suppress(ShardEnded):
                return await self._count(view(), asked, deadline, unwanted)

    async def _count(
        self, view: KeyspaceView, asked: Count, deadline: float | None, unwanted: Callable[[], bool]
    ) -> CountReply:
        left = iter(view.shards_in(asked.start, asked.stop))
        problems: list[ShardProblem] = []

        async def count_one(shard: ShardDocument) -> int:
            try:
                return await self._count_shard(shard.id, asked, deadline, unwanted)
            except DISPENSABLE as error:
                if not asked.partial or isinstance(error, ShardEnded):
                    raise
                problems.append(missing_shard(shard, error))
                return 0

        async def count_some() -> int:
            return sum([await count_one(shard) for shard in left])

        total = sum(await all_of([count_some() for _ in range(SHARDS_AT_ONCE)]))
        return CountReply(total, None, problems)

    async def _count_shard(
        self, shard_id: int, asked: Count, deadline: float | None, unwanted: Callable[[], bool]
    ) -> int:
        total, start = 0, asked.start
        while not unwanted():
            step = Count(start, asked.stop)
            reply: CountReply = await self._ask(
                Op.COUNT, step, shard_id, deadline, decode_count_reply, waits=not asked.partial
            )
            total += reply.count
            if reply.frontier is None:
                return total
            _check_moved(start, reply.frontier, shard_id)
            start = reply.frontier
        raise ShardUnavailable("Whoever asked for a count has gone.")

    async def delete(
        self, view: Callable[[], KeyspaceView], asked: DeleteRange, deadline: float | None
    ) -> DeleteRangeReply:
        """One step. What it raises has a `deleted` in its detail: how many keys were. `view`: the newest there is."""
        deleted = 0
        while asked.limit is None or deleted < asked.limit:
            left = None if asked.limit is None else asked.limit - deleted
            try:
                reply = await self._delete(view(), DeleteRange(asked.start, asked.stop, left), deadline)
            except ShardEnded as error:
                deleted += error.detail["deleted"]
            except ShardKVError as error:
                raise _having_deleted(error, deleted) from None
            else:
                return DeleteRangeReply(deleted + reply.deleted, reply.frontier)
        return DeleteRangeReply(deleted, asked.start)

    async def _delete(self, view: KeyspaceView, asked: DeleteRange, deadline: float | None) -> DeleteRangeReply:
        shards = view.shards_in(asked.start, asked.stop)
        if view.partition == "range":
            return await self._delete_in_turn(shards, asked, deadline)
        if asked.limit is not None:
            return await self._delete_one_by_one(shards, asked, asked.limit, deadline)
        return await self._delete_at_once(shards, asked, deadline)

    async def _delete_in_turn(
        self, shards: list[ShardDocument], asked: DeleteRange, deadline: float | None
    ) -> DeleteRangeReply:
        """Shard after shard, which lie one after the other, until there is enough for one step."""
        deleted = 0
        for number, shard in enumerate(shards, 1):
            left = None if asked.limit is None else asked.limit - deleted
            reply = await self._delete_in(shard, asked, left, deadline, deleted_before=deleted)
            deleted += reply.deleted
            frontier = reply.frontier
            if frontier is None and isinstance(shard.stop, bytes) and number < len(shards):
                if deleted < min(STEP_KEYS, STEP_KEYS if asked.limit is None else asked.limit):
                    continue
                frontier = shard.stop
            return DeleteRangeReply(deleted, frontier)
        return DeleteRangeReply(deleted, None)

    async def _delete_one_by_one(
        self, shards: list[ShardDocument], asked: DeleteRange, limit: int, deadline: float | None
    ) -> DeleteRangeReply:
        """Shards which all hold keys of the range, one after the other: never more than the limit is deleted."""
        deleted = 0
        frontiers: list[bytes | None] = []
        for shard in shards:
            if deleted == limit:
                return DeleteRangeReply(deleted, asked.start)
            reply = await self._delete_in(shard, asked, limit - deleted, deadline, deleted_before=deleted)
            deleted += reply.deleted
            frontiers.append(reply.frontier)
        return DeleteRangeReply(deleted, _nearest(frontiers))

    async def _delete_at_once(
        self, shards: list[ShardDocument], asked: DeleteRange, deadline: float | None
    ) -> DeleteRangeReply:
        """Shards which all hold keys of the range, several at the same time."""
        left = iter(shards)
        replies: list[DeleteRangeReply] = []
        errors: list[ShardKVError] = []

        async def delete_some() -> None:
            for shard in left:
                try:
                    replies.append(await self._delete_in(shard, asked, None, deadline))
                except ShardKVError as error:
                    errors.append(error)

        await all_of([delete_some() for _ in range(SHARDS_AT_ONCE)])
        deleted = sum(reply.deleted for reply in replies)
        if errors:
            worst = min(errors, key=lambda error: (error.retriable, isinstance(error, ShardEnded)))
            raise _having_deleted(worst, deleted)
        return DeleteRangeReply(deleted, _nearest([reply.frontier for reply in replies]))

    async def _delete_in(
        self,
        shard: ShardDocument,
        asked: DeleteRange,
        limit: int | None,
        deadline: float | None,
        *,
        deleted_before: int = 0,
    ) -> DeleteRangeReply:
        step, op, decode = DeleteRange(asked.start, asked.stop, limit), Op.DELETE_RANGE, decode_delete_range_reply
        try:
            reply: DeleteRangeReply = await self._ask(op, step, shard.id, deadline, decode, repeatable=limit is None)
            if reply.frontier is not None:
                _check_moved(asked.start, reply.frontier, shard.id)
        except ShardKVError as error:
            raise _having_deleted(error, deleted_before) from None
        return reply

    async def _ask(
        self,
        op: Op,
        step: Message,
        shard_id: int,
        deadline: float | None,
        decode: PayloadDecoder,
        *,
        repeatable: bool = True,
        waits: bool = True,
    ) -> Any:
        """The answer of a shard's node. Raises what the node or the forwarder says."""
        ended: asyncio.Future[msgspec.Raw | ShardKVError] = self._loop.create_future()

        def done(answer: msgspec.Raw | ShardKVError) -> None:
            if not ended.done():
                ended.set_result(answer)

        self._forwarder.send(Part(op, raw(step), shard_id, deadline, done, repeatable=repeatable, waits=waits))
        answer = await ended
        if isinstance(answer, ShardKVError):
            raise answer
        try:
            return decode(answer)
        except InvalidArgument as error:
            raise RemoteProtocolError(f"The node of shard {shard_id} answered with something else: {error}") from None


def _nearest(frontiers: list[bytes | None]) -> bytes | None:
    """Up to where all have come; None: all have come to the end."""
    return min((frontier for frontier in frontiers if frontier is not None), default=None)


def _check_moved(start: bytes, frontier: bytes, shard_id: int) -> None:
    if frontier <= start:
        raise RemoteProtocolError(f"A step over shard {shard_id} covered nothing: it ended at {frontier[:40]!r}.")


def _having_deleted(error: ShardKVError, deleted: int) -> ShardKVError:
    """The error, saying how many keys were deleted before it."""
    error.detail = {**error.detail, "deleted": deleted + error.detail.get("deleted", 0)}
    return error
