"""The blocking client. Safe to share among threads and across fork; not to pickle.

Invariants: every call ends by its deadline, which covers waiting for a connection, connecting, retries and all
requests the call is cut into; a write is sent again only when that cannot apply it twice; after `close` every use
raises ClientClosed.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Generic, Literal, NoReturn, Self, TypeVar, cast, overload

from shardkv.client import requests
from shardkv.client.ahead import Ahead
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
from shardkv.client.lanes import Lanes
from shardkv.client.missing import PartialCount, PartialDict, wants_partial
from shardkv.client.node_pools import NodePools
from shardkv.client.pool import Pool, closed_error
from shardkv.client.scan import ScanPlan, plan_range, plan_scan
from shardkv.client.scan_rows import Scan, keys_of, pairs_of
from shardkv.errors import Draining, InvalidArgument, ShardKVError
from shardkv.limits import DEFAULT_LIMITS, Limits
from shardkv.wire.hello import Identity
from shardkv.wire.messages import Op, Page
from shardkv.write_batch import Text, WriteBatch

Key = TypeVar("Key", str, bytes)

Exchange = Callable[[Sequence[Call], float, float], None]
"""Sends calls, and settles them; also with their timeout and deadline."""

CONNECTIONS_MAX = 32


class Client(Generic[Out]):
    """A client of one keyspace.

    `addresses`: "HOST:PORT" of a router, several with commas between, or a list. `timeout`: seconds a call may take,
    for calls that give none of their own. `decode_responses`: keys and values come back as str. `connections_max`:
    connections of all threads together; calls wait for a free one. `limits`: when the cluster's are not the defaults.
    `retry_writes`: a write whose answer was lost is sent again, within its timeout, with a token by which the cluster
    makes it once; without, it raises OutcomeUnknown at once.
    `direct`: reads and writes of keys go to the nodes themselves (up to `connections_max` connections to each), through
    a router only when a node cannot be reached or its shards have moved; everything else through a router.
    """

    @overload
    def __init__(
        self: Client[bytes],
        addresses: str | Iterable[str] = ...,
        *,
        keyspace: str = ...,
        timeout: float = ...,
        decode_responses: Literal[False] = ...,
        connections_max: int = ...,
        limits: Limits = ...,
        retry_writes: bool = ...,
        direct: bool = ...,
    ) -> None: ...
    @overload
    def __init__(
        self: Client[str],
        addresses: str | Iterable[str] = ...,
        *,
        keyspace: str = ...,
        timeout: float = ...,
        decode_responses: Literal[True],
        connections_max: int = ...,
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
        connections_max: int = CONNECTIONS_MAX,
        limits: Limits = DEFAULT_LIMITS,
        retry_writes: bool = True,
        direct: bool = False,
    ) -> None:
        if isinstance(connections_max, bool) or not isinstance(connections_max, int) or connections_max < 1:
            raise InvalidArgument(f"connections_max must be a whole number above 0, not {connections_max!r}.")
        self.keyspace = to_keyspace(keyspace)
        self._timeout_s = to_timeout_s(timeout, DEFAULT_TIMEOUT_S)
        self._limits = limits
        self._lanes = Lanes() if retry_writes else None
        self._decode: Decode[Out] = cast(Decode[Out], as_text if decode_responses else as_given)
        self._closed = False
        self._pool = Pool(
            to_addresses(addresses),
            size=connections_max,
            me=Identity("client", "python"),
            keyspace=self.keyspace,
            limits=limits,
        )
        self._nodes = NodePools(keyspace=self.keyspace, limits=limits, size=connections_max) if direct else None

    # One key

    def put(
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
        self._run_one(call, timeout)
        return requests.version_of(call)

    @overload
    def get(self, key: Text, *, with_version: Literal[False] = ..., timeout: float | None = ...) -> Out | None: ...
    @overload
    def get(self, key: Text, *, with_version: Literal[True], timeout: float | None = ...) -> tuple[Out, int] | None: ...
    def get(
        self, key: Text, *, with_version: bool = False, timeout: float | None = None
    ) -> Out | tuple[Out, int] | None:
        """The value of `key`, None when there is none. `with_version`: (value, version), see `put`."""
        call = requests.get(key, self._limits, with_version=with_version)
        self._run_one(call, timeout)
        if with_version:
            return requests.versioned(call, self._decode)[0]
        value = call.values[0]
        return None if value is None else self._decode(value)

    def delete(self, key: Text, *, if_version: int | None = None, timeout: float | None = None) -> bool:
        """Delete `key`. True when it existed. `if_version`: only if it has this version, see `put`."""
        call = requests.delete(key, self._limits, if_version=if_version)
        self._run_one(call, timeout)
        return requests.existed([call]) == 1

    def incr(self, key: Text, by: int = 1, *, ttl: float | None = None, timeout: float | None = None) -> int:
        """Add `by`, which may be negative, to the number stored under `key`, in one step; return the sum.

        A number is decimal text of a signed 64-bit whole number, as `put(key, str(number))` stores it; a key that does
        not exist counts from 0. The key ends `ttl` seconds from now; without `ttl` when it would have ended anyway.
        Raises InvalidNumber when the value is no such number or the sum would be none. After OutcomeUnknown the number
        was added once or not at all.
        """
        call = requests.incr(key, by, self._limits, ttl=ttl)
        self._run_one(call, timeout)
        return requests.sum_of(call)

    # Many keys

    def put_many(self, mapping: Mapping[Key, Text], *, ttl: float | None = None, timeout: float | None = None) -> None:
        """Store all pairs, in several requests when there are many. Not atomic: an error's `detail` says how many
        were `applied`, `refused` and `unknown`, and for which `shards`. `ttl`: as in `put`, for all of them."""
        self._run(requests.put_many(mapping, self._limits, ttl=ttl), timeout)

    def batch_put(
        self,
        keys: Sequence[Text],
        values: Sequence[Text],
        *,
        ttl: float | None = None,
        timeout: float | None = None,
    ) -> None:
        """`put_many` of two lists of the same length; the last value wins when a key comes twice."""
        self._run(requests.batch_put(keys, values, self._limits, ttl=ttl), timeout)

    @overload
    def get_many(
        self,
        keys: Iterable[Key],
        *,
        with_version: Literal[False] = ...,
        on_shard_error: Literal["fail"] = ...,
        timeout: float | None = ...,
    ) -> dict[Key, Out | None]: ...
    @overload
    def get_many(
        self,
        keys: Iterable[Key],
        *,
        with_version: Literal[True],
        on_shard_error: Literal["fail"] = ...,
        timeout: float | None = ...,
    ) -> dict[Key, tuple[Out, int] | None]: ...
    @overload
    def get_many(
        self,
        keys: Iterable[Key],
        *,
        with_version: Literal[False] = ...,
        on_shard_error: Literal["partial"],
        timeout: float | None = ...,
    ) -> PartialDict[Key, Out | None]: ...
    @overload
    def get_many(
        self,
        keys: Iterable[Key],
        *,
        with_version: Literal[True],
        on_shard_error: Literal["partial"],
        timeout: float | None = ...,
    ) -> PartialDict[Key, tuple[Out, int] | None]: ...
    def get_many(
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
            self._run(parts, timeout)
            if with_version:
                return requests.some_versioned_by_key(asked, parts, self._decode)
            return requests.some_by_key(asked, parts, self._decode)
        calls = requests.get_many(asked, self._limits, with_version=with_version)
        self._run(calls, timeout)
        if with_version:
            return requests.versioned_by_key(asked, calls, self._decode)
        return requests.by_key(asked, calls, self._decode)

    def delete_many(self, keys: Iterable[Text], *, timeout: float | None = None) -> int:
        """Delete all of them; how many existed. Not atomic."""
        calls = requests.delete_many(keys, self._limits)
        self._run(calls, timeout)
        return requests.existed(calls)

    def write(
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
        self._run(calls, timeout)
        return requests.shared_version(calls)

    @contextmanager
    def batch(
        self,
        *,
        if_versions: Mapping[str, int] | Mapping[bytes, int] | None = None,
        timeout: float | None = None,
    ) -> Iterator[WriteBatch]:
        """Collect puts and deletes and apply them at exit, atomic per shard; an exception inside applies nothing.

        `if_versions`: as in `write`.
        """
        self._check_open()
        batch = WriteBatch()
        yield batch
        self.write(batch, if_versions=if_versions, timeout=timeout)

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
    ) -> Scan[tuple[Out, Out]]: ...
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
    ) -> Scan[Out]: ...
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
    ) -> Scan[tuple[Out, Out]] | Scan[Out]:
        """(key, value) of every key in [start, stop), in key order, read page by page; only keys with `keys_only`.

        `prefix` narrows the range; `reverse` gives the highest key first; `timeout` is per page. `cursor`: go on where
        an earlier scan's `cursor` stood, of this client or another. `on_shard_error`: with "partial" the scan does
        without shards that cannot be read now, and waits for none; its `missing` says what it lacks. From the second
        page on the next one is fetched while one is used.
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
        return Scan(plan, pages, keys_of(self._decode)) if keys_only else Scan(plan, pages, pairs_of(self._decode))

    def get_range(
        self,
        start: Text,
        last: Text,
        *,
        limit: int | None = None,
        reverse: bool = False,
        timeout: float | None = None,
    ) -> Scan[tuple[Out, Out]]:
        """(key, value) of every key from `start` to `last`, both included, in key order."""
        self._check_open()
        plan = plan_range(
            start, last, limit=limit, reverse=reverse, keys_only=False, keyspace=self.keyspace, limits=self._limits
        )
        return Scan(plan, self._pages(plan, timeout), pairs_of(self._decode))

    @overload
    def count(
        self,
        start: Text = ...,
        stop: Text | None = ...,
        *,
        prefix: Text | None = ...,
        on_shard_error: Literal["fail"] = ...,
        timeout: float | None = ...,
    ) -> int: ...
    @overload
    def count(
        self,
        start: Text = ...,
        stop: Text | None = ...,
        *,
        prefix: Text | None = ...,
        on_shard_error: Literal["partial"],
        timeout: float | None = ...,
    ) -> PartialCount: ...
    def count(
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
        self._run(calls, timeout)
        return requests.counted(calls, start, stop, prefix, self._limits, partial=partial)

    def delete_range(
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
        self._run(calls, timeout)
        return sum(call.deleted for call in calls)

    # The cluster

    def ping(self, *, timeout: float | None = None) -> float:
        """Milliseconds for a round trip to a router."""
        began = time.perf_counter()
        self._run_one(requests.ping(), timeout)
        return (time.perf_counter() - began) * 1000

    def status(self, *, timeout: float | None = None) -> dict[str, Any]:
        """What the router knows of the cluster."""
        call = requests.status()
        self._run_one(call, timeout)
        return cast(dict[str, Any], call.result)

    # Life

    def close(self) -> None:
        """Close all connections. Calls made from now on raise ClientClosed; closing again does nothing."""
        self._closed = True
        self._pool.close()
        if self._nodes is not None:
            self._nodes.close()

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("A Client holds open connections and cannot be pickled. Create one in each process.")

    # Driving calls

    def _run_one(self, call: Call, timeout: float | None) -> None:
        """As `_run`, for one call: nearly always it is answered when it was asked once."""
        self._check_open()
        timeout_s = self._timeout_s if timeout is None else to_timeout_s(timeout, self._timeout_s)
        deadline = time.monotonic() + timeout_s
        lanes = self._lanes if call.op is Op.WRITE else None
        if lanes is not None:
            lanes.lend((call,), timeout_s)
        try:
            self._ask(call, timeout_s, deadline)
            if call.state is not State.DONE:
                self._drive([call], timeout_s, deadline, _asked)
        finally:
            if lanes is not None:
                lanes.take_back((call,))

    def _run(self, calls: Sequence[Call], timeout: float | None, *, sent: Ahead | None = None) -> None:
        """Drive `calls` to their end. Raises the worst of their errors.

        `sent`: where the only call may have been sent already.
        """
        self._check_open()
        timeout_s = self._timeout_s if timeout is None else to_timeout_s(timeout, self._timeout_s)
        deadline = time.monotonic() + timeout_s
        self._drive(calls, timeout_s, deadline, self._exchange if sent is None else sent.settle)

    def _drive(self, calls: Sequence[Call], timeout_s: float, deadline: float, exchange: Exchange) -> None:
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
                exchange(now, timeout_s, deadline)
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
                if waiting and not _paused(attempt if refused else None, timeout_s, deadline, asked_s):
                    for call in waiting:
                        call.expire(timeout_s)
                    break
                if refused:
                    window, attempt = 1, attempt + 1
        finally:
            if lanes is not None:
                lanes.take_back(calls)
        raise_failure(calls)

    def _ask(self, call: Call, timeout_s: float, deadline: float) -> None:
        """As `_exchange`, for one call."""
        if self._nodes is not None:
            self._exchange([call], timeout_s, deadline)
            return
        try:
            connection = self._pool.acquire(timeout_s, deadline)
        except ShardKVError as error:
            call.give_up(error)
            return
        try:
            settle(call, connection.ask(call.op, call.message(), deadline, None, None, call.decode_answer))
            if call.error is not None and isinstance(call.error, Draining):
                connection.usable = False
        finally:
            self._pool.release(connection)

    def _exchange(self, calls: Sequence[Call], timeout_s: float, deadline: float) -> None:
        """Send the calls, to nodes or over one connection to a router, and settle them."""
        if self._nodes is not None:
            calls = self._nodes.exchange(calls, timeout_s, deadline)
            if not calls:
                return
        try:
            connection = self._pool.acquire(timeout_s, deadline)
        except ShardKVError as error:
            for call in calls:
                call.give_up(error)
            return
        try:
            if len(calls) == 1:
                outcomes = [
                    connection.ask(calls[0].op, calls[0].message(), deadline, None, None, calls[0].decode_answer)
                ]
            else:
                outcomes = connection.exchange([(call.op, call.message()) for call in calls], deadline)
            for call, outcome in zip(calls, outcomes, strict=True):
                settle(call, outcome)
            for call in calls:
                if call.error is not None and isinstance(call.error, Draining):
                    connection.usable = False
            if self._nodes is not None:
                self._nodes.learn(connection, deadline)
        finally:
            self._pool.release(connection)

    def _pages(self, plan: ScanPlan, timeout: float | None) -> Iterator[Page]:
        ahead = Ahead(self._pool)
        call: Call | None = None
        first = True
        try:
            while not plan.finished:
                call = call or plan.call()
                self._run([call], timeout, sent=ahead)
                page: Page = call.result
                plan.take(page)
                call = None
                if not first and not plan.finished:  # who comes back after the first page is likely to want them all
                    call = plan.call()
                    ahead.send(call, to_timeout_s(timeout, self._timeout_s))
                first = False
                yield page
        finally:
            ahead.drop()

    def _check_open(self) -> None:
        if self._closed:
            raise closed_error()


def _asked(calls: Sequence[Call], timeout_s: float, deadline: float) -> None:
    """They were, and settled."""


def _paused(attempt: int | None, timeout_s: float, deadline: float, asked_s: float) -> bool:
    """Wait before the next try, if there was a try; False when it is too late for another.

    `asked_s`: what a refusal asked for.
    """
    left_s = deadline - time.monotonic()
    if attempt is None:
        return left_s > 0
    pause = pause_s(attempt, random.random(), left_s=left_s, needed_s=answer_needs_s(timeout_s), retry_after_s=asked_s)
    if pause is not None:
        time.sleep(pause)
    return pause is not None
