"""One page of an ordered scan over all shards of a keyspace.

hash    every node merges its shards; the router asks all nodes at once and merges their pages up to the key to
        which all have spoken.
range   shards lie one after the other: the router asks them in order until the page is full.

A page that may be partial does without the shards that are away, and names them.

Invariants: a page states what it covers and which shards are missing from it, and the router checks that every node
spoke for exactly the shards it was asked about; the router keeps nothing between pages, so any router can serve the
next one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from shardkv.errors import (
    DeadlineExceeded,
    OutcomeUnknown,
    RemoteProtocolError,
    RoutingError,
    ShardKVError,
    UnavailableError,
)
from shardkv.topology.documents import ShardDocument
from shardkv.topology.gathering import DISPENSABLE, as_read, missing_shard
from shardkv.topology.view import KeyspaceView, Topology
from shardkv.transport.peer import Peer
from shardkv.wire.messages import OK, Op, Page, RawReply, Scan, decode_page, raw, reply_error
from shardkv_router.forwarding import Forwarder, last_moment
from shardkv_router.links import NodeLinks
from shardkv_router.merge import merge_pages
from shardkv_router.options import RouterOptions
from shardkv_router.part import REFUSED_PAUSE_MOST_S, REFUSED_PAUSE_S

Errors = tuple[type[ShardKVError], ...]
Answer = TypeVar("Answer")

NODE_PAGE_BYTES_MIN = 16 * 1024
PAGE_MARGIN = 1.1
"""Nodes are asked for a little more than their share, so that uneven shares still fill the page."""
_AWAY = (RoutingError, UnavailableError, OutcomeUnknown)
"""What a shard says, or is said of it, that can be asked later."""


class Scanner:
    """Makes pages. One instance serves all scans of a router."""

    def __init__(self, links: NodeLinks, forwarder: Forwarder, options: RouterOptions) -> None:
        self._links = links
        self._forwarder = forwarder
        self._options = options
        self._loop = asyncio.get_running_loop()

    async def page(self, topology: Callable[[], Topology], keyspace: str, scan: Scan, deadline: float | None) -> Page:
        """The first page of `scan`. Retries (it is a read) while shards are away, for `park_ms` at most.

        Ends shortly before the deadline. Raises UnknownKeyspace, ShardUnavailable, DeadlineExceeded.
        """
        now = self._loop.time()
        patience = now + self._options.park_ms / 1000
        answer_by = patience if deadline is None else last_moment(deadline, now)
        last, pause_s = min(patience, answer_by), REFUSED_PAUSE_S
        may_miss = DISPENSABLE if scan.partial else ()
        while True:
            try:
                return await self._attempt(topology().keyspace(keyspace), scan, answer_by, may_miss)
            except _AWAY as error:
                if self._loop.time() + pause_s >= last:
                    raise as_read(error) from error
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, REFUSED_PAUSE_MOST_S)

    async def _attempt(self, view: KeyspaceView, scan: Scan, deadline: float, may_miss: Errors) -> Page:
        shards = view.shards_in(scan.start, scan.stop)
        if view.partition == "range":
            return await self._in_turn(shards, scan, deadline, may_miss)
        return await self._all_at_once(shards, scan, deadline, may_miss)

    async def _all_at_once(self, shards: list[ShardDocument], scan: Scan, deadline: float, may_miss: Errors) -> Page:
        by_node: dict[str, list[ShardDocument]] = {}
        for shard in shards:
            by_node.setdefault(shard.node, []).append(shard)
        if not may_miss:
            for node, owned in by_node.items():
                self._usable(node, owned)  # while one is away, the others would make pages for nothing
        page_bytes = self._page_bytes(scan)
        share = max(NODE_PAGE_BYTES_MIN, int(page_bytes / len(by_node) * PAGE_MARGIN))
        answers = await all_of(
            [
                _page_or_error(self._ask(node, owned, scan, share, scan.limit, deadline), may_miss)
                for node, owned in by_node.items()
            ]
        )
        pages = [answer for answer in answers if isinstance(answer, Page)]
        bytes_max = max(page_bytes, NODE_PAGE_BYTES_MIN)
        page = merge_pages(pages, reverse=scan.reverse, limit=scan.limit, bytes_max=bytes_max, keys_only=scan.keys_only)
        for answer, owned in zip(answers, by_node.values(), strict=True):
            if isinstance(answer, ShardKVError):
                page.problems += [missing_shard(shard, answer) for shard in owned]
        return page

    async def _in_turn(self, shards: list[ShardDocument], scan: Scan, deadline: float, may_miss: Errors) -> Page:
        """Ask shard after shard until rows or bytes suffice; a page with rows ends before one that is away."""
        page = Page([], None if scan.keys_only else [], None, None, [])
        left_bytes, left_rows = self._page_bytes(scan), scan.limit
        turn = list(reversed(shards)) if scan.reverse else shards
        for number, shard in enumerate(turn):
            asking = self._ask(shard.node, [shard], scan, left_bytes, left_rows, deadline)
            try:
                found = await _page_or_error(asking, may_miss)
            except _AWAY:
                if not page.keys and not page.problems:
                    raise
                page.frontier = _far_end(turn[number - 1], reverse=scan.reverse)
                return page
            if isinstance(found, ShardKVError):
                page.problems.append(missing_shard(shard, found))
                continue
            page.keys += found.keys
            if page.values is not None:
                page.values += found.values or []
            left_rows -= len(found.keys)
            left_bytes -= sum(map(len, found.keys)) + sum(map(len, found.values or []))
            last = number == len(turn) - 1
            if found.frontier is not None or (not last and (left_rows <= 0 or left_bytes <= 0)):
                whole = found.frontier is None
                page.frontier = _far_end(shard, reverse=scan.reverse) if whole else found.frontier
                return page
        return page

    def _page_bytes(self, scan: Scan) -> int:
        return min(scan.page_bytes, self._options.page_bytes_max)

    async def _ask(
        self, node: str, shards: list[ShardDocument], scan: Scan, page_bytes: int, limit: int, deadline: float
    ) -> Page:
        """One page of one node. Raises what the node reported; ShardUnavailable when it cannot be reached."""
        peer = self._usable(node, shards)
        pairs = [(shard.id, shard.epoch) for shard in shards]
        asked = Scan(scan.start, scan.stop, scan.reverse, scan.keys_only, limit, page_bytes, pairs)
        answer: asyncio.Future[RawReply | ShardKVError] = self._loop.create_future()

        def deliver(reply: RawReply | ShardKVError) -> None:
            if not answer.done():
                answer.set_result(reply)

        request_id = peer.send(Op.SCAN, raw(asked), on_reply=deliver, deadline=deadline)
        try:
            async with asyncio.timeout_at(deadline):
                reply = await answer
        except TimeoutError:
            raise DeadlineExceeded(f"Node {node} did not answer a scan in time.", detail={"node": node}) from None
        finally:
            peer.forget(request_id)
        return _checked_page(reply, node, [shard for shard, _ in pairs])

    def _usable(self, node: str, shards: list[ShardDocument]) -> Peer:
        peer = self._links.usable(node)
        if peer is None:
            raise self._forwarder.unavailable(shards[0], shards[0].id)
        return peer


async def _page_or_error(asking: Coroutine[Any, Any, Page], may_miss: Errors) -> Page | ShardKVError:
    """The page, or why it may be missing. Raises other errors."""
    try:
        return await asking
    except may_miss as error:
        return error


async def all_of(asking: Sequence[Coroutine[Any, Any, Answer]]) -> list[Answer]:
    """All answers; when one cannot be had, the others are no longer waited for."""
    tasks = [asyncio.ensure_future(one) for one in asking]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _checked_page(reply: RawReply | ShardKVError, node: str, asked: list[int]) -> Page:
    """The page of a reply, when it speaks for all shards asked about."""
    if isinstance(reply, ShardKVError):
        raise reply
    if reply.status != OK:
        raise reply_error(reply.payload)
    page: Page = decode_page(reply.payload)
    if page.shards != asked:
        raise RemoteProtocolError(f"Node {node} was asked about shards {asked} and spoke for {page.shards}.")
    return page


def _far_end(shard: ShardDocument, *, reverse: bool) -> bytes | None:
    """The frontier of a page that covered the whole of a shard of a range keyspace."""
    bound = shard.start if reverse else shard.stop
    return bound if isinstance(bound, bytes) else None
