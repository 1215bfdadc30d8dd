"""Carries out what the controller plans, while this process leads.

The plan is a pure function; this loop hands it the newest view and the newest reports, and turns what it returns into
transactions, each with the leader's own compare added to it. The loop remembers nothing from one round to the next:
whoever leads after it goes on from what is in the store.

Invariant: no transaction is sent once the lease is known to be lost, and the next round starts only after the view
has moved past the last one's transactions, or some time has gone by. So a plan that cannot be carried out, or whose
outcome is not known, is made again from what is known then.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from shardkv.errors import DiskFull, InvalidArgument, OutcomeUnknown, UnavailableError
from shardkv.metadata.controller import plan_next
from shardkv.metadata.leading import Term
from shardkv.metadata.reports import ReportGatherer, Reports
from shardkv.metadata.store import MetaStore
from shardkv.metadata.view import StoreView
from shardkv.topology.view import Topology
from shardkv.transport.server import wall_ms
from shardkv.wire.hello import Identity
from shardkv.wire.messages import MetaTxn

log = logging.getLogger(__name__)

RETRY_S = 1.0
"""How long to wait before trying again what did not work, unless something is new."""

Plan = Callable[[Topology, Reports, int], Sequence[MetaTxn]]
"""(view, reports, wall clock in ms) to the transactions that should be carried out now, each by itself."""


def _plan_placing(topology: Topology, reports: Reports, now_ms: int) -> Sequence[MetaTxn]:
    txn = plan_next(topology)
    return [] if txn is None else [txn]


def _never(topology: Topology) -> float | None:
    return None


@dataclass(frozen=True, slots=True)
class Core:
    """What decides: pure functions of the view."""

    plan: Plan = _plan_placing
    reports_every_s: Callable[[Topology], float | None] = _never
    """How often the plan needs to hear of the nodes, and is made again though nothing is new; None: it need not."""


class Controller:
    """The loop over one store. `run(term)` is what a leader does."""

    def __init__(self, store: MetaStore, view: StoreView, core: Core, *, me: Callable[[], Identity]) -> None:
        self._store = store
        self._view = view
        self._core = core
        self._me = me
        self._news = asyncio.Event()
        view.observe(self._news.set)
        self._newest = 0
        """Revision of the newest transaction that was applied here."""
        self.txns = 0
        """Carried out, in this process's life."""

    async def run(self, term: Term) -> None:
        """Plan and carry out until the lease is lost. Raises StorageError when the store can take no more."""
        gatherer = ReportGatherer(me=self._me, on_report=self._news.set)
        try:
            while term.held:
                every_s = self._core.reports_every_s(self._view.topology)
                gatherer.ask(self._view.topology, every_s)
                self._news.clear()
                went_well = await self._round(term, gatherer.reports)
                went_well = went_well and await self._view.reached(self._newest, timeout_s=RETRY_S)
                await self._wait_for_news(every_s if went_well else RETRY_S)
        finally:
            await gatherer.close()

    async def _round(self, term: Term, reports: Reports) -> bool:
        """Plan once and carry that out. False when something of it was not applied, or may not have been."""
        went_well = True
        for txn in self._core.plan(self._view.topology, reports, wall_ms()):
            if not term.held:
                return False
            try:
                reply = await self._store.txn([*txn.compares, term.compare], txn.puts)
            except (UnavailableError, OutcomeUnknown, DiskFull, InvalidArgument) as error:
                log.warning("plan_put_off reason=%r", error.message)
                return False
            if reply.applied:
                self.txns += 1
                self._newest = reply.revision
            went_well = went_well and reply.applied
        return went_well

    async def _wait_for_news(self, timeout_s: float | None) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._news.wait()
