"""One connection to each node of the topology.

Invariant: there is a link exactly for the nodes that have an address in the newest topology, to that address.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from shardkv.hybrid_clock import HybridClock
from shardkv.limits import Limits
from shardkv.topology.view import Topology
from shardkv.transport.peer import Peer
from shardkv.wire.hello import Identity

log = logging.getLogger(__name__)


class NodeLinks:
    """`on_usable` runs whenever a node can be reached, or reads what it is sent, (again)."""

    def __init__(
        self,
        *,
        me: Callable[[], Identity],
        limits: Limits,
        clock: HybridClock,
        on_usable: Callable[[], None],
    ) -> None:
        self._me = me
        self._limits = limits
        self._clock = clock
        self._on_usable = on_usable
        self._peers: dict[str, Peer] = {}
        self._addresses: dict[str, str] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def update(self, topology: Topology) -> None:
        """Follow a newer topology."""
        wanted = {node.name: node.address for node in topology.nodes.values() if node.address}
        for name in [name for name in self._peers if self._addresses[name] != wanted.get(name)]:
            self._drop(name)
        for name, address in wanted.items():
            if name not in self._peers:
                self._add(name, address)

    def _add(self, name: str, address: str) -> None:
        peer = Peer(
            [address],
            me=self._me,
            expected=Identity("node", name),
            limits=self._limits,
            clock=self._clock,
            on_up=partial(self._up, name),
            on_room=self._on_usable,
        )
        self._peers[name] = peer
        self._addresses[name] = address
        peer.start()

    def _up(self, name: str) -> None:
        log.info("node_reached node=%s", name)
        self._on_usable()

    def _drop(self, name: str) -> None:
        del self._addresses[name]
        task = asyncio.get_running_loop().create_task(self._peers.pop(name).close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def usable(self, node: str) -> Peer | None:
        """The peer of a node that is connected and reads what it is sent, or None."""
        peer = self._peers.get(node)
        return peer if peer is not None and peer.writable else None

    def problem(self, node: str) -> str:
        """Why a node cannot be reached, as a sentence."""
        peer = self._peers.get(node)
        if peer is None:
            return f"Node {node} has never registered."
        return f"Node {node} does not read what it is sent." if peer.connected else peer.last_problem.message

    async def close(self) -> None:
        for name in list(self._peers):
            self._drop(name)
        await asyncio.gather(*self._closing, return_exceptions=True)
