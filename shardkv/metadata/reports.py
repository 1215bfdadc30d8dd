"""What nodes say of themselves: their STATUS, asked of each at its address, over and over while somebody needs it.

Invariants: a node is asked one question at a time, in a task of its own, so one that hangs holds up nobody; what is
told is the newest answer, with the time it came. A node that is not registered any more is not asked and not told.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgspec

from shardkv.errors import ShardKVError
from shardkv.limits import DEFAULT_LIMITS, Limits
from shardkv.topology.documents import NodeDocument
from shardkv.topology.view import Topology
from shardkv.transport.peer import Peer
from shardkv.transport.server import wall_ms
from shardkv.wire.hello import Identity
from shardkv.wire.messages import NOTHING, Op, decode_any

log = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class NodeReport:
    """A node's answer."""

    incarnation: int
    """Of the start of it that answered."""
    heard_ms: int
    """When, by this machine's wall clock."""
    status: dict[str, Any]


Reports = Mapping[str, NodeReport]
"""By node, those that answered since the gathering began."""


@dataclass(slots=True)
class _Asked:
    address: str
    peer: Peer
    task: asyncio.Task[None]


class ReportGatherer:
    """Asks nodes every `every_s` seconds, once `ask` named them. `on_report` runs after each answer."""

    def __init__(
        self, *, me: Callable[[], Identity], on_report: Callable[[], None], limits: Limits = DEFAULT_LIMITS
    ) -> None:
        self._me = me
        self._limits = limits
        self._on_report = on_report
        self._asked: dict[str, _Asked] = {}
        self._every_s = 1.0
        self.reports: dict[str, NodeReport] = {}

    def ask(self, topology: Topology, every_s: float | None) -> None:
        """From now on ask the nodes of `topology` so often; None: ask nobody, and forget what was told."""
        nodes = topology.nodes if every_s is not None else {}
        self._every_s = every_s or self._every_s
        for name in [name for name, asked in self._asked.items() if not _is_at(asked, nodes.get(name))]:
            self._stop_asking(name)
        for name, node in nodes.items():
            if name not in self._asked:
                self._start_asking(node)

    async def close(self) -> None:
        """Ask nobody any more."""
        asked, self._asked = self._asked, {}
        for each in asked.values():
            each.task.cancel()
        await asyncio.gather(*(each.task for each in asked.values()), return_exceptions=True)

    def _start_asking(self, node: NodeDocument) -> None:
        peer = Peer([node.address], me=self._me, expected=Identity("node", node.name), limits=self._limits)
        task = asyncio.get_running_loop().create_task(self._keep_asking(node.name, peer))
        self._asked[node.name] = _Asked(node.address, peer, task)

    def _stop_asking(self, name: str) -> None:
        self._asked.pop(name).task.cancel()
        self.reports.pop(name, None)

    async def _keep_asking(self, name: str, peer: Peer) -> None:
        peer.start()
        try:
            while True:
                with suppress(ShardKVError):
                    await self._ask_once(name, peer)
                await asyncio.sleep(self._every_s)
        finally:
            await peer.close()

    async def _ask_once(self, name: str, peer: Peer) -> None:
        payload = await peer.call(Op.STATUS, NOTHING, timeout_s=ANSWER_TIMEOUT_S)
        with suppress(msgspec.MsgspecError):
            incarnation = peer.remote.incarnation if peer.remote is not None else 0
            self.reports[name] = NodeReport(incarnation, wall_ms(), decode_any(payload))
            self._on_report()


def _is_at(asked: _Asked, node: NodeDocument | None) -> bool:
    return node is not None and node.address == asked.address
