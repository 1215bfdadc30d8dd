"""What people are told of jobs, shards, keyspaces and nodes: the topology and what nodes report, put together.

These shapes travel as maps between metadata processes and `shardkv.Admin`, so fields are only added, with a default.
What nodes report is a hint: a byte count is None while the owner of a shard was not heard of.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from shardkv.control.controller import progress_of
from shardkv.control.jobs import ENDED
from shardkv.control.keyspaces import starter_of, wish_for
from shardkv.control.planner import ASSUMED_BYTES_S
from shardkv.control.reports import ChangeReport, ShardReport
from shardkv.control.situation import Situation
from shardkv.topology.documents import (
    Change,
    ChangeKind,
    ControllerSettings,
    JobDocument,
    JobKind,
    JobState,
    NodeWish,
    Partition,
    PlannedMove,
    ShardDocument,
    TopologyBound,
)

NodeState = Literal["serving", "not answering", "not joined", "removed"]
KeyspaceState = Literal["serving", "being made", "being dropped"]


class Plan(msgspec.Struct, frozen=True, omit_defaults=True):
    """What would be moved."""

    moves: list[PlannedMove]
    """(shard, source, target, bytes) each."""
    bytes: int
    eta_s: float
    """How long the busiest node needs to send or receive its part, at the rate asked for; without one, at 100 MB/s."""
    before: dict[str, int] = {}
    """Bytes by node as it is."""
    after: dict[str, int] = {}
    """Bytes by node once it is done."""


class Job(msgspec.Struct, frozen=True, omit_defaults=True):
    """Something that was asked for, or that the controller decided, and how far it is."""

    id: int
    kind: JobKind
    state: JobState
    asked: dict[str, Any] = {}
    moves: list[PlannedMove] = []
    """The plan, once it is made."""
    done: list[int] = []
    """Shards that arrived; of a split or merge: those that it made."""
    skipped: list[int] = []
    """Shards whose planned move was overtaken."""
    problem: str = ""
    """Why it failed, or what it waits for: a sentence."""
    created_ms: int = 0
    started_ms: int = 0
    ended_ms: int = 0
    rate_bytes_s: int = 0
    changes: list[ChangeReport] = []
    """What is under way now, as the nodes that do it report."""
    bytes_done: int = 0
    bytes_total: int = 0
    bytes_s: float = 0.0
    """Of all that is under way together."""
    eta_s: float | None = None
    """None: not known."""

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.state in ENDED


class ChangeTold(msgspec.Struct, frozen=True, omit_defaults=True):
    """The change that a shard is in."""

    id: str
    kind: ChangeKind
    job: int
    target: str = ""
    phase: str = ""
    """As its node reports; empty: it has not."""
    paused: bool = False


class Shard(msgspec.Struct, frozen=True, omit_defaults=True):
    """A half-open interval of tokens and its owner."""

    id: int
    keyspace: str
    partition: Partition
    start: TopologyBound
    stop: TopologyBound | None
    node: str
    epoch: int
    bytes: int | None = None
    ops_s: float | None = None
    change: ChangeTold | None = None
    problem: str = ""
    """Why its last change was given up; empty after one that was not."""


class Keyspace(msgspec.Struct, frozen=True, omit_defaults=True):
    name: str
    partition: Partition
    state: KeyspaceState
    shards: int
    """How many it has now."""
    bytes: int | None = None
    """None: some shard's is not known."""


class Node(msgspec.Struct, frozen=True, omit_defaults=True):
    name: str
    state: NodeState
    wish: NodeWish
    """active: it gets shards; draining: it gives them away; removed: it is to stop."""
    host: str = ""
    address: str = ""
    started_by: Literal["launcher", "operator"] = "launcher"
    incarnation: int = 0
    shards: int = 0
    """How many it owns."""
    bytes: int | None = None
    """Of what it owns; None: it was not heard of."""
    ops_s: float | None = None
    free_bytes: int | None = None
    fenced: list[int] = []
    """Shards it refuses to serve at their present epoch: a move or the like is about to end, or was cut off."""
    missing: list[int] = []
    """Shards it owns and has no data of: its directory is not the one it had."""
    kept: list[int] = []
    """Shards that it has data of and does not own."""


class Status(msgspec.Struct, frozen=True, omit_defaults=True):
    """The cluster as a whole."""

    cluster_id: str
    revision: int
    nodes: list[Node]
    keyspaces: list[Keyspace]
    jobs: list[Job]
    """Those that have not ended."""
    meta: list[str] = []
    """Addresses of the metadata processes."""
    advice: list[str] = []
    """What to do next, if anything: sentences."""


Settings = ControllerSettings


# Jobs


def tell_job(situation: Situation, job: JobDocument) -> Job:
    """A job with what nodes report of its changes."""
    reports = [heard.report for heard in situation.heard.values() if heard.report is not None]
    changes = [] if job.state in ENDED else progress_of(situation.topology, reports, job)
    bytes_done, bytes_total = _bytes_of(situation, job, changes)
    bytes_s = sum(change.bytes_s for change in changes)
    return Job(
        id=job.id,
        kind=job.kind,
        state=job.state,
        asked=job.asked,
        moves=job.moves,
        done=job.done,
        skipped=job.skipped,
        problem=job.problem,
        created_ms=job.created_ms,
        started_ms=job.started_ms,
        ended_ms=job.ended_ms,
        rate_bytes_s=job.rate_bytes_s,
        changes=changes,
        bytes_done=bytes_done,
        bytes_total=bytes_total,
        bytes_s=bytes_s,
        eta_s=_eta_s(situation, job, bytes_total - bytes_done, bytes_s),
    )


def _bytes_of(situation: Situation, job: JobDocument, changes: list[ChangeReport]) -> tuple[int, int]:
    """(moved, to move) of the whole job; a shard under way counts as far as its bytes came."""
    over = {*job.done, *job.skipped}
    under_way = {change.shard: change for change in changes}
    planned = {move.shard: move.bytes for move in job.moves}
    for shard, change in under_way.items():
        planned[shard] = max(planned.get(shard, 0), change.bytes_total, situation.bytes_of(shard))
    done = 0
    for shard, size in planned.items():
        if shard in over:
            done += size
        elif shard in under_way:
            change = under_way[shard]
            part = change.bytes_done / change.bytes_total if change.bytes_total else 0.0
            done += min(size, int(size * part) or change.bytes_done)
    return done, sum(planned.values())


def _eta_s(situation: Situation, job: JobDocument, left: int, bytes_s: float) -> float | None:
    if job.state in ENDED:
        return 0.0
    if job.state != "running" or not left:
        return None
    rate = bytes_s or situation.rate_of(job) or ASSUMED_BYTES_S
    return left / rate


# Shards, keyspaces, nodes


def tell_shards(situation: Situation, keyspace: str | None = None) -> list[Shard]:
    """In the order of keyspaces and tokens; those of one that is being dropped are left out."""
    phases = _phases(situation)
    return [
        _tell_shard(situation, shard, view.partition, phases)
        for name, view in sorted(situation.topology.keyspaces.items())
        if keyspace in (None, name)
        for shard in view.shards
    ]


def _phases(situation: Situation) -> dict[str, str]:
    reports = [heard.report for heard in situation.heard.values() if heard.report is not None]
    return {change.id: change.phase for report in reports for change in report.changes}


def _tell_shard(situation: Situation, shard: ShardDocument, partition: Partition, phases: dict[str, str]) -> Shard:
    report, change = situation.report_of(shard.id), shard.change
    return Shard(
        id=shard.id,
        keyspace=shard.keyspace,
        partition=partition,
        start=shard.start,
        stop=shard.stop,
        node=shard.node,
        epoch=shard.epoch,
        bytes=report.bytes if report else None,
        ops_s=report.ops_s if report else None,
        change=_tell_change(change, phases) if change is not None else None,
        problem=shard.problem,
    )


def _tell_change(change: Change, phases: dict[str, str]) -> ChangeTold:
    return ChangeTold(change.id, change.kind, change.job, change.target, phases.get(change.id, ""), change.paused)


def tell_keyspaces(situation: Situation) -> list[Keyspace]:
    found = []
    for name, document in sorted(situation.topology.keyspace_documents.items()):
        shards = [shard for shard in situation.topology.shards.values() if shard.keyspace == name]
        state: KeyspaceState = "serving" if document.placing is None else "being made"
        reports = [situation.report_of(shard.id) for shard in shards]
        size = None if None in reports else sum(report.bytes for report in reports if report)
        found.append(
            Keyspace(name, document.partition, "being dropped" if document.dropped else state, len(shards), size)
        )
    return found


def tell_nodes(situation: Situation) -> list[Node]:
    """Every node that is registered or wanted, in the order of their names."""
    topology = situation.topology
    owned: dict[str, list[ShardDocument]] = {}
    for shard in topology.shards.values():
        owned.setdefault(shard.node, []).append(shard)
    names = {*topology.nodes, *topology.wanted, *owned}
    return [_tell_node(situation, name, owned.get(name, [])) for name in sorted(names, key=lambda n: (len(n), n))]


def _tell_node(situation: Situation, name: str, owned: list[ShardDocument]) -> Node:
    known, wanted = situation.topology.nodes.get(name), situation.topology.wanted.get(name)
    heard = situation.heard.get(name)
    report = heard.report if heard is not None and situation.is_up(name) else None
    mine: list[ShardReport] = [found for shard in owned if (found := situation.report_of(shard.id))] if report else []
    wish = wish_for(situation.topology, name)
    return Node(
        name=name,
        state=_node_state(up=report is not None, joined=known is not None, wish=wish),
        wish=wish,  # type: ignore[arg-type]
        host=(known.host if known else "") or (wanted.host if wanted else ""),
        address=known.address if known else "",
        started_by=starter_of(situation.topology, name),
        incarnation=known.incarnation if known else 0,
        shards=len(owned),
        bytes=sum(each.bytes for each in mine) if report else None,
        ops_s=sum(each.ops_s for each in mine) if report else None,
        free_bytes=report.free_bytes if report else None,
        fenced=report.fenced if report else [],
        missing=report.missing if report else [],
        kept=report.kept if report else [],
    )


def _node_state(*, up: bool, joined: bool, wish: str) -> NodeState:
    if up:
        return "serving"
    if wish == "removed":
        return "removed"
    return "not answering" if joined else "not joined"


# All of it


def tell_status(situation: Situation) -> Status:
    topology = situation.topology
    nodes = tell_nodes(situation)
    jobs = [tell_job(situation, job) for _, job in sorted(topology.jobs.items()) if job.state not in ENDED]
    cluster_id = topology.cluster.cluster_id if topology.cluster else ""
    return Status(cluster_id, topology.revision, nodes, tell_keyspaces(situation), jobs, advice=_advice(nodes, jobs))


def _advice(nodes: list[Node], jobs: list[Job]) -> list[str]:
    """What a person should do about what is not as it should be."""
    found = []
    for node in nodes:
        if node.state == "not joined":
            where = f" on host {node.host}" if node.host else ""
            found.append(f"Node {node.name} has not joined yet: start it{where}, or remove it.")
        elif node.state == "not answering" and node.shards:
            found.append(
                f"Node {node.name} does not answer, and has the only copy of {_count(node.shards, 'shard')}: "
                f"{_how_to_bring_back(node)}"
            )
        if node.missing:
            found.append(
                f"Node {node.name} owns {_listed(node.missing)} and has no data of them: stop it, and start it on the "
                "directory it had before."
            )
        if node.kept and node.state == "serving":
            found.append(
                f"Node {node.name} keeps data of {_listed(node.kept)}, which it does not own. It goes by itself where "
                "the store says that it is of the past; if the store was restored from a copy, look before you delete."
            )
    found += [f"Job {job.id} ({job.kind}) waits: {job.problem}" for job in jobs if job.problem]
    found += [
        f"Job {job.id} is paused: `shardkv job resume {job.id}` goes on." for job in jobs if job.state == "paused"
    ]
    return found


def _how_to_bring_back(node: Node) -> str:
    if node.started_by == "launcher":
        return f"start it again (`shardkv cluster logs {node.name}` says why it ended)."
    return f"see on {node.host or node.address} that it runs on the directory it had, and that its address is reached."


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _listed(shards: list[int]) -> str:
    shown = ", ".join(map(str, shards[:5]))
    more = f" and {len(shards) - 5} more" if len(shards) > 5 else ""
    return f"{'shard' if len(shards) == 1 else 'shards'} {shown}{more}"
