"""What a person may ask of the controller, as transactions on job documents; and how jobs go from state to state.

    planned -> running -> done | failed
    planned | running <-> paused
    planned | running | paused -> cancelling -> cancelled

Invariant: a job that has ended never changes again, but for being forgotten. Everything a job begins compares the
job's document, so nothing of it can begin once it was paused or cancelled.
"""

from __future__ import annotations

from typing import Any

import msgspec

from shardkv.control.changes import check_neighbours, check_split_at
from shardkv.control.draft import Draft
from shardkv.control.keyspaces import active_nodes, starter_of, wish_for
from shardkv.errors import InvalidArgument
from shardkv.topology.documents import (
    JOB_ID_COUNTER,
    JOBS,
    WANTED,
    CounterDocument,
    JobDocument,
    JobKind,
    JobState,
    ShardDocument,
    WantedDocument,
)
from shardkv.topology.view import Topology
from shardkv.wire.messages import MetaTxn

ENDED: frozenset[JobState] = frozenset(("cancelled", "done", "failed"))
ACTIVE: frozenset[JobState] = frozenset(("planned", "running", "paused"))


def next_job_id(topology: Topology) -> int:
    counter = topology.counters.get(JOB_ID_COUNTER)
    return counter.next if counter is not None else max(topology.jobs, default=0) + 1


def new_job(draft: Draft, kind: JobKind, asked: dict[str, Any], now_ms: int, rate_bytes_s: int = 0) -> JobDocument:
    """Write down a job under the next id. One in a transaction."""
    number = next_job_id(draft.topology)
    job = JobDocument(number, kind, asked=asked, created_ms=now_ms, rate_bytes_s=rate_bytes_s)
    draft.put(JOB_ID_COUNTER, CounterDocument(number + 1))
    draft.put(f"{JOBS}{number}", job)
    return job


# Asking. Each raises InvalidArgument when what is asked makes no sense now.


def ask_add(
    topology: Topology,
    node: str,
    now_ms: int,
    *,
    host: str = "",
    started_by: str = "launcher",
    rebalance: bool = True,
    rate_bytes_s: int = 0,
) -> MetaTxn:
    """Want a node, and (if `rebalance`) fill it with a fair share as soon as it is there."""
    if node in topology.wanted or node in topology.nodes:
        raise InvalidArgument(f"There is a node {node} already ({wish_for(topology, node)}); names are not used again.")
    draft = Draft(topology)
    draft.put(
        f"{WANTED}{node}", WantedDocument(node, host, "active", "operator" if started_by == "operator" else "launcher")
    )
    if rebalance:
        new_job(draft, "add", {"node": node}, now_ms, rate_bytes_s)
    return draft.txn()


def ask_remove(
    topology: Topology, node: str, now_ms: int, *, accept_data_loss: str = "", rate_bytes_s: int = 0
) -> MetaTxn:
    """Drain a node, then stop it. `accept_data_loss`: its name, said once more: what only it has may be given up if
    it is away."""
    if node not in topology.nodes and node not in topology.wanted:
        raise InvalidArgument(f"There is no node {node}.")
    if wish_for(topology, node) == "removed":
        raise InvalidArgument(f"Node {node} is removed already.")
    if not [name for name in active_nodes(topology) if name != node]:
        raise InvalidArgument(f"Node {node} is the last one; nobody could take its shards.", hint="Add a node first.")
    if accept_data_loss not in ("", node):
        raise InvalidArgument(f"The loss of {accept_data_loss!r} is accepted, but {node!r} is to be removed.")
    asked: dict[str, Any] = {"node": node} | ({"accept_data_loss": node} if accept_data_loss else {})
    for job in topology.jobs.values():
        if job.kind == "remove" and job.state in ACTIVE and job.asked.get("node") == node and job.asked == asked:
            raise InvalidArgument(f"Job {job.id} removes node {node} already.")
    draft = Draft(topology)
    known = topology.wanted.get(node) or WantedDocument(node, started_by=starter_of(topology, node))
    draft.put(f"{WANTED}{node}", msgspec.structs.replace(known, state="draining"))
    new_job(draft, "remove", asked, now_ms, rate_bytes_s)
    return draft.txn()


def ask_rebalance(topology: Topology, now_ms: int, *, moves_max: int | None = None, rate_bytes_s: int = 0) -> MetaTxn:
    draft = Draft(topology)
    new_job(draft, "rebalance", {} if moves_max is None else {"moves_max": moves_max}, now_ms, rate_bytes_s)
    return draft.txn()


def ask_move(topology: Topology, shard_id: int, node: str, now_ms: int, *, rate_bytes_s: int = 0) -> MetaTxn:
    shard = _usable_shard(topology, shard_id)
    if node not in topology.nodes or wish_for(topology, node) != "active":
        raise InvalidArgument(f"Node {node} takes no shards: it is {_standing(topology, node)}.")
    if shard.node == node:
        raise InvalidArgument(f"Shard {shard_id} is on node {node} already.")
    draft = Draft(topology)
    new_job(draft, "move", {"shard": shard_id, "node": node}, now_ms, rate_bytes_s)
    return draft.txn()


def ask_split(
    topology: Topology, shard_id: int, now_ms: int, *, at: int | bytes | None = None, rate_bytes_s: int = 0
) -> MetaTxn:
    """`at`: first token of the upper half; left out: what halves its bytes."""
    shard = _usable_shard(topology, shard_id)
    if at is not None:
        check_split_at(shard, at)
    draft = Draft(topology)
    asked = {"shard": shard_id} | ({"at": at} if at is not None else {})
    new_job(draft, "split", asked, now_ms, rate_bytes_s)
    return draft.txn()


def ask_merge(topology: Topology, left: int, right: int, now_ms: int, *, rate_bytes_s: int = 0) -> MetaTxn:
    check_neighbours(_usable_shard(topology, left), _usable_shard(topology, right))
    draft = Draft(topology)
    new_job(draft, "merge", {"left": left, "right": right}, now_ms, rate_bytes_s)
    return draft.txn()


def _usable_shard(topology: Topology, shard_id: int) -> ShardDocument:
    shard = topology.shards.get(shard_id)
    if shard is None or shard.dropped or shard.keyspace not in topology.keyspaces:
        raise InvalidArgument(f"There is no shard {shard_id}.")
    return shard


def _standing(topology: Topology, node: str) -> str:
    return wish_for(topology, node) if node in topology.nodes else "not there"


# Steering


def pause(topology: Topology, job_id: int) -> MetaTxn:
    """Begin nothing more, and ship nothing more of what is under way."""
    return _steer(topology, job_id, ("planned", "running"), "paused")


def resume(topology: Topology, job_id: int) -> MetaTxn:
    job = topology.jobs.get(job_id)
    return _steer(topology, job_id, ("paused",), "running" if job and job.started_ms else "planned")


def cancel(topology: Topology, job_id: int) -> MetaTxn:
    """Abort what is under way and begin nothing more. What has arrived stays where it is."""
    return _steer(topology, job_id, ("planned", "running", "paused"), "cancelling")


def set_rate(topology: Topology, job_id: int, rate_bytes_s: int) -> MetaTxn:
    """For what is under way, too."""
    draft = Draft(topology)
    job = _job(topology, job_id, ACTIVE)
    draft.put(f"{JOBS}{job_id}", msgspec.structs.replace(job, rate_bytes_s=rate_bytes_s))
    return draft.txn()


def _steer(topology: Topology, job_id: int, states: tuple[JobState, ...], state: JobState) -> MetaTxn:
    job = _job(topology, job_id, frozenset(states))
    draft = Draft(topology)
    draft.put(f"{JOBS}{job_id}", msgspec.structs.replace(job, state=state))
    if state == "cancelling" and job.kind == "remove":
        _want_again(draft, job)
    return draft.txn()


def _want_again(draft: Draft, job: JobDocument) -> None:
    """A node whose removal is cancelled gets shards again."""
    wanted = draft.topology.wanted.get(job.asked["node"])
    others = [
        each
        for each in draft.topology.jobs.values()
        if each.id != job.id and each.kind == "remove" and each.asked == job.asked and each.state in ACTIVE
    ]
    if wanted is not None and wanted.state == "draining" and not others:
        draft.put(f"{WANTED}{wanted.name}", msgspec.structs.replace(wanted, state="active"))


def _job(topology: Topology, job_id: int, states: frozenset[JobState]) -> JobDocument:
    job = topology.jobs.get(job_id)
    if job is None:
        raise InvalidArgument(f"There is no job {job_id}.")
    if job.state not in states:
        raise InvalidArgument(f"Job {job_id} is {job.state}.")
    return job
