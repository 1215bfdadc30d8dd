"""The verbs that people and scripts change a cluster by: a situation and arguments in, a transaction and a reply out.

Each checks that what is asked makes sense now, and raises InvalidArgument with a sentence when it does not. Plans
(`plan`) are told by the same functions that jobs are planned with later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeVar

import msgspec

from shardkv.control import jobs, keyspaces
from shardkv.control.draft import Draft
from shardkv.control.planner import ASSUMED_BYTES_S, ShardLoad, plan_drain, plan_rebalance
from shardkv.control.situation import Situation
from shardkv.control.told import Plan
from shardkv.errors import InvalidArgument
from shardkv.topology.documents import (
    CONTROLLER_SETTINGS,
    ControllerSettings,
    Partition,
    PlannedMove,
    TopologyBound,
)
from shardkv.topology.view import Topology
from shardkv.wire.messages import MetaTxn

Answer = tuple[MetaTxn, dict[str, Any]]
Ask = Callable[[Situation, dict[str, Any], int], Answer]
"""(situation, arguments, time of day in ms) to the transaction that does it and what is answered once it is applied."""

NODES_AT_ONCE_MAX = 100
MAY_BE_ZERO = frozenset(
    ("rate_bytes_s", "backoff_ms", "merge_bytes", "merge_ops_s", "merge_quiet_ms", "balance_slack", "jobs_kept")
)
"""Settings for which 0 has a meaning."""

T = TypeVar("T")


class _Arguments(msgspec.Struct, forbid_unknown_fields=True):
    """What a verb takes; a field without a default must be there."""


A = TypeVar("A", bound=_Arguments)


class AddNode(_Arguments):
    name: str = ""
    """Empty: the next free node-<number>."""
    host: str = ""
    started_by: Literal["launcher", "operator"] = "launcher"
    rebalance: bool = True
    rate_bytes_s: int = 0


class RemoveNode(_Arguments):
    name: str
    force: bool = False
    accept_data_loss: str = ""
    rate_bytes_s: int = 0


class Rebalance(_Arguments):
    moves_max: int | None = None
    rate_bytes_s: int = 0


class MoveShard(_Arguments):
    shard: int
    node: str
    rate_bytes_s: int = 0


class SplitShard(_Arguments):
    shard: int
    at: TopologyBound | None = None
    rate_bytes_s: int = 0


class MergeShards(_Arguments):
    left: int
    right: int
    rate_bytes_s: int = 0


class CreateKeyspace(_Arguments):
    name: str
    partition: Partition = "hash"
    shards: int = 16
    split_at: list[bytes] = []


class DropKeyspace(_Arguments):
    name: str


class SteerJob(_Arguments):
    job: int


class SetRate(_Arguments):
    job: int
    rate_bytes_s: int


class ChangeSettings(_Arguments):
    changed: dict[str, Any]


class AskPlan(_Arguments):
    kind: Literal["add", "remove", "rebalance", "move", "merge"]
    count: int = 1
    """add: of new nodes."""
    node: str = ""
    """remove: which; move: where to."""
    shards: list[int] = []
    """move: one; merge: two."""
    moves_max: int | None = None
    rate_bytes_s: int = 0


# Nodes


def add_node(situation: Situation, arguments: dict[str, Any], wall_ms: int) -> Answer:
    asked = _arguments(AddNode, arguments)
    name = asked.name or next_node_name(situation.topology)
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or len(name) > keyspaces.NAME_LENGTH_MAX:
        raise InvalidArgument(f"{name!r} cannot name a node: use letters, digits, -, _ and dots.")
    txn = jobs.ask_add(
        situation.topology,
        name,
        wall_ms,
        host=asked.host,
        started_by=asked.started_by,
        rebalance=asked.rebalance,
        rate_bytes_s=_rate(asked.rate_bytes_s),
    )
    return txn, {"node": name, "job": jobs.next_job_id(situation.topology) if asked.rebalance else 0}


def next_node_name(topology: Topology, taken: Iterable[str] = ()) -> str:
    """`node-<number>`, one above the highest that was ever used."""
    names = [*topology.nodes, *topology.wanted, *taken]
    numbers = [int(name.removeprefix("node-")) for name in names if name.removeprefix("node-").isdecimal()]
    first = topology.cluster.nodes_wanted if topology.cluster is not None else 0
    return f"node-{max([first, *numbers]) + 1}"


def remove_node(situation: Situation, arguments: dict[str, Any], wall_ms: int) -> Answer:
    asked = _arguments(RemoveNode, arguments)
    owned = [shard for shard in situation.topology.shards.values() if shard.node == asked.name]
    if asked.force and owned and not asked.accept_data_loss and not situation.is_up(asked.name):
        raise InvalidArgument(
            f"Node {asked.name} does not answer and has the only copy of {len(owned)} shards: removed now, all that is "
            "stored in them is lost.",
            hint=f"Start it again and remove it without force, or accept the loss: --accept-data-loss {asked.name}.",
            detail={"node": asked.name, "shards": sorted(shard.id for shard in owned)[:1000]},
        )
    txn = jobs.ask_remove(
        situation.topology,
        asked.name,
        wall_ms,
        accept_data_loss=asked.accept_data_loss,
        rate_bytes_s=_rate(asked.rate_bytes_s),
    )
    return _with_job(situation, txn)


def rebalance(situation: Situation, arguments: dict[str, Any], wall_ms: int) -> Answer:
    asked = _arguments(Rebalance, arguments)
    if asked.moves_max is not None and asked.moves_max < 1:
        raise InvalidArgument(f"A rebalance makes at least one move, not {asked.moves_max}.")
    rate = _rate(asked.rate_bytes_s)
    txn = jobs.ask_rebalance(situation.topology, wall_ms, moves_max=asked.moves_max, rate_bytes_s=rate)
    return _with_job(situation, txn)


# Shards


def move_shard(situation: Situation, arguments: dict[str, Any], wall_ms: int) -> Answer:
    asked = _arguments(MoveShard, arguments)
    rate = _rate(asked.rate_bytes_s)
    return _with_job(situation, jobs.ask_move(situation.topology, asked.shard, asked.node, wall_ms, rate_bytes_s=rate))


def split_shard(situation: Situation, arguments: dict[str, Any], wall_ms: int) -> Answer:
    asked = _arguments(SplitShard, arguments)
    rate = _rate(asked.rate_bytes_s)
    return _with_job(
        situation, jobs.ask_split(situation.topology, asked.shard, wall_ms, at=asked.at, rate_bytes_s=rate)
    )


def merge_shards(situation: Situation, arguments: dict[str, Any], wall_ms: int) -> Answer:
    asked = _arguments(MergeShards, arguments)
    left, right = _in_token_order(situation, asked.left, asked.right)
    rate = _rate(asked.rate_bytes_s)
    return _with_job(situation, jobs.ask_merge(situation.topology, left, right, wall_ms, rate_bytes_s=rate))


def _in_token_order(situation: Situation, one: int, other: int) -> tuple[int, int]:
    """The same two, the one that stops where the other begins first."""
    shards = situation.topology.shards
    turned = one in shards and other in shards and shards[other].stop == shards[one].start
    return (other, one) if turned else (one, other)


# Keyspaces


def create_keyspace(situation: Situation, arguments: dict[str, Any], wall_ms: int) -> Answer:
    asked = _arguments(CreateKeyspace, arguments)
    txn = keyspaces.create_keyspace(
        situation.topology, asked.name, asked.partition, shards=asked.shards, split_at=asked.split_at
    )
    return txn, {"name": asked.name}


def drop_keyspace(situation: Situation, arguments: dict[str, Any], wall_ms: int) -> Answer:
    asked = _arguments(DropKeyspace, arguments)
    return keyspaces.drop_keyspace(situation.topology, asked.name), {"name": asked.name}


# Jobs


def pause_job(situation: Situation, arguments: dict[str, Any], wall_ms: int) -> Answer:
    number = _arguments(SteerJob, arguments).job
    return jobs.pause(situation.topology, number), {"job": number}


def resume_job(situation: Situation, arguments: dict[str, Any], wall_ms: int) -> Answer:
    number = _arguments(SteerJob, arguments).job
    return jobs.resume(situation.topology, number), {"job": number}


def cancel_job(situation: Situation, arguments: dict[str, Any], wall_ms: int) -> Answer:
    number = _arguments(SteerJob, arguments).job
    return jobs.cancel(situation.topology, number), {"job": number}


def set_rate(situation: Situation, arguments: dict[str, Any], wall_ms: int) -> Answer:
    asked = _arguments(SetRate, arguments)
    return jobs.set_rate(situation.topology, asked.job, _rate(asked.rate_bytes_s)), {"job": asked.job}


# Settings


def change_settings(situation: Situation, arguments: dict[str, Any], wall_ms: int) -> Answer:
    changed = _arguments(ChangeSettings, arguments).changed
    known = msgspec.structs.asdict(situation.settings)
    unknown = sorted(changed.keys() - known.keys())
    if unknown:
        raise InvalidArgument(f"There is no setting {unknown[0]!r}; there are {', '.join(sorted(known))}.")
    settings = _converted(known | changed, ControllerSettings, "A setting has the wrong kind of value")
    for name, value in msgspec.structs.asdict(settings).items():
        if not isinstance(value, bool) and (value < 0 or (value == 0 and name not in MAY_BE_ZERO)):
            raise InvalidArgument(f"Setting {name} cannot be {value}.")
    draft = Draft(situation.topology)
    draft.put(CONTROLLER_SETTINGS, settings)
    return draft.txn(), {"settings": msgspec.structs.asdict(settings)}


# Plans


def plan(situation: Situation, arguments: dict[str, Any]) -> Plan:
    """What a job of this kind would move if it was asked for now."""
    asked = _arguments(AskPlan, arguments)
    rate = _rate(asked.rate_bytes_s) or situation.settings.rate_bytes_s
    match asked.kind:
        case "add":
            return _told(situation, _moves_of_add(situation, asked.count), rate)
        case "remove":
            return _told(situation, _moves_of_remove(situation, asked.node), rate)
        case "rebalance":
            planned = plan_rebalance(
                situation.loads(),
                situation.takers(),
                slack=situation.settings.balance_slack,
                moves_max=asked.moves_max,
                leave_out=situation.taken,
            )
            return _told(situation, planned.moves, rate)
        case "move":
            (number,) = _numbers(asked.shards, 1)
            jobs.ask_move(situation.topology, number, asked.node, 0)
            return _told(situation, [_move(situation, number, asked.node)], rate)
        case "merge":
            left, right = _in_token_order(situation, *_numbers(asked.shards, 2))
            jobs.ask_merge(situation.topology, left, right, 0)
            return _told(situation, _moves_of_merge(situation, left, right), rate)


def _moves_of_add(situation: Situation, count: int) -> list[PlannedMove]:
    if not 1 <= count <= NODES_AT_ONCE_MAX:
        raise InvalidArgument(f"Add from 1 to {NODES_AT_ONCE_MAX} nodes at once, not {count}.")
    loads, nodes, moves = situation.loads(), situation.takers(), list[PlannedMove]()
    for _ in range(count):
        nodes.append(next_node_name(situation.topology, nodes))
    for name in nodes[-count:]:
        gone = {move.shard for move in moves} | situation.taken
        planned = plan_rebalance(loads, nodes, only_to=name, leave_out=gone, slack=situation.settings.balance_slack)
        moves += planned.moves
        targets = {move.shard: move.target for move in planned.moves}
        loads = [ShardLoad(each.shard, targets.get(each.shard, each.node), each.bytes, each.ops_s) for each in loads]
    return moves


def _moves_of_remove(situation: Situation, node: str) -> list[PlannedMove]:
    jobs.ask_remove(situation.topology, node, 0)
    takers = [name for name in situation.takers() if name != node]
    return plan_drain(situation.loads(), node, takers, leave_out=situation.taken).moves if takers else []


def _moves_of_merge(situation: Situation, left: int, right: int) -> list[PlannedMove]:
    """The smaller one goes to the other, unless they are on one node."""
    shards = situation.topology.shards
    if shards[left].node == shards[right].node:
        return []
    smaller, other = sorted((left, right), key=lambda each: (situation.bytes_of(each), each))
    return [_move(situation, smaller, shards[other].node)]


def _move(situation: Situation, shard: int, target: str) -> PlannedMove:
    return PlannedMove(shard, situation.topology.shards[shard].node, target, situation.bytes_of(shard))


def _told(situation: Situation, moves: Sequence[PlannedMove], rate_bytes_s: int) -> Plan:
    before = dict.fromkeys(situation.takers(), 0)
    for load in situation.loads():
        before[load.node] = before.get(load.node, 0) + load.bytes
    after, traffic = dict(before), dict[str, int]()
    for move in moves:
        after[move.source] = after.get(move.source, 0) - move.bytes
        after[move.target] = after.get(move.target, 0) + move.bytes
        for node in (move.source, move.target):
            traffic[node] = traffic.get(node, 0) + move.bytes
    eta_s = max(traffic.values(), default=0) / (rate_bytes_s or ASSUMED_BYTES_S)
    return Plan(list(moves), sum(move.bytes for move in moves), eta_s, before, after)


# Arguments


def _with_job(situation: Situation, txn: MetaTxn) -> Answer:
    return txn, {"job": jobs.next_job_id(situation.topology)}


def _arguments(kind: type[A], arguments: dict[str, Any]) -> A:
    return _converted(arguments, kind, "What is asked cannot be understood")


def _converted(found: object, kind: type[T], complaint: str) -> T:
    try:
        return msgspec.convert(found, kind)
    except msgspec.ValidationError as error:
        raise InvalidArgument(f"{complaint}: {str(error).rstrip('.')}.") from error


def _rate(rate_bytes_s: int) -> int:
    if rate_bytes_s < 0:
        raise InvalidArgument(f"A rate is a number of bytes a second, not {rate_bytes_s}.")
    return rate_bytes_s


def _numbers(shards: list[int], count: int) -> list[int]:
    if len(shards) != count:
        raise InvalidArgument(f"Name {count} shards, not {len(shards)}.")
    return shards


VERBS: dict[str, Ask] = {
    "add_node": add_node,
    "remove_node": remove_node,
    "rebalance": rebalance,
    "move_shard": move_shard,
    "split_shard": split_shard,
    "merge_shards": merge_shards,
    "create_keyspace": create_keyspace,
    "drop_keyspace": drop_keyspace,
    "pause_job": pause_job,
    "resume_job": resume_job,
    "cancel_job": cancel_job,
    "set_rate": set_rate,
    "change_settings": change_settings,
}
