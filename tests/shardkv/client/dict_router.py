"""A router that keeps its keys in a dict and can be told to misbehave: the real transport, none of the cluster.

What real routers do not do on demand: cut a connection before or after applying a write, answer late, refuse the
first requests, lose single shards.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from shardkv.errors import ConditionFailed, ShardKVError, UnknownKeyspace
from shardkv.limits import DEFAULT_LIMITS, Limits
from shardkv.transport.server import Connection, Server, unknown_operation
from shardkv.wire.hello import Identity
from shardkv.wire.messages import (
    Conditions,
    Count,
    CountReply,
    DeleteRange,
    DeleteRangeReply,
    Kind,
    Op,
    Page,
    PartialRead,
    PartialReadReply,
    ReadReply,
    Request,
    Scan,
    ShardProblem,
    Write,
    WriteReply,
    WriteResult,
    decode_count,
    decode_delete_range,
    decode_partial_read,
    decode_scan,
    decode_write,
)


class DictRouter:
    """`store` is what it holds. Faults are attributes that a test sets; use as a context manager."""

    def __init__(self, *, limits: Limits = DEFAULT_LIMITS) -> None:
        self.store: dict[bytes, bytes] = {}
        self.versions: dict[bytes, int] = {}
        self.version = 0
        """Of the newest write."""
        self.writes: list[Write] = []
        """As they were asked; times to live are not kept."""
        self.made: dict[bytes, tuple[int, WriteReply]] = {}
        """By lane, the number of its newest write and what it came to."""
        self.refusals: list[ShardKVError] = []
        """Raised, one for each of the next requests."""
        self.cut_after: Op | None = None
        """The next request of this operation is carried out, and the connection cut instead of an answer."""
        self.delay_s: Callable[[Op], float] = lambda op: 0.0
        self.lost_keys: dict[bytes, ShardProblem] = {}
        """Writes of these keys are refused (or of unknown outcome) with this problem; partial reads lack them."""
        self.requests: list[Op] = []
        self.used_connections: set[Connection] = set()
        """All connections that ever sent a request."""
        self.page_rows = 10_000
        self.port = 0
        self._limits = limits
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._server: Server | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def connections(self) -> int:
        return len(self._server.connections) if self._server else 0

    def __enter__(self) -> DictRouter:
        self._thread.start()
        self.listen()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def listen(self) -> None:
        """Start serving, on the same port as before when it was stopped."""
        self.port = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()

    def stop(self) -> None:
        """Close the port and all connections."""
        if self._server is not None:
            asyncio.run_coroutine_threadsafe(self._server.drain(grace_s=0), self._loop).result()
            self._server = None

    async def _listen(self) -> int:
        self._server = Server(self, me=lambda: Identity("router", "dict"), limits=self._limits)
        return await self._server.listen("127.0.0.1", self.port)

    # Service

    def on_request(self, connection: Connection, request: Request, deadline: float | None) -> None:
        op = Op(request.op) if request.op in list(Op) else None
        if op is None:
            raise unknown_operation(request.op)
        self.requests.append(op)
        self.used_connections.add(connection)
        if self.refusals:
            raise self.refusals.pop(0)
        context = connection.context(request.ctx)
        if context is not None and context.keyspace != "default":
            raise UnknownKeyspace(f"There is no keyspace {context.keyspace!r}.")
        answer = self._answer(op, request)
        if self.cut_after == op:
            self.cut_after = None
            connection.close()
            return
        self._loop.call_later(self.delay_s(op), connection.reply, request.id, answer)

    def on_batch_end(self, connection: Connection) -> None:
        pass

    def on_closed(self, connection: Connection) -> None:
        pass

    def _answer(self, op: Op, request: Request) -> object:
        if op is Op.READ:
            return self._read(decode_partial_read(request.payload))
        if op is Op.WRITE:
            return self._write_once(decode_write(request.payload))
        if op is Op.SCAN:
            return self._scan(decode_scan(request.payload))
        if op is Op.COUNT:
            count: Count = decode_count(request.payload)
            keys = self._keys(count.start, count.stop)
            lost = {key: self.lost_keys[key] for key in keys if count.partial and key in self.lost_keys}
            return CountReply(len(keys) - len(lost), None, list(lost.values()))
        if op is Op.DELETE_RANGE:
            return self._delete_range(decode_delete_range(request.payload))
        if op is Op.STATUS:
            return {"nodes": []}
        raise unknown_operation(op)

    def _read(self, read: PartialRead) -> ReadReply:
        values = [self.store.get(key) for key in read.keys]
        versions = [self.versions.get(key, 0) for key in read.keys] if read.want_versions else None
        if not read.partial:
            return ReadReply(values, versions)
        missing = [place for place, key in enumerate(read.keys) if key in self.lost_keys]
        for place in missing:
            values[place] = None
        problems = {read.keys[place]: self.lost_keys[read.keys[place]] for place in missing}
        return PartialReadReply(values, versions, missing, list(problems.values()))

    def _delete_range(self, asked: DeleteRange) -> DeleteRangeReply:
        keys = self._keys(asked.start, asked.stop)
        step = keys[: self.page_rows if asked.limit is None else min(asked.limit, self.page_rows)]
        for key in step:
            del self.store[key]
            self.versions.pop(key, None)
        return DeleteRangeReply(len(step), None if len(step) == len(keys) else step[-1] + b"\0")

    def _keys(self, start: bytes, stop: bytes | None) -> list[bytes]:
        return sorted(key for key in self.store if start <= key and (stop is None or key < stop))

    def _check_conditions(self, conditions: Conditions) -> None:
        for key, expected in zip(conditions.keys, conditions.versions, strict=True):
            found = self.versions.get(key, 0)
            if found != expected:
                raise ConditionFailed(
                    "It is not so.", detail={"key": key, "expected": expected, "found": found}, hint="Read again."
                )

    def _write_once(self, write: Write) -> WriteReply:
        self.writes.append(write)
        if write.token is None:
            return self._write(write)
        number, reply = self.made.get(write.token.lane, (0, None))
        assert number <= write.token.number
        if number != write.token.number or reply is None:
            reply = self._write(write)
            if max(reply.results) < WriteResult.REFUSED:
                self.made[write.token.lane] = (write.token.number, reply)
        return reply

    def _write(self, write: Write) -> WriteReply:
        if write.conditions is not None:
            self._check_conditions(write.conditions)
        self.version += 1
        number = None
        if write.kinds == Kind.INCR:
            number = int(self.store.get(write.keys[0], b"0")) + int(write.values[0])
            write = Write(None, None, Kind.PUT, write.keys, [b"%d" % number], False)
        results = bytearray()
        problems: dict[int, ShardProblem] = {}
        for index, (key, value) in enumerate(zip(write.keys, write.values, strict=True)):
            kind = write.kinds if isinstance(write.kinds, int) else write.kinds[index]
            problem = self.lost_keys.get(key)
            if problem is not None:
                problems[problem.shard] = problem
                unknown = problem.code == "outcome_unknown"
                results.append(WriteResult.UNKNOWN if unknown else WriteResult.REFUSED)
                continue
            existed = write.want_existed and key in self.store
            results.append(WriteResult.APPLIED_EXISTED if existed else WriteResult.APPLIED)
            if kind == Kind.PUT:
                self.store[key] = value
                self.versions[key] = self.version
            else:
                self.store.pop(key, None)
                self.versions.pop(key, None)
        return WriteReply(bytes(results), self.version, list(problems.values()), number)

    def _scan(self, scan: Scan) -> Page:
        keys = sorted(
            (key for key in self.store if scan.start <= key and (scan.stop is None or key < scan.stop)),
            reverse=scan.reverse,
        )
        most = min(scan.limit, self.page_rows)
        page = keys[:most]
        frontier = None if len(keys) <= most else page[-1] if scan.reverse else page[-1] + b"\0"
        values = None if scan.keys_only else [self.store[key] for key in page]
        return Page(page, values, frontier, None)
