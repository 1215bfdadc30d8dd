"""The admin verbs that a metadata process answers: changes that people ask for, and what they are told.

A change comes with a token of the asker's choice. The transaction that makes the change puts the answer under
`asks/<token>`, so a request that is sent again, since its answer was lost, finds the answer and changes nothing.

Invariant: a verb goes by a view that is at least as new as the request: what was asked for before, of whichever
metadata process, is in it.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import msgspec

from shardkv.control.asking import VERBS, Ask, plan
from shardkv.control.reports import NodeReport
from shardkv.control.situation import Heard, Situation
from shardkv.control.told import tell_job, tell_keyspaces, tell_nodes, tell_shards, tell_status
from shardkv.errors import InvalidArgument, MetadataUnavailable
from shardkv.metadata.admin import AdminVerbs
from shardkv.metadata.listing import listed
from shardkv.metadata.reports import ReportGatherer
from shardkv.metadata.store import MetaStore
from shardkv.metadata.view import StoreView
from shardkv.topology.view import Topology
from shardkv.transport.server import wall_ms
from shardkv.wire.hello import Identity
from shardkv.wire.messages import MetaCompare, MetaPut, MetaTxn, MetaTxnReply

ASKS = "asks/"
ASKS_KEPT_MS = 3_600_000
"""How long an answer is remembered: longer than anybody sends a request again."""
FORGOTTEN_MAX = 8
"""Answers that are too old and go with one transaction."""
ATTEMPTS_MAX = 20
"""Transactions that are tried when others change the same documents at the same time."""
TOKEN = re.compile(r"[0-9A-Za-z_-]{8,64}")

REPORTS_EVERY_S = 0.3
REPORT_TIMEOUT_S = 1.0
"""A node that does not report for so long while it is asked counts as not answering."""
REPORTS_IDLE_S = 30.0
"""Nodes are not asked any more when nobody wanted to know for so long."""


class NodeReports:
    """What nodes report, gathered from when somebody wants to know until nobody did for a while."""

    def __init__(self, *, me: Callable[[], Identity]) -> None:
        self._gatherer = ReportGatherer(me=me, on_report=self._take)
        self._heard: dict[str, Heard] = {}
        self._silent: set[str] = set()
        """Nodes that were waited for in vain, and have said nothing since."""
        self._news = asyncio.Event()
        self._end: asyncio.TimerHandle | None = None

    async def heard(self, topology: Topology) -> dict[str, Heard]:
        """The newest report of every node, None of one that does not answer."""
        loop = asyncio.get_running_loop()
        if self._end is not None:
            self._end.cancel()
        self._end = loop.call_later(REPORTS_IDLE_S, self.stop)
        self._gatherer.ask(topology, REPORTS_EVERY_S)
        began = loop.time()
        while silent := {name for name in topology.nodes if not self._is_fresh(topology, name)}:
            if silent <= self._silent:
                break
            self._news.clear()
            try:
                async with asyncio.timeout_at(began + REPORT_TIMEOUT_S):
                    await self._news.wait()
            except TimeoutError:
                break
        self._silent = silent
        now_ms = _steady_ms()
        return {name: Heard(None, now_ms) if name in silent else self._heard[name] for name in topology.nodes}

    def stop(self) -> None:
        """Ask nobody any more."""
        if self._end is not None:
            self._end.cancel()
        self._gatherer.ask(Topology(), None)
        self._heard.clear()
        self._silent.clear()

    def _take(self, report: NodeReport) -> None:
        self._silent.discard(report.name)
        self._heard[report.name] = Heard(report, _steady_ms())
        self._news.set()

    def _is_fresh(self, topology: Topology, name: str) -> bool:
        heard = self._heard.get(name)
        if heard is None or heard.report is None or heard.report.incarnation != topology.nodes[name].incarnation:
            return False
        return _steady_ms() - heard.at_ms < 1000 * (REPORTS_EVERY_S + REPORT_TIMEOUT_S)


class Asking:
    """The verbs of one metadata process. `apply` carries out a transaction; `caught_up` brings `view` up to date."""

    def __init__(
        self,
        view: StoreView,
        *,
        apply: Callable[[MetaTxn], Awaitable[MetaTxnReply]],
        caught_up: Callable[[], Awaitable[object]],
        me: Callable[[], Identity],
    ) -> None:
        self._view = view
        self._apply = apply
        self._caught_up = caught_up
        self._reports = NodeReports(me=me)

    def register(self, verbs: AdminVerbs) -> None:
        for name, ask in VERBS.items():
            verbs.add(name, partial(self._changed, ask))
        verbs.add("jobs", self._jobs)
        verbs.add("plan", self._plan)
        verbs.add("shards", self._shards)
        verbs.add("keyspaces", self._keyspaces)
        verbs.add("nodes", self._nodes)
        verbs.add("status", self._status)
        verbs.add("settings", self._settings)

    def close(self) -> None:
        self._reports.stop()

    async def _situation(self, *, reports: bool = True) -> Situation:
        await self._caught_up()
        topology = self._view.topology
        heard = await self._reports.heard(topology) if reports else {}
        return Situation(topology, heard, _steady_ms())

    # Changing

    async def _changed(self, ask: Ask, store: MetaStore, arguments: dict[str, Any]) -> dict[str, Any]:
        """Do what `ask` drafts, once, however often the request comes."""
        token = arguments.pop("token", None) or secrets.token_hex(8)
        if not isinstance(token, str) or not TOKEN.fullmatch(token):
            raise InvalidArgument("The token of a request is 8 to 64 letters, digits, - and _.")
        needs_reports = arguments.get("force") is True
        for _ in range(ATTEMPTS_MAX):
            situation = await self._situation(reports=needs_reports)
            told = self._view.get(f"{ASKS}{token}")
            if told is not None and told.value is not None:
                answer: dict[str, Any] = msgspec.msgpack.decode(told.value)["answer"]
                return answer
            txn, answer = ask(situation, dict(arguments), wall_ms())
            reply = await self._apply(self._with_answer(txn, token, answer))
            if reply.applied:
                return answer
        raise MetadataUnavailable("Too much is changed at the same time; nothing was done.", hint="Ask again.")

    def _with_answer(self, txn: MetaTxn, token: str, answer: dict[str, Any]) -> MetaTxn:
        now_ms = wall_ms()
        old = [
            entry
            for entry in self._view.entries(ASKS)
            if entry.value and _asked_ms(entry.value) < now_ms - ASKS_KEPT_MS
        ]
        old = old[:FORGOTTEN_MAX]
        note = msgspec.msgpack.encode({"answer": answer, "at_ms": now_ms})
        return MetaTxn(
            [*txn.compares, MetaCompare(f"{ASKS}{token}", 0), *(MetaCompare(each.key, each.revision) for each in old)],
            [*txn.puts, MetaPut(f"{ASKS}{token}", note), *(MetaPut(each.key, None) for each in old)],
        )

    # Telling

    async def _jobs(self, store: MetaStore, arguments: dict[str, Any]) -> dict[str, Any]:
        """The jobs there are, oldest first; with `id` that one. Raises InvalidArgument when there is none."""
        situation = await self._situation()
        number = arguments.get("id")
        jobs = situation.topology.jobs
        if number is not None and number not in jobs:
            raise InvalidArgument(f"There is no job {number!r}.")
        found = [jobs[number]] if number is not None else [job for _, job in sorted(jobs.items())]
        return {"jobs": [tell_job(situation, job) for job in found]}

    async def _plan(self, store: MetaStore, arguments: dict[str, Any]) -> dict[str, Any]:
        return {"plan": plan(await self._situation(), arguments)}

    async def _shards(self, store: MetaStore, arguments: dict[str, Any]) -> dict[str, Any]:
        """`keyspace`: of this one only."""
        situation, keyspace = await self._situation(), arguments.get("keyspace")
        if keyspace is not None:
            situation.topology.keyspace(keyspace)
        return {"shards": tell_shards(situation, keyspace)}

    async def _keyspaces(self, store: MetaStore, arguments: dict[str, Any]) -> dict[str, Any]:
        return {"keyspaces": tell_keyspaces(await self._situation())}

    async def _nodes(self, store: MetaStore, arguments: dict[str, Any]) -> dict[str, Any]:
        return {"nodes": tell_nodes(await self._situation())}

    async def _status(self, store: MetaStore, arguments: dict[str, Any]) -> dict[str, Any]:
        status = tell_status(await self._situation())
        return {"status": msgspec.structs.replace(status, meta=listed(self._view))}

    async def _settings(self, store: MetaStore, arguments: dict[str, Any]) -> dict[str, Any]:
        situation = await self._situation(reports=False)
        return {"settings": msgspec.structs.asdict(situation.settings)}


def _asked_ms(note: bytes) -> int:
    at_ms: int = msgspec.msgpack.decode(note)["at_ms"]
    return at_ms


def _steady_ms() -> int:
    return int(asyncio.get_running_loop().time() * 1000)
