"""Direct mode of the asyncio client: a connection to each node, and the routes as they were told last.

Connections are made, and made again, in the background; while there is none to a node, its calls go through a router.
Routes are asked for in the background, too: after the first call, and after a call that had to go through a router.

Invariants: routes are asked for once at a time; no call waits for them or for a connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from shardkv.client.calls import Call
from shardkv.client.connection import CTX
from shardkv.client.deadlines import Deadlines
from shardkv.client.direct import Leg, left_for_router, legs_of
from shardkv.client.sent import Sent
from shardkv.errors import ShardKVError
from shardkv.limits import Limits
from shardkv.topology.routes import Routes, told_routes
from shardkv.transport.peer import Peer
from shardkv.wire.hello import Identity
from shardkv.wire.messages import Op, RoutesAsked, decode_routes_reply

LEARN_S = 5.0
"""A router gets so long to tell the routes."""
LEARN_PAUSE_S = 0.2
"""They are asked for no oftener than this: a node that is away is no news."""

Peers = dict[str, Peer]


class NodePeers:
    """`exchange` sends what nodes can be asked, `learn` keeps the routes new. Belongs to one event loop."""

    def __init__(self, *, keyspace: str, limits: Limits, deadlines: Deadlines) -> None:
        self._deadlines = deadlines
        self._keyspace = keyspace
        self._limits = limits
        self._known: tuple[Routes, Peers] | None = None
        """The routes, and a peer for each node in them that has an address."""
        self._stale = True
        """A call could not be answered by the routes since they were told."""
        self._learn_from = 0.0
        """When (loop time) they may be asked for again."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._learning: asyncio.Task[None] | None = None
        self._closed = False

    async def close(self) -> None:
        self._closed = True
        if self._learning is not None:
            self._learning.cancel()
        if self._known is not None:
            self._close_all(list(self._known[1].values()))
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def exchange(self, calls: Sequence[Call], deadline: float) -> Sequence[Call]:
        """Ask nodes for the calls and settle them. Returns those that are to go through a router now."""
        if self._known is None:
            return calls
        routes, peers = self._known
        left: list[Call] = []
        asked: list[Call] = []
        legs: list[Leg] = []
        for call in calls:
            mine = legs_of(call, routes)
            if not mine or not all(self._reached(peers.get(leg.node)) for leg in mine):
                left.append(call)
                continue
            asked.append(call)
            legs += mine
        if asked:
            await self._ask(legs, peers, deadline)
            refused = left_for_router(asked)
            if refused:
                self._stale = True
                left += refused
        return left

    async def _ask(self, legs: Sequence[Leg], peers: Peers, deadline: float) -> None:
        """Send to all nodes, then take their answers."""
        loop = asyncio.get_running_loop()
        sent: list[Sent] = []
        try:
            for leg in legs:
                op, payload, shard, epoch = leg.ask
                peer = peers[leg.node]
                sent.append(Sent(loop, peer, self._deadlines, op, payload, deadline, shard=shard, epoch=epoch))
            for leg, one in zip(legs, sent, strict=True):
                leg.deliver(await one.answer)
        finally:
            for one in sent:
                one.forget()

    def _reached(self, peer: Peer | None) -> bool:
        reached = peer is not None and peer.writable
        if not reached:
            self._stale = True
        return reached

    # Routes

    def learn(self, router: Peer) -> None:
        """Begin to ask a router for newer routes, if there is need and nobody does."""
        loop = asyncio.get_running_loop()
        if not self._stale or self._learning is not None or loop.time() < self._learn_from or self._closed:
            return
        self._stale = False
        self._learn_from = loop.time() + LEARN_PAUSE_S
        self._learning = loop.create_task(self._learn(router))
        self._learning.add_done_callback(self._learned)

    async def _learn(self, router: Peer) -> None:
        cluster_id, revision = (self._known[0].cluster_id, self._known[0].revision) if self._known else (None, 0)
        asked = RoutesAsked(cluster_id, revision)
        try:
            told = await router.call(Op.ROUTES, asked, timeout_s=LEARN_S, ctx=CTX)
            newer = told_routes(decode_routes_reply(told), self._keyspace)
        except ShardKVError:
            self._stale = True
            return
        if newer is not None:
            before = self._known[1] if self._known is not None else {}
            peers = self._peers_of(newer, before)
            self._known = newer, peers
            self._close_all([peer for node, peer in before.items() if peers.get(node) is not peer])

    def _learned(self, task: asyncio.Task[None]) -> None:
        self._learning = None

    def _peers_of(self, routes: Routes, before: Peers) -> Peers:
        """A peer for each node; those from before that lead to the same."""
        same = self._known is not None and self._known[0].cluster_id == routes.cluster_id
        peers: Peers = {}
        for node, address in routes.addresses.items():
            peer = before.get(node) if same and self._known and self._known[0].addresses.get(node) == address else None
            if peer is None:
                me = Identity("client", "python", routes.cluster_id)
                expected = Identity("node", node)
                peer = Peer([address], me=lambda me=me: me, expected=expected, limits=self._limits)  # type: ignore[misc]
                peer.start()
            peers[node] = peer
        return peers

    def _close_all(self, peers: Sequence[Peer]) -> None:
        for peer in peers:
            task = asyncio.get_running_loop().create_task(peer.close())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
