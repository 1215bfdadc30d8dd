"""Direct mode of the blocking client: a pool of connections to each node, and the routes as they were told last.

Routes are asked for on a router's connection that is in hand: after the first call, and after a call that had to go
through a router because a node refused it or could not be reached.

Invariants: at most one thread asks for routes at a time, the others do not wait; a node that could not be reached is
left alone for a while, and its calls go through a router meanwhile; connections to several nodes are taken in one
order by all threads, so that no two wait for each other; a forked child opens its own.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterable, Sequence

from shardkv.client.calls import Call, Lost, Outcome
from shardkv.client.connection import Connection
from shardkv.client.direct import Leg, left_for_router, legs_of, routes_of
from shardkv.client.pool import Pool, reason_of, when_forked
from shardkv.errors import DeadlineExceeded, ShardKVError, ShardUnavailable
from shardkv.limits import Limits
from shardkv.topology.routes import Routes
from shardkv.transport.address import Address, format_address, parse_address
from shardkv.wire.hello import Identity
from shardkv.wire.messages import Op, RoutesAsked, raw

CONNECT_S = 0.5
"""A node may take this long to answer, and half of what is left, before the call goes through a router."""
LEARN_S = 1.0
"""A router gets so long to tell the routes, within the deadline of the call that asks: its answer is there already."""
PAUSE_FIRST_S = 0.05
PAUSE_MOST_S = 2.0
"""How long a node that cannot be reached is left alone, or a router that does not tell routes: longer every time."""


class Pause:
    """Until when something that failed is not tried again."""

    def __init__(self) -> None:
        self._pause_s = PAUSE_FIRST_S
        self._until = 0.0

    @property
    def over(self) -> bool:
        return not self._until or time.monotonic() >= self._until

    def again(self) -> None:
        """It failed (again)."""
        self._until = time.monotonic() + self._pause_s * random.uniform(0.5, 1.0)
        self._pause_s = min(2 * self._pause_s, PAUSE_MOST_S)


class NodePool(Pool):
    """Connections to one node. One attempt to connect, then the error: what takes patience a router does better."""

    def __init__(
        self, address: Address, *, node: str, cluster_id: str, size: int, keyspace: str, limits: Limits
    ) -> None:
        me = Identity("client", "python", cluster_id)
        super().__init__([address], size=size, me=me, keyspace=keyspace, limits=limits)
        self.away = Pause()
        """Left alone until this is over."""
        self._node = Identity("node", node)

    def leads_to(self, address: Address, cluster_id: str) -> bool:
        """Whether it is for the node of this cluster at this address."""
        return self._addresses[0] == address and self._me.cluster_id == cluster_id

    def _connect(self, timeout_s: float, deadline: float) -> Connection:
        now = time.monotonic()
        (address,) = self._addresses
        try:
            connection = Connection.open(
                address,
                me=self._me,
                keyspace=self._keyspace,
                limits=self._limits,
                deadline=now + min(CONNECT_S, (deadline - now) / 2),
                expected=self._node,
            )
        except OSError as error:
            where = f"node {self._node.name} at {format_address(*address)}"
            raise ShardUnavailable(f"Cannot connect to {where}: {reason_of(error)}.") from None
        self.away = Pause()
        return connection


Pools = dict[str, NodePool]


class NodePools:
    """`exchange` sends what nodes can be asked, `learn` keeps the routes new."""

    def __init__(self, *, keyspace: str, limits: Limits, size: int) -> None:
        self._keyspace = keyspace
        self._limits = limits
        self._size = size
        self._known: tuple[Routes, Pools] | None = None
        """The routes, and a pool for each node in them that has an address."""
        self._stale = True
        """A call could not be answered by the routes since they were told."""
        self._untold = Pause()
        self._closed = False
        self.forget_inherited()
        when_forked(self)

    def forget_inherited(self) -> None:
        """In a forked child: another thread of the parent may have held the lock."""
        self._lock = threading.Lock()
        self._learning_until = 0.0
        """Somebody asks for routes, and the others need not. A time, so that no call that is interrupted leaves it."""

    def close(self) -> None:
        self._closed = True
        if self._known is not None:
            _close_all(self._known[1].values())

    # Calls

    def exchange(self, calls: Sequence[Call], timeout_s: float, deadline: float) -> Sequence[Call]:
        """Ask nodes for the calls and settle them. Returns those that are to go through a router now."""
        if self._known is None:
            return calls
        routes, pools = self._known
        left: list[Call] = []
        asked: list[Call] = []
        legs_by_node: dict[str, list[Leg]] = {}
        for call in calls:
            legs = legs_of(call, routes)
            if not legs or not all(self._worth_trying(pools.get(leg.node)) for leg in legs):
                left.append(call)
                continue
            asked.append(call)
            for leg in legs:
                legs_by_node.setdefault(leg.node, []).append(leg)
        if asked:
            if len(legs_by_node) == len(asked) == 1:
                ((leg,),) = legs_by_node.values()
                _ask_one(leg, pools[leg.node], timeout_s, deadline)
            else:
                _ask(legs_by_node, pools, timeout_s, deadline)
            refused = left_for_router(asked)
            if refused:
                self._stale = True
                left += refused
        return left

    def _worth_trying(self, pool: NodePool | None) -> bool:
        if pool is None:
            self._stale = True
        return pool is not None and pool.away.over

    # Routes

    def learn(self, connection: Connection, deadline: float) -> None:
        """Ask the router at the other end for newer routes, if there is need and nobody else does."""
        if not self._stale or not connection.usable or not self._untold.over:
            return
        now = time.monotonic()
        if now < self._learning_until:
            return
        self._learning_until = until = min(deadline, now + LEARN_S)
        try:
            cluster_id, revision = (self._known[0].cluster_id, self._known[0].revision) if self._known else (None, 0)
            outcome = connection.ask(Op.ROUTES, raw(RoutesAsked(cluster_id, revision)), until)
            with self._lock:
                self._take(outcome)
        finally:
            self._learning_until = 0.0

    def _take(self, outcome: Outcome) -> None:
        try:
            newer = routes_of(outcome, self._keyspace)
        except ShardKVError:
            self._untold.again()
            return
        self._stale = False
        self._untold = Pause()
        if newer is not None:
            before = self._known[1] if self._known is not None else {}
            pools = self._pools_of(newer, before)
            self._known = newer, pools
            _close_all(pool for node, pool in before.items() if pools.get(node) is not pool)
            if self._closed:
                _close_all(pools.values())

    def _pools_of(self, routes: Routes, before: Pools) -> Pools:
        """A pool for each node; those from before that lead to the same."""
        pools: Pools = {}
        for node, told in routes.addresses.items():
            address, pool = parse_address(told), before.get(node)
            if pool is None or not pool.leads_to(address, routes.cluster_id):
                pool = NodePool(
                    address,
                    node=node,
                    cluster_id=routes.cluster_id,
                    size=self._size,
                    keyspace=self._keyspace,
                    limits=self._limits,
                )
            pools[node] = pool
        return pools


def _ask_one(leg: Leg, pool: NodePool, timeout_s: float, deadline: float) -> None:
    """As `_ask`, for the one request that most calls are."""
    try:
        connection = pool.acquire(timeout_s, deadline)
    except ShardKVError as error:
        leg.deliver(_not_reached(pool, error))
        return
    try:
        op, payload, shard, epoch = leg.ask
        leg.deliver(connection.ask(op, payload, deadline, shard, epoch, leg.decode_answer))
    finally:
        pool.release(connection)


def _ask(legs_by_node: dict[str, list[Leg]], pools: Pools, timeout_s: float, deadline: float) -> None:
    """Send to all nodes, then take their answers."""
    lent: dict[str, Connection] = {}
    failed: dict[str, Outcome] = {}
    try:
        for node in sorted(legs_by_node):
            try:
                lent[node] = pools[node].acquire(timeout_s, deadline)
            except ShardKVError as error:
                failed[node] = _not_reached(pools[node], error)
        for node, connection in lent.items():
            connection.send([leg.ask for leg in legs_by_node[node]], deadline)
        for node, legs in legs_by_node.items():
            outcomes = lent[node].receive(deadline) if node in lent else [failed[node]] * len(legs)
            for leg, outcome in zip(legs, outcomes, strict=True):
                leg.deliver(outcome)
    finally:
        for node, connection in lent.items():
            pools[node].release(connection)


def _not_reached(pool: NodePool, error: ShardKVError) -> Outcome:
    """What it means for the legs of a node that there is no connection to it."""
    if isinstance(error, DeadlineExceeded):
        return error
    pool.away.again()
    return Lost(error.message, sent=False)


def _close_all(pools: Iterable[NodePool]) -> None:
    for pool in list(pools):
        pool.close()
