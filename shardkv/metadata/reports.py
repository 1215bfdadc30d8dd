"""What nodes report of themselves: asked of each at its address, over and over while somebody needs it.

A node answers STATUS with a map that has a `report` (shardkv.control.reports); one that has none is not heard of.

Invariants: a node is asked one question at a time, in a task of its own, so one that hangs holds up nobody. A node
that is not registered any more is not asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from shardkv.control.reports import NodeReport
from shardkv.errors import ShardKVError
from shardkv.limits import DEFAULT_LIMITS, Limits
from shardkv.topology.documents import NodeDocument
from shardkv.topology.view import Topology
from shardkv.transport.peer import Peer
from shardkv.wire.hello import Identity
from shardkv.wire.messages import NOTHING, Op

ANSWER_TIMEOUT_S = 2.0


class _Status(msgspec.Struct):
    """A node's status, as far as it is looked at here."""

    report: NodeReport | None = None


_decoder = msgspec.msgpack.Decoder(_Status)


@dataclass(slots=True)
class _Asked:
    address: str
    peer: Peer
    task: asyncio.Task[None]


class ReportGatherer:
    """Asks nodes, once `ask` named them, and hands each report to `on_report`."""

    def __init__(
        self, *, me: Callable[[], Identity], on_report: Callable[[NodeReport], None], limits: Limits = DEFAULT_LIMITS
    ) -> None:
        self._me = me
        self._limits = limits
        self._on_report = on_report
        self._asked: dict[str, _Asked] = {}
        self._every_s = 1.0

    def ask(self, topology: Topology, every_s: float | None) -> None:
        """From now on ask the nodes of `topology` so often; None: ask nobody."""
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

    async def _keep_asking(self, name: str, peer: Peer) -> None:
        peer.start()
        try:
            while True:
                with suppress(ShardKVError, msgspec.MsgspecError):
                    payload = await peer.call(Op.STATUS, NOTHING, timeout_s=ANSWER_TIMEOUT_S)
                    report = _decoder.decode(payload).report
                    if report is not None and report.name == name:
                        self._on_report(report)
                await asyncio.sleep(self._every_s)
        finally:
            await peer.close()


def _is_at(asked: _Asked, node: NodeDocument | None) -> bool:
    return node is not None and node.address == asked.address
