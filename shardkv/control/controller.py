"""The controller: the topology, what nodes report and the time in; transactions out. It decides, nodes do.

Invariants: everything that counts is in the store: any number of controllers may run, each transaction compares all
it rests on, and one that was killed is replaced by any other. What this object remembers (since when a change makes
no progress, since when neighbours are quiet) only ever delays a decision.

`tick` is called with the newest topology, again and again; a transaction that is refused is planned anew by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgspec

from shardkv.control import keyspaces
from shardkv.control.changes import adjust, carriers, draft_abort
from shardkv.control.draft import Draft
from shardkv.control.job_steps import JobRun
from shardkv.control.jobs import ACTIVE, ENDED
from shardkv.control.reports import ChangeReport, NodeReport
from shardkv.control.resizing import Resizing
from shardkv.control.situation import Heard, Situation
from shardkv.topology.documents import JOBS, SHARDS, Change, JobDocument, ShardDocument
from shardkv.topology.view import Topology
from shardkv.wire.messages import MetaTxn

ABORTS_MAX = 40
FORGOTTEN_MAX = 40
"""In one transaction."""


@dataclass(slots=True)
class Controller:
    """`new_change_id` returns the hex of 8 random bytes."""

    new_change_id: Callable[[], str]
    _heard: dict[str, Heard] = field(default_factory=dict)
    _progress: dict[str, tuple[object, int]] = field(default_factory=dict)
    """By change: what its nodes last reported of it, and since when that is so."""
    _resizing: Resizing = field(default_factory=Resizing)

    def hear(self, report: NodeReport, now_ms: int) -> None:
        """Take in what a node says of itself, whenever it does. `now_ms`: a clock that never goes back."""
        before = self._heard.get(report.name)
        if before is None or before.report is None or before.report.incarnation <= report.incarnation:
            self._heard[report.name] = Heard(report, now_ms)

    def tick(self, topology: Topology, now_ms: int, wall_ms: int) -> list[MetaTxn]:
        """What should be done now. `now_ms`: a clock that never goes back; `wall_ms`: time of day, for documents."""
        situation = self._situation(topology, now_ms)
        txns = [txn for txn in (keyspaces.place_default(topology), keyspaces.place_piece(topology)) if txn]
        txns += self._drop_keyspaces(situation)
        txns += self._forget_parents(situation)
        txns += self._tend_changes(situation)
        for job in sorted(topology.jobs.values(), key=lambda each: each.id):
            txn = JobRun(situation, job, wall_ms, self.new_change_id).txn()
            if txn is not None:
                txns.append(txn)
        resized = self._resizing.txn(situation, wall_ms)
        txns += [resized] if resized else []
        forgotten = _forget(topology)
        return txns + ([forgotten] if forgotten else [])

    def _situation(self, topology: Topology, now_ms: int) -> Situation:
        for name in topology.nodes:
            self._heard.setdefault(name, Heard(None, now_ms))
        for name in self._heard.keys() - topology.nodes.keys():
            del self._heard[name]
        return Situation(topology, dict(self._heard), now_ms)

    def _drop_keyspaces(self, situation: Situation) -> list[MetaTxn]:
        topology = situation.topology
        if not any(keyspace.dropped for keyspace in topology.keyspace_documents.values()):
            return []
        dropped = [f"{SHARDS}{shard.id}" for shard in topology.shards.values() if shard.dropped]
        newest = max(map(topology.revision_of, dropped), default=0)
        txn = keyspaces.drop_piece(topology, holders=situation.holders(), unheard=situation.unheard(newest))
        return [txn] if txn is not None else []

    def _forget_parents(self, situation: Situation) -> list[MetaTxn]:
        """Shards no longer list parents of which no node has a tablet, nor any job is about."""
        topology = situation.topology
        listing = [shard for shard in topology.shards.values() if shard.parents and shard.change is None]
        if not listing:
            return []
        asked = {number for job in topology.jobs.values() if job.state not in ENDED for number in _shards_of(job)}
        named = situation.holders().keys() | asked
        draft = Draft(topology)
        for shard in listing[:FORGOTTEN_MAX]:
            parents = [parent for parent in shard.parents if parent in named]
            if parents != shard.parents and not situation.unheard(topology.revision_of(f"{SHARDS}{shard.id}")):
                draft.put_shard(msgspec.structs.replace(shard, parents=parents))
        return [draft.txn()] if draft else []

    # Changes under way

    def _tend_changes(self, situation: Situation) -> list[MetaTxn]:
        """Abort what cannot end well, and hand on what jobs say of pausing and rates."""
        topology = situation.topology
        aborts, adjusted = Draft(topology), Draft(topology)
        seen: dict[str, tuple[object, int]] = {}
        for shard in changing(topology):
            change = shard.change
            assert change is not None
            if change.id in seen:
                continue
            carrying = carriers(topology, shard.id, change.id)
            seen[change.id] = self._progress_of(situation, change)
            problem = why_abort(situation, shard, seen[change.id][1])
            job = topology.jobs.get(change.job)
            if problem and len(aborts) < ABORTS_MAX:
                draft_abort(aborts, carrying, problem)
            elif not problem and job is not None and len(adjusted) < ABORTS_MAX:
                paused, rate = job.state == "paused", situation.rate_of(job)
                if (change.paused, change.rate_bytes_s) != (paused, rate):
                    adjust(adjusted, carrying, paused=paused, rate_bytes_s=rate)
        self._progress = seen
        return [draft.txn() for draft in (aborts, adjusted) if draft]

    def _progress_of(self, situation: Situation, change: Change) -> tuple[object, int]:
        """What is known of a change, and since when nothing new of it came. Being let go on is something new."""
        reported = [
            (heard.report.name, each.phase, each.bytes_done, each.lag)
            for heard in situation.heard.values()
            if heard.report is not None
            for each in heard.report.changes
            if each.id == change.id
        ]
        found = (change.paused, reported)
        before = self._progress.get(change.id)
        return before if before is not None and before[0] == found else (found, situation.now_ms)


def changing(topology: Topology) -> Iterable[ShardDocument]:
    """The shards that are in a change."""
    return [shard for shard in topology.shards.values() if shard.change is not None]


def why_abort(situation: Situation, shard: ShardDocument, unchanged_since_ms: int) -> str:
    """The sentence that says why the change of a shard should be given up; empty: let it go on."""
    topology, change = situation.topology, shard.change
    assert change is not None
    job = topology.jobs.get(change.job)
    if job is None or job.state not in ACTIVE:
        return f"Job {change.job} is {job.state if job else 'no more'}."
    for name, incarnation in ((shard.node, change.source_incarnation), (change.target, change.target_incarnation)):
        node = topology.nodes.get(name)
        if name and (node is None or node.incarnation != incarnation):
            return f"Node {name} was started again while it took part."
        if name and situation.is_away(name):
            return f"Node {name} was not heard of for {topology.settings.away_ms / 1000:g} s."
    if change.paused:
        return ""
    still_ms = situation.now_ms - unchanged_since_ms
    return f"There was no progress for {still_ms / 1000:.0f} s." if still_ms > topology.settings.stuck_ms else ""


def progress_of(topology: Topology, reports: Iterable[NodeReport], job: JobDocument) -> list[ChangeReport]:
    """What nodes report of the changes of a job, for people who watch it."""
    of_job = {shard.change.id for shard in changing(topology) if shard.change and shard.change.job == job.id}
    return [change for report in reports for change in report.changes if change.id in of_job]


def _shards_of(job: JobDocument) -> list[int]:
    return [job.asked[name] for name in ("shard", "left", "right") if name in job.asked]


def _forget(topology: Topology) -> MetaTxn | None:
    """Ended jobs beyond those that are kept; none that a change still names."""
    named = {shard.change.job for shard in changing(topology) if shard.change}
    ended = sorted(job.id for job in topology.jobs.values() if job.state in ENDED and job.id not in named)
    draft = Draft(topology)
    for number in ended[: max(0, len(ended) - topology.settings.jobs_kept)][:ABORTS_MAX]:
        draft.delete(f"{JOBS}{number}")
    return draft.txn() if draft else None


__all__ = ["Controller", "changing", "progress_of", "why_abort"]
