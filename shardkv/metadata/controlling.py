"""Carries out what the controller decides, while this process leads.

The controller (shardkv.control) is pure. This loop tells it the newest topology, the reports of nodes and the time, and
turns what it returns into transactions, each with the leader's own compare added to it. Whoever leads begins with a new
controller: all that counts is in the store.

Invariant: no transaction is sent once the lease is known to be lost, and the next round starts only after the view
has moved past the last one's transactions, or some time has gone by. So what was refused, or has an outcome that is
not known, is decided anew from what is known then.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

from shardkv.control.controller import Controller, changing
from shardkv.control.jobs import ENDED
from shardkv.control.reports import NodeReport
from shardkv.errors import DiskFull, InvalidArgument, OutcomeUnknown, UnavailableError
from shardkv.metadata.leading import Term
from shardkv.metadata.reports import ReportGatherer
from shardkv.metadata.store import MetaStore
from shardkv.metadata.view import StoreView
from shardkv.topology.view import Topology
from shardkv.transport.server import wall_ms
from shardkv.wire.hello import Identity
from shardkv.wire.messages import MetaTxn

log = logging.getLogger(__name__)

RETRY_S = 1.0
"""How long to wait before trying again what did not work, unless something is new."""
BUSY_ROUND_S = 1.0
"""While something is under way, nodes are asked so often, and a round is made though nothing is new."""
WATCHFUL_ROUND_S = 5.0
"""The same while nothing is under way; well below `ControllerSettings.away_ms`."""


class Core(Protocol):
    """What decides; shardkv.control.controller.Controller is one."""

    def hear(self, report: NodeReport, now_ms: int) -> None:
        """Take in what a node says of itself."""

    def tick(self, topology: Topology, now_ms: int, wall_ms: int) -> Sequence[MetaTxn]:
        """The transactions that should be carried out now, each by itself."""


def new_controller() -> Core:
    """A controller that knows nothing yet."""
    return Controller(lambda: secrets.token_hex(8))


def round_s(topology: Topology) -> float:
    """How often a round is due though nothing is new, and how often nodes are asked.

    They are asked when nothing is under way, too: were it not so, all of them would seem to be away, for as long as
    nobody had asked, at the moment a job is asked for.
    """
    jobs = any(job.state not in ENDED for job in topology.jobs.values())
    keyspaces = any(each.dropped or each.placing for each in topology.keyspace_documents.values())
    if jobs or keyspaces or changing(topology):
        return BUSY_ROUND_S
    return WATCHFUL_ROUND_S


class ControlLoop:
    """The loop over one store. `run(term)` is what a leader does."""

    def __init__(
        self,
        store: MetaStore,
        view: StoreView,
        *,
        me: Callable[[], Identity],
        new_core: Callable[[], Core] = new_controller,
        round_s: Callable[[Topology], float | None] = round_s,
    ) -> None:
        self._store = store
        self._view = view
        self._me = me
        self._new_core = new_core
        self._round_s = round_s
        self._news = asyncio.Event()
        view.observe(self._news.set)
        self._newest = 0
        """Revision of the newest transaction that was applied here."""
        self.txns = 0
        """Carried out, in this process's life."""

    async def run(self, term: Term) -> None:
        """Decide and carry out until the lease is lost. Raises StorageError when the store can take no more."""
        core = self._new_core()
        heard: set[str] = set()

        def hear(report: NodeReport) -> None:
            core.hear(report, _steady_ms())
            if report.name not in heard:
                heard.add(report.name)
                self._news.set()

        gatherer = ReportGatherer(me=self._me, on_report=hear)
        try:
            while term.held:
                every_s = self._round_s(self._view.topology)
                gatherer.ask(self._view.topology, every_s)
                self._news.clear()
                went_well = await self._round(term, core)
                went_well = went_well and await self._view.reached(self._newest, timeout_s=RETRY_S)
                await self._wait_for_news(every_s if went_well else RETRY_S)
        finally:
            await gatherer.close()

    async def _round(self, term: Term, core: Core) -> bool:
        """Decide once and carry that out. False when something of it was not applied, or may not have been."""
        went_well = True
        for txn in self._decisions(core):
            if not term.held:
                return False
            try:
                reply = await self._store.txn([*txn.compares, term.compare], txn.puts)
            except (UnavailableError, OutcomeUnknown, DiskFull, InvalidArgument) as error:
                log.warning("decision_put_off reason=%r", error.message)
                return False
            if reply.applied:
                self.txns += 1
                self._newest = reply.revision
            went_well = went_well and reply.applied
        return went_well

    def _decisions(self, core: Core) -> Sequence[MetaTxn]:
        """What `core` decides. A mistake in it ends up in the log and is no reason to stop serving the store."""
        try:
            return core.tick(self._view.topology, _steady_ms(), wall_ms())
        except Exception:
            log.exception("decision_failed")
            return []

    async def _wait_for_news(self, timeout_s: float | None) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._news.wait()


def _steady_ms() -> int:
    return int(asyncio.get_running_loop().time() * 1000)
