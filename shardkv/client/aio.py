"""The asyncio client: the names of `Client`, awaitable; scans are async iterators.

All calls of a client share one connection: what is called in one turn of the loop leaves in one frame, and replies
come in any order. Belongs to the event loop that first used it.

Invariants: as for `Client`. Cancelling a call forgets that call and disturbs no other: a late reply finds nobody.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Generic, Literal, NoReturn, Self, TypeVar, cast, overload

from shardkv.client import requests
from shardkv.client.arguments import (
    DEFAULT_ADDRESS,
    DEFAULT_TIMEOUT_S,
    Decode,
    Out,
    as_given,
    as_text,
    to_addresses,
    to_keyspace,
    to_timeout_s,
)
from shardkv.client.backoff import answer_needs_s, pause_s, retry_after_s
from shardkv.client.calls import Call, State, raise_failure, settle
from shardkv.client.connection import CTX
from shardkv.client.deadlines import Deadlines
from shardkv.client.lanes import Lanes
from shardkv.client.missing import PartialCount, PartialDict, wants_partial
from shardkv.client.node_peers import NodePeers
from shardkv.client.pool import closed_error, no_router_error
from shardkv.client.scan import ScanPlan, plan_range, plan_scan
from shardkv.client.scan_rows import AsyncScan, keys_of, pairs_of
from shardkv.client.sent import Sent
from shardkv.errors import InvalidArgument, ShardKVError, UnavailableError
from shardkv.limits import DEFAULT_LIMITS, Limits
from shardkv.transport.address import format_address
from shardkv.transport.peer import Peer
from shardkv.wire.hello import Identity
from shardkv.wire.messages import Context, Op, Page, RawReply, raw
from shardkv.write_batch import Text, WriteBatch

Key = TypeVar("Key", str, bytes)

Exchange = Callable[[Sequence[Call], float, float], Awaitable[None]]
"""Sends calls, and settles them; also with their timeout and deadline."""

log = logging.getLogger(__name__)


class AsyncClient(Generic[Out]):
    """A client of one keyspace for asyncio programs; the arguments are those of `Client`."""

    @overload
    def __init__(
        self: AsyncClient[bytes],
        addresses: str | Iterable[str] = ...,
        *,
        keyspace: str = ...,
        timeout: float = ...,
        decode_responses: Literal[False] = ...,
        limits: Limits = ...,
        retry_writes: bool = ...,
        direct: bool = ...,
    ) -> None: ...
    @overload
    def __init__(
        self: AsyncClient[str],
        addresses: str | Iterable[str] = ...,
        *,
        keyspace: str = ...,
        timeout: float = ...,
        decode_responses: Literal[True],
        limits: Limits = ...,
        retry_writes: bool = ...,
        direct: bool = ...,
    ) -> None: ...
    def __init__(
        self,
        addresses: str | Iterable[str] = DEFAULT_ADDRESS,
        *,
        keyspace: str = "default",
        timeout: float = DEFAULT_TIMEOUT_S,
        decode_responses: bool = False,
        limits: Limits = DEFAULT_LIMITS,
        retry_writes: bool = True,
        direct: bool = False,
    ) -> None:
        self.keyspace = to_keyspace(keyspace)
        self._addresses = [format_address(*address) for address in to_addresses(addresses)]
        self._timeout_s = to_timeout_s(timeout, DEFAULT_TIMEOUT_S)
        self._limits = limits
        self._lanes = Lanes() if retry_writes else None
        self._decode: Decode[Out] = cast(Decode[Out], as_text if decode_responses else as_given)
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._peer: Peer | None = None
        self._deadlines = Deadlines()
        self._nodes = NodePeers(keyspace=self.keyspace, limits=limits, deadlines=self._deadlines) if direct else None

    # One key

    async def put(
        self,
        key: Text,
        value: Text,
        *,
        ttl: float | None = None,
        if_version: int | None = None,
        if_absent: bool = False,
        timeout: float | None = None,
    ) -> int:
        """Store `value` under `key`; when this returns, the write is acknowledged. Returns its version.

        `ttl`: seconds, counted from when the node takes the write, after which the key reads as absent; without it
        the key stays, also when what it replaces would have ended. `if_absent`: only if the key does not exist;
        `if_version`: only if it has this version (0: does not exist), as `put`, or `get` with `with_version`, told it.
        Raises ConditionFailed when it is otherwise, with the version `found` in its detail: nothing was written.
        """
        call = requests.put(key, value, self._limits, ttl=ttl, if_version=if_version, if_absent=if_absent)
        await self._run_one(call, timeout)
        return requests.version_of(call)

    @overload
    async def get(
        self, key: Text, *, with_version: Literal[False] = ..., timeout: float | None = ...
    ) -> Out | None: ...
    @overload
    async def get(
        self, key: Text, *, with_version: Literal[True], timeout: float | None = ...
    ) -> tuple[Out, int] | None: ...
    async def get(
        self, key: Text, *, with_version: bool = False, timeout: float | None = None
    ) -> Out | tuple[Out, int] | None:
        """The value of `key`, None when there is none. `with_version`: (value, version), see `put`."""
        call = requests.get(key, self._limits, with_version=with_version)
        await self._run_one(call, timeout)
        if with_version:
            return requests.versioned(call, self._decode)[0]
        value = call.values[0]
        return None if value is None else self._decode(value)

    async def delete(self, key: Text, *, if_version: int | None = None, timeout: float | None = None) -> bool:
        """Delete `key`. True when it existed. `if_version`: only if it has this version, see `put`."""
        call = requests.delete(key, self._limits, if_version=if_version)
        await self._run_one(call, timeout)
        return requests.existed([call]) == 1

    async def incr(self, key: Text, by: int = 1, *, ttl: float | None = None, timeout: float | None = None) -> int:
        """Add `by`, which may be negative, to the number stored under `key`, in one step; return the sum.

        A number is decimal text of a signed 64-bit whole number, as `put(key, str(number))` stores it; a key that does
        not exist counts from 0. The key ends `ttl` seconds from now; without `ttl` when it would have ended anyway.
        Raises InvalidNumber when the value is no such number or the sum would be none. After OutcomeUnknown the number
        was added once or not at all.
        """
        call = requests.incr(key, by, self._limits, ttl=ttl)
        await self._run_one(call, timeout)
        return requests.sum_of(call)

    # Many keys

    async def put_many(
        self, mapping: Mapping[Key, Text], *, ttl: float | None = None, timeout: float | None = None
    ) -> None:
        """Store all pairs, in several requests when there are many. Not atomic: an error's `detail` says how many
        were `applied`, `refused` and `unknown`, and for which `shards`. `ttl`: as in `put`, for all of them."""
        await self._run(requests.put_many(mapping, self._limits, ttl=ttl), timeout)

    async def batch_put(
        self,
        keys: Sequence[Text],
        values: Sequence[Text],
        *,
        ttl: float | None = None,
        timeout: float | None = None,
    ) -> None:
        """`put_many` of two lists of the same length; the last value wins when a key comes twice."""
        await self._run(requests.batch_put(keys, values, self._limits, ttl=ttl), timeout)

    @overload
    async def get_many(
        self,
        keys: Iterable[Key],
        *,
        with_version: Literal[False] = ...,
        on_shard_error: Literal["fail"] = ...,
        timeout: float | None = ...,
    ) -> dict[Key, Out | None]: ...
    @overload
    async def get_many(
        self,
        keys: Iterable[Key],
        *,
        with_version: Literal[True],
        on_shard_error: Literal["fail"] = ...,
        timeout: float | None = ...,
    ) -> dict[Key, tuple[Out, int] | None]: ...
    @overload
    async def get_many(
        self,
        keys: Iterable[Key],
        *,
        with_version: Literal[False] = ...,
        on_shard_error: Literal["partial"],
        timeout: float | None = ...,
    ) -> PartialDict[Key, Out | None]: ...
    @overload
    async def get_many(
        self,
        keys: Iterable[Key],
        *,
        with_version: Literal[True],
        on_shard_error: Literal["partial"],
        timeout: float | None = ...,
    ) -> PartialDict[Key, tuple[Out, int] | None]: ...
    async def get_many(
        self,
        keys: Iterable[Key],
        *,
        with_version: bool = False,
        on_shard_error: Literal["fail", "partial"] = "fail",
        timeout: float | None = None,
    ) -> dict[Key, Out | None] | dict[Key, tuple[Out, int] | None]:
        """The values of `keys`, by key as given, in order of asking; None where there is none.

        `with_version`: (value, version) for each. `on_shard_error`: with "partial" keys of shards that cannot be read
        now are left out of the dict, without waiting for them; its `missing` says which shards these are, and why.
        """
        asked = requests.listed(keys)
        if wants_partial(on_shard_error):
            parts = requests.get_some(asked, self._limits, with_version=with_version)
            await self._run(parts, timeout)
            if with_version:
                return requests.some_versioned_by_key(asked, parts, self._decode)
            return requests.some_by_key(asked, parts, self._decode)
        calls = requests.get_many(asked, self._limits, with_version=with_version)
        await self._run(calls, timeout)
        if with_version:
            return requests.versioned_by_key(asked, calls, self._decode)
        return requests.by_key(asked, calls, self._decode)

    async def delete_many(self, keys: Iterable[Text], *, timeout: float | None = None) -> int:
        """Delete all of them; how many existed. Not atomic."""
        calls = requests.delete_many(keys, self._limits)
        await self._run(calls, timeout)
        return requests.existed(calls)

    async def write(
        self,
        batch: WriteBatch,
        *,
        if_versions: Mapping[str, int] | Mapping[bytes, int] | None = None,
        timeout: float | None = None,
    ) -> int | None:
        """Apply a batch in one request, atomic per shard. Raises BatchTooLarge: it is never cut.

        `if_versions`: apply it only if each of these keys, in the batch or not, has this version (0: does not exist);
        raises ConditionFailed otherwise. All keys must then be of one shard, for example by a common {tag}; else
        InvalidArgument says which are not. Returns the version of its operations, None when several shards took part
        or the batch is empty: then nothing is sent and no condition judged.
        """
        calls = requests.write(batch, self._limits, if_versions=if_versions)
        await self._run(calls, timeout)
        return requests.shared_version(calls)

    @asynccontextmanager
    async def batch(
        self,
        *,
        if_versions: Mapping[str, int] | Mapping[bytes, int] | None = None,
        timeout: float | None = None,
    ) -> AsyncIterator[WriteBatch]:
        """Collect puts and deletes and apply them at exit, atomic per shard; an exception inside applies nothing.

        `if_versions`: as in `write`.
        """
        self._check_open()
        batch = WriteBatch()
        yield batch
        await self.write(batch, if_versions=if_versions, timeout=timeout)

    # Ranges

    @overload
    def scan(
        self,
        start: Text = ...,
        stop: Text | None = ...,
        *,
        prefix: Text | None = ...,
        limit: int | None = ...,
        reverse: bool = ...,
        keys_only: Literal[False] = ...,
        cursor: str | None = ...,
        on_shard_error: Literal["fail", "partial"] = ...,
        timeout: float | None = ...,
    ) -> AsyncScan[tuple[Out, Out]]: ...
    @overload
    def scan(
        self,
        start: Text = ...,
        stop: Text | None = ...,
        *,
        prefix: Text | None = ...,
        limit: int | None = ...,
        reverse: bool = ...,
        keys_only: Literal[True],
        cursor: str | None = ...,
        on_shard_error: Literal["fail", "partial"] = ...,
        timeout: float | None = ...,
    ) -> AsyncScan[Out]: ...
    def scan(
        self,
        start: Text = b"",
        stop: Text | None = None,
        *,
        prefix: Text | None = None,
        limit: int | None = None,
        reverse: bool = False,
        keys_only: bool = False,
        cursor: str | None = None,
        on_shard_error: Literal["fail", "partial"] = "fail",
        timeout: float | None = None,
    ) -> AsyncScan[tuple[Out, Out]] | AsyncScan[Out]:
        """(key, value) of every key in [start, stop), in key order, read page by page; only keys with `keys_only`.

        `prefix` narrows the range; `reverse` gives the highest key first; `timeout` is per page. `cursor`: go on where
        an earlier scan's `cursor` stood, of this client or another. `on_shard_error`: with "partial" the scan does
        without shards that cannot be read now, and waits for none; its `missing` says what it lacks. The next page
        is fetched while one is used.
        """
        self._check_open()
        plan = plan_scan(
            start,
            stop,
            prefix=prefix,
            limit=limit,
            reverse=reverse,
            keys_only=keys_only,
            cursor=cursor,
            on_shard_error=on_shard_error,
            keyspace=self.keyspace,
            limits=self._limits,
        )
        pages = self._pages(plan, timeout)
        return (
            AsyncScan(plan, pages, keys_of(self._decode))
            if keys_only
            else AsyncScan(plan, pages, pairs_of(self._decode))
        )

    def get_range(
        self,
        start: Text,
        last: Text,
        *,
        limit: int | None = None,
        reverse: bool = False,
        timeout: float | None = None,
    ) -> AsyncScan[tuple[Out, Out]]:
        """(key, value) of every key from `start` to `last`, both included, in key order."""
        self._check_open()
        plan = plan_range(
            start, last, limit=limit, reverse=reverse, keys_only=False, keyspace=self.keyspace, limits=self._limits
        )
        return AsyncScan(plan, self._pages(plan, timeout), pairs_of(self._decode))

    @overload
    async def count(
        self,
        start: Text = ...,
        stop: Text | None = ...,
        *,
        prefix: Text | None = ...,
        on_shard_error: Literal["fail"] = ...,
        timeout: float | None = ...,
    ) -> int: ...
    @overload
    async def count(
        self,
        start: Text = ...,
        stop: Text | None = ...,
        *,
        prefix: Text | None = ...,
        on_shard_error: Literal["partial"],
        timeout: float | None = ...,
    ) -> PartialCount: ...
    async def count(
        self,
        start: Text = b"",
        stop: Text | None = None,
        *,
        prefix: Text | None = None,
        on_shard_error: Literal["fail", "partial"] = "fail",
        timeout: float | None = None,
    ) -> int | PartialCount:
        """How many keys are in [start, stop); `prefix` narrows the range. The nodes count, within one timeout for all.

        As with a scan, a key that is written or deleted meanwhile may be counted or not. `on_shard_error`: with
        "partial" only the shards that can be counted now are; the `missing` of the number says what it lacks.
        """
        partial = wants_partial(on_shard_error)
        calls = requests.count(start, stop, prefix, self._limits, partial=partial)
        await self._run(calls, timeout)
        return requests.counted(calls, start, stop, prefix, self._limits, partial=partial)

    async def delete_range(
        self,
        start: Text = b"",
        stop: Text | None = None,
        *,
        prefix: Text | None = None,
        limit: int | None = None,
        timeout: float | None = None,
    ) -> int:
        """Delete the keys of [start, stop), within `prefix`; return how many existed. Without a range: all keys.

        `limit`: never more than so many, the first in a range keyspace, any in a hash keyspace. Not atomic: the nodes
        delete in steps, within one timeout; a key that is written meanwhile may be deleted or not. An error's detail
        says how many were `deleted` before it: call again to go on. When a node or router goes away meanwhile, steps
        without an answer are repeated, and what they had deleted (a step is about 1,000 keys of a shard) is not
        counted; with a `limit` they are not repeated and OutcomeUnknown is raised.
        """
        calls = requests.delete_range(start, stop, prefix, limit, self._limits)
        await self._run(calls, timeout)
        return sum(call.deleted for call in calls)

    # The cluster

    async def ping(self, *, timeout: float | None = None) -> float:
        """Milliseconds for a round trip to a router."""
        began = time.perf_counter()
        await self._run_one(requests.ping(), timeout)
        return (time.perf_counter() - began) * 1000

    async def status(self, *, timeout: float | None = None) -> dict[str, Any]:
        """What the router knows of the cluster."""
        call = requests.status()
        await self._run_one(call, timeout)
        return cast(dict[str, Any], call.result)

    # Life

    async def close(self) -> None:
        """Close the connections. Calls made from now on raise ClientClosed; closing again does nothing."""
        self._closed = True
        peer, self._peer = self._peer, None
        if peer is not None:
            await peer.close()
        if self._nodes is not None and self._loop is _running():
            await self._nodes.close()
        self._deadlines.close()

    async def __aenter__(self) -> Self:
        self._check_open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("An AsyncClient holds an open connection and cannot be pickled. Create one in each process.")

    # Driving calls

    async def _run_one(self, call: Call, timeout: float | None) -> None:
        """As `_run`, for one call: nearly always it is answered when it was asked once."""
        self._check_open()
        timeout_s = self._timeout_s if timeout is None else to_timeout_s(timeout, self._timeout_s)
        loop, peer = _running(), self._peer
        deadline = loop.time() + timeout_s
        if self._nodes is not None or peer is None or not peer.connected or self._loop is not loop:
            await self._drive([call], timeout_s, deadline, self._exchange)
            return
        lanes = self._lanes if call.op is Op.WRITE else None
        if lanes is not None:
            lanes.lend((call,), timeout_s)
        sent = Sent(loop, peer, self._deadlines, call.op, call.message(), deadline)
        try:
            settle(call, await sent.answer)
            if call.state is not State.DONE:
                await self._drive([call], timeout_s, deadline, _asked)
        finally:
            sent.forget()
            if lanes is not None:
                lanes.take_back((call,))

    async def _run(self, calls: Sequence[Call], timeout: float | None) -> None:
        """Drive `calls` to their end. Raises the worst of their errors."""
        self._check_open()
        timeout_s = self._timeout_s if timeout is None else to_timeout_s(timeout, self._timeout_s)
        await self._drive(calls, timeout_s, _running().time() + timeout_s, self._exchange)

    async def _drive(self, calls: Sequence[Call], timeout_s: float, deadline: float, exchange: Exchange) -> None:
        """As `_run`, a window of the calls at a time. `exchange`: what to do with the first of them."""
        waiting: Sequence[Call] = calls
        window: int = requests.WINDOW
        attempt = 0
        lanes = self._lanes
        try:
            while waiting:
                now: Sequence[Call] = waiting[:window]
                if lanes is not None:
                    lanes.lend(now, timeout_s)
                await exchange(now, timeout_s, deadline)
                exchange = self._exchange
                if len(waiting) == 1 and waiting[0].state is State.DONE:
                    return  # as most calls end, and these need no more looks
                if lanes is not None:
                    lanes.take_back(call for call in now if call.state is not State.WAITING)
                if any(call.state is State.FAILED for call in now):
                    break
                waiting = [*(call for call in now if call.state is State.WAITING), *waiting[window:]]
                refused = any(call.error is not None for call in now)
                asked_s = retry_after_s(call.error for call in now) if refused else 0.0
                if waiting and not await _paused(attempt if refused else None, timeout_s, deadline, asked_s):
                    for call in waiting:
                        call.expire(timeout_s)
                    break
                if refused:
                    window, attempt = 1, attempt + 1
        finally:
            if lanes is not None:
                lanes.take_back(calls)
        raise_failure(calls)

    async def _exchange(self, calls: Sequence[Call], timeout_s: float, deadline: float) -> None:
        """Send the calls, to nodes or to a router, and settle them."""
        if self._nodes is not None and self._loop is _running():
            calls = await self._nodes.exchange(calls, deadline)
            if not calls:
                return
        try:
            peer = self._connected_peer() or await self._connect(timeout_s, deadline)
        except ShardKVError as error:
            for call in calls:
                call.give_up(error)
            return
        await self._exchange_at(peer, calls, deadline)
        if self._nodes is not None:
            self._nodes.learn(peer)

    async def _exchange_at(self, peer: Peer, calls: Sequence[Call], deadline: float) -> None:
        loop = _running()
        sent = [Sent(loop, peer, self._deadlines, call.op, call.message(), deadline) for call in calls]
        try:
            for call, one in zip(calls, sent, strict=True):
                settle(call, await one.answer)
        finally:
            for one in sent:
                one.forget()

    def _connected_peer(self) -> Peer | None:
        return self._peer if self._peer is not None and self._peer.connected and self._loop is _running() else None

    async def _connect(self, timeout_s: float, deadline: float) -> Peer:
        """The connection, when there is one before the deadline. Raises RouterUnavailable or a router's refusal."""
        self._check_open()  # closing ends calls in flight: they must not connect anew
        peer = self._started_peer()
        try:
            await peer.wait_connected(deadline - _running().time())
        except UnavailableError as error:
            self._check_open()
            where = ", ".join(self._addresses)
            raise no_router_error({where: error.message.rstrip(".")}, timeout_s) from None
        return peer

    def _started_peer(self) -> Peer:
        if self._loop is not None and self._loop is not _running():
            raise InvalidArgument(
                "This AsyncClient belongs to another event loop.", hint="Create one in each loop and each process."
            )
        if self._peer is None:
            self._loop = _running()
            self._peer = Peer(self._addresses, me=_identity, limits=self._limits, on_up=self._register_keyspace)
            self._peer.start()
        return self._peer

    def _register_keyspace(self) -> None:
        """First thing on every new connection; requests sent after it find it registered."""
        if self._peer is not None:
            context = raw(Context(CTX, self.keyspace, None, None))
            self._peer.send(Op.CONTEXT, context, on_reply=_note_refusal)

    async def _pages(self, plan: ScanPlan, timeout: float | None) -> AsyncGenerator[Page, None]:
        ahead: asyncio.Task[Page] | None = None
        try:
            while not plan.finished:
                page = await (ahead or self._page(plan, timeout))
                plan.take(page)
                ahead = None if plan.finished else _running().create_task(self._page(plan, timeout))
                yield page
        finally:
            if ahead is not None:
                ahead.cancel()
                await asyncio.gather(ahead, return_exceptions=True)

    async def _page(self, plan: ScanPlan, timeout: float | None) -> Page:
        call = plan.call()
        await self._run_one(call, timeout)
        return cast(Page, call.result)

    def _check_open(self) -> None:
        if self._closed:
            raise closed_error()


async def _asked(calls: Sequence[Call], timeout_s: float, deadline: float) -> None:
    """They were, and settled."""


async def _paused(attempt: int | None, timeout_s: float, deadline: float, asked_s: float) -> bool:
    """Wait before the next try, if there was a try; False when it is too late for another.

    `asked_s`: what a refusal asked for.
    """
    left_s = deadline - _running().time()
    if attempt is None:
        return left_s > 0
    pause = pause_s(attempt, random.random(), left_s=left_s, needed_s=answer_needs_s(timeout_s), retry_after_s=asked_s)
    if pause is not None:
        await asyncio.sleep(pause)
    return pause is not None


def _identity() -> Identity:
    return Identity("client", "python")


def _note_refusal(reply: RawReply | ShardKVError) -> None:
    """A keyspace that could not be registered shows in the answers to the requests that name it."""
    if isinstance(reply, ShardKVError):
        log.debug("keyspace_not_registered reason=%r", reply.message)


_running = asyncio.get_running_loop
