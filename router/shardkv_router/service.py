"""What a router answers: reads and writes forwarded or split and gathered, scan pages, ranges counted and deleted, the
cluster's status, and where keys are, for clients that ask nodes by themselves.

Invariant: a request whose keys all lie in one shard is forwarded as it came, its payload neither decoded twice nor
encoded again. The router keeps no data and no state of a client beyond its open requests.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import msgspec

from shardkv.errors import InvalidArgument, LocalProtocolError, ShardKVError
from shardkv.limits import Limits
from shardkv.topology.gathering import (
    PartialReadGather,
    ReadGather,
    Split,
    WriteGather,
    one_shard,
    split_by_shard,
)
from shardkv.topology.routes import tell_routes
from shardkv.topology.view import KeyspaceView, Topology
from shardkv.transport.server import Connection, unknown_operation
from shardkv.wire.checks import check_range, check_read, check_write
from shardkv.wire.messages import (
    Count,
    DeleteRange,
    Op,
    Page,
    PartialRead,
    ReadReply,
    Request,
    RoutesAsked,
    RoutesReply,
    Scan,
    Write,
    decode_count,
    decode_delete_range,
    decode_partial_read,
    decode_routes,
    decode_scan,
    decode_write,
    raw,
    single_keys,
)
from shardkv_router.bundles import Bundle
from shardkv_router.forwarding import Forwarder
from shardkv_router.part import Part
from shardkv_router.ranges import Ranges
from shardkv_router.scanning import Scanner
from shardkv_router.shares import Gathering, Members, Share, SharedReading, SharedWriting

DEFAULT_KEYSPACE = "default"
_FORWARDED = {int(op): op for op in (Op.READ, Op.WRITE)}
"""Looking an operation up takes a tenth of what `Op(number)` does."""
_WRITE = int(Op.WRITE)

ClusterStatus = Callable[[], Any]
AskMeta = Callable[[msgspec.Raw, float], Awaitable[msgspec.Raw]]
"""Hands an admin request on to the metadata process, which may take so many seconds to answer."""
ADMIN_TIMEOUT_S = 10.0


class RouterService:
    """The `Service` of a router's server. `update` follows the topology."""

    def __init__(
        self,
        forwarder: Forwarder,
        scanner: Scanner,
        limits: Limits,
        cluster_status: ClusterStatus,
        ask_meta: AskMeta | None = None,
    ) -> None:
        self._forwarder = forwarder
        self._scanner = scanner
        self._limits = limits
        self._cluster_status = cluster_status
        self._ask_meta = ask_meta
        self._ranges = Ranges(forwarder)
        self._handlers = {
            Op.READ: self._read,
            Op.WRITE: self._write,
            Op.SCAN: self._scan,
            Op.COUNT: self._count,
            Op.DELETE_RANGE: self._delete_range,
            Op.STATUS: self._status,
            Op.ROUTES: self._routes,
            Op.META_ADMIN: self._admin,
        }
        self._tasks: set[asyncio.Task[None]] = set()
        self.topology = Topology()
        self._routes_told: dict[str, msgspec.Raw] = {}
        """By keyspace, as of this topology."""
        self.counts = dict.fromkeys(self._handlers, 0)

    def update(self, topology: Topology) -> None:
        self.topology = topology
        self._routes_told.clear()

    def on_request(self, connection: Connection, request: Request, deadline: float | None) -> None:
        handler = self._handlers.get(request.op)  # type: ignore[call-overload]
        if handler is None:
            raise unknown_operation(request.op)
        self.counts[request.op] += 1  # type: ignore[index]
        handler(connection, request, deadline)

    def begin_together(
        self, askers: Sequence[Connection], requests: Sequence[Request], deadlines: Sequence[float | None]
    ) -> Callable[[], None] | None:
        """The server's quick way for reads and writes of one key each, all of one keyspace."""
        keys = _keys_of(requests)
        if keys is None:
            return None
        try:
            names = set(map(self._keyspace_name, askers, requests))
            view = self.topology.keyspace(names.pop())
        except ShardKVError:
            return None
        sizes = list(map(len, keys))
        if names or not min(sizes) or max(sizes) > self._limits.key_bytes_max:
            return None
        return partial(self._begin, askers, view, requests, deadlines, keys)

    def _begin(
        self,
        askers: Sequence[Connection],
        view: KeyspaceView,
        requests: Sequence[Request],
        deadlines: Sequence[float | None],
        keys: Sequence[bytes],
    ) -> None:
        """Send each request to its node, those of one node and one deadline in one go."""
        shards, groups = (
            view.shards,
            defaultdict[tuple[str, float | None], tuple[list[Connection], list[Request]]](lambda: ([], [])),
        )
        for asker, request, deadline, position in zip(askers, requests, deadlines, view.positions(keys), strict=True):
            shard = shards[position]
            request.shard, request.epoch = shard.id, shard.epoch
            whose, members = groups[shard.node, deadline]
            whose.append(asker)
            members.append(request)
        writes = sum([request.op == _WRITE for request in requests])
        self.counts[Op.WRITE] += writes
        self.counts[Op.READ] += len(requests) - writes
        for (node, deadline), (whose, members) in groups.items():
            self._forwarder.send_together(node, Bundle(self._forwarder, whose, members, deadline, _part_of))

    def on_batch_end(self, connection: Connection) -> None:
        """Parts leave by themselves at the end of the loop's turn."""

    def on_closed(self, connection: Connection) -> None:
        """Parts in flight end by themselves; their replies are dropped by the connection."""

    def _keyspace_name(self, connection: Connection, request: Request) -> str:
        if request.ctx == 0:
            return DEFAULT_KEYSPACE
        context = connection.context(request.ctx)
        if context is None:
            raise InvalidArgument(f"Context {request.ctx} was not registered on this connection.")
        return context.keyspace

    def _keyspace(self, connection: Connection, request: Request) -> KeyspaceView:
        return self.topology.keyspace(self._keyspace_name(connection, request))

    def _newest(self, connection: Connection, request: Request) -> Callable[[], KeyspaceView]:
        """How to see the request's keyspace as it is at any time from now on. Raises UnknownKeyspace."""
        name = self._keyspace_name(connection, request)
        self.topology.keyspace(name)
        return lambda: self.topology.keyspace(name)

    def _read(self, connection: Connection, request: Request, deadline: float | None) -> None:
        view = self._keyspace(connection, request)
        read: PartialRead = decode_partial_read(request.payload)
        keys = read.keys
        check_read(keys, self._limits)
        if len(keys) == 1 and not read.partial:
            self._forward(connection, request, view.shard_for(keys[0]).id, deadline)
            return
        split = split_by_shard(view, keys)
        if len(split) == 1 and not read.partial:
            self._forward(connection, request, split[0][0], deadline)
            return
        shares = self._by_node(split)
        gather = (PartialReadGather if read.partial else ReadGather)(
            len(keys),
            len(shares),
            self._limits.frame_bytes_max,
            partial(_answer, connection, request.id),
            versions=read.want_versions,
        )
        self._send_shares(shares, SharedReading(read, gather), deadline)

    def _write(self, connection: Connection, request: Request, deadline: float | None) -> None:
        view = self._keyspace(connection, request)
        write: Write = decode_write(request.payload)
        check_write(write, self._limits)
        if write.conditions is not None:
            self._forward(connection, request, one_shard(view, write.keys, write.conditions.keys), deadline)
            return
        if len(write.keys) == 1:
            self._forward(connection, request, view.shard_for(write.keys[0]).id, deadline)
            return
        split = split_by_shard(view, write.keys)
        if len(split) == 1:
            self._forward(connection, request, split[0][0], deadline)
            return
        shares = self._by_node(split)
        gather = WriteGather(len(write.keys), len(shares), partial(_answer, connection, request.id))
        self._send_shares(shares, SharedWriting(write, gather), deadline)

    def _by_node(self, split: Split) -> dict[str, Members]:
        """The shards of a request by the node that owns them now."""
        shares = defaultdict[str, Members](list)
        for shard_id, indexes in split:
            shard = self.topology.shards[shard_id]
            shares[shard.node].append((shard, indexes))
        return shares

    def _send_shares(self, shares: dict[str, Members], gathering: Gathering, deadline: float | None) -> None:
        for node, members in shares.items():
            self._forwarder.send_together(node, Share(self._forwarder, gathering, members, deadline))

    def _forward(self, connection: Connection, request: Request, shard_id: int, deadline: float | None) -> None:
        request.shard = shard_id
        self._forwarder.send(_part_of(connection, request.id, request, deadline))

    def _scan(self, connection: Connection, request: Request, deadline: float | None) -> None:
        keyspace = self._keyspace_name(connection, request)
        self.topology.keyspace(keyspace)
        scan: Scan = decode_scan(request.payload)
        check_range(scan.start, scan.stop, self._limits)
        if scan.limit < 1 or scan.page_bytes < 1:
            raise InvalidArgument("A scan must ask for at least one row and one byte.")
        scan.limit = min(scan.limit, self._limits.operations_max)
        page = self._scanner.page(lambda: self.topology, keyspace, scan, deadline)
        self._later(connection, request.id, page)

    def _count(self, connection: Connection, request: Request, deadline: float | None) -> None:
        view = self._newest(connection, request)
        asked: Count = decode_count(request.payload)
        check_range(asked.start, asked.stop, self._limits)
        counting = self._ranges.count(view, asked, deadline, lambda: connection.closed)
        self._later(connection, request.id, counting)

    def _delete_range(self, connection: Connection, request: Request, deadline: float | None) -> None:
        view = self._newest(connection, request)
        asked: DeleteRange = decode_delete_range(request.payload)
        check_range(asked.start, asked.stop, self._limits)
        if asked.limit is not None and asked.limit < 1:
            raise InvalidArgument("A delete of a range must have a limit of at least one key, or none.")
        self._later(connection, request.id, self._ranges.delete(view, asked, deadline))

    def _status(self, connection: Connection, request: Request, deadline: float | None) -> None:
        self._later(connection, request.id, self._cluster_status())

    def _admin(self, connection: Connection, request: Request, deadline: float | None) -> None:
        if self._ask_meta is None:
            raise unknown_operation(request.op)
        now = asyncio.get_running_loop().time()
        timeout_s = ADMIN_TIMEOUT_S if deadline is None else max(0.0, deadline - now)
        self._later(connection, request.id, self._ask_meta(request.payload.copy(), timeout_s))

    def _routes(self, connection: Connection, request: Request, deadline: float | None) -> None:
        keyspace = self._keyspace_name(connection, request)
        asked: RoutesAsked = decode_routes(request.payload)
        cluster = self.topology.cluster
        if cluster is not None and (asked.cluster_id, asked.revision) == (cluster.cluster_id, self.topology.revision):
            self.topology.keyspace(keyspace)
            _answer(connection, request.id, RoutesReply(cluster.cluster_id, self.topology.revision))
            return
        told = self._routes_told.get(keyspace)
        if told is None:
            told = self._routes_told[keyspace] = raw(tell_routes(self.topology, keyspace))
        _answer(connection, request.id, told)

    def _later(self, connection: Connection, request_id: int, answer: Any) -> None:
        """Answer with what a coroutine returns or raises."""
        task = asyncio.get_running_loop().create_task(_answer_with(connection, request_id, answer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _keys_of(requests: Sequence[Request]) -> list[bytes] | None:
    """The key of each of these reads and writes; None when one of them has not just one."""
    ops = {request.op for request in requests}
    found = {op: single_keys(op, [request.payload for request in requests if request.op == op]) for op in ops}
    if len(found) == 1:
        return found.popitem()[1]
    if None in found.values():
        return None
    following = {op: iter(keys or ()) for op, keys in found.items()}
    return [next(following[request.op]) for request in requests]


def _part_of(connection: Connection, request_id: int, request: Request, deadline: float | None) -> Part:
    """The part for a request of one shard, the one it names, that came with this id."""
    done = partial(_answer, connection, request_id)
    return Part(_FORWARDED[request.op], request.payload, request.shard or 0, deadline, done)


def _answer(connection: Connection, request_id: int, answer: msgspec.Raw | msgspec.Struct | ShardKVError) -> None:
    if isinstance(answer, ShardKVError):
        connection.fail(request_id, answer)
    else:
        connection.reply(request_id, answer, size_bytes=_size_bytes(answer))


def _size_bytes(answer: msgspec.Raw | msgspec.Struct) -> int:
    """About how large an answer is that may be large."""
    match answer:
        case msgspec.Raw():
            return len(answer)
        case ReadReply(values):
            return sum(map(len, filter(None, values)))
        case Page(keys, values):
            return len(keys) * len(keys[0]) + sum(map(len, values or ())) if keys else 0
    return 0


async def _answer_with(connection: Connection, request_id: int, coroutine: Any) -> None:
    try:
        _answer(connection, request_id, await coroutine)
    except ShardKVError as error:
        connection.fail(request_id, error)
    except Exception as error:  # noqa: BLE001 - one request's bug must not leave its caller waiting
        connection.fail(request_id, LocalProtocolError(f"The request failed inside the router: {error!r}."))
