"""Which shards to move so that nodes carry equal shares: pure plans, the same for a dry run and for the real thing.

A plan moves a shard at most once, prefers few and large moves over many, and never beyond the mean, so that what
moves is about what was too much. First by bytes; then, within what bytes allow, by load.
Invariant: a balanced cluster gets an empty plan.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from shardkv.topology.documents import PlannedMove

ASSUMED_BYTES_S = 100_000_000
"""For an ETA where no rate is set."""
SHARD_BYTES = 64 * 1024
"""What a shard weighs beside its bytes, at least: nodes of a cluster that is next to empty get equal counts."""
SWAPS_LOOKED_AT = 40
"""Shards of a node that are tried against those of another; the ones with most load."""


@dataclass(frozen=True, slots=True)
class ShardLoad:
    """A shard, where it is, and what it weighs."""

    shard: int
    node: str
    bytes: int
    ops_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What would be moved. `eta_s`: how long the busiest node needs to send or receive its part."""

    moves: list[PlannedMove]
    bytes: int
    eta_s: float
    before: dict[str, int]
    """Bytes by node."""
    after: dict[str, int]


def plan_rebalance(
    shards: Sequence[ShardLoad],
    nodes: Sequence[str],
    *,
    slack: float = 0.1,
    moves_max: int | None = None,
    only_to: str | None = None,
    leave_out: Collection[int] = (),
    rate_bytes_s: int = 0,
) -> Plan:
    """Moves after which every node of `nodes` carries about the mean.

    Nothing is moved while all of them are within `slack` of the mean; else until they are well within it, or nothing
    helps any more. Shards on other nodes are left where they are, and so are those of `leave_out`.
    `only_to`: moves to this node only (it is new).
    """
    board = _Board(shards, nodes, leave_out)
    if only_to is not None or board.spread() > slack:
        _balance(board, slack / 2, moves_max, only_to)
    if only_to is None and board.spread(by="ops") > 2 * slack:
        _balance_load(board, slack, moves_max)
    return _plan(shards, board, rate_bytes_s)


def plan_drain(
    shards: Sequence[ShardLoad],
    source: str,
    nodes: Sequence[str],
    *,
    leave_out: Collection[int] = (),
    rate_bytes_s: int = 0,
) -> Plan:
    """Everything that `source` has, to the others of `nodes` (at least one), each time to the emptiest.

    `leave_out`: shards that are taken care of already.
    """
    board = _Board(shards, [name for name in nodes if name != source], leave_out)
    leaving = [shard for shard in shards if shard.node == source and shard.shard not in leave_out]
    for shard in sorted(leaving, key=lambda each: (-each.bytes, each.shard)):
        board.move(shard, min(board.weights, key=lambda name: (board.weights[name], board.ops[name], name)))
    return _plan(shards, board, rate_bytes_s)


@dataclass(slots=True)
class _Board:
    """The nodes' weights as moves are tried. An empty shard weighs a little, so counts are balanced as well."""

    shards: Sequence[ShardLoad]
    nodes: Iterable[str]
    fixed: Collection[int]
    weights: dict[str, float] = field(init=False)
    ops: dict[str, float] = field(init=False)
    held: dict[str, list[ShardLoad]] = field(init=False)
    """What may still be moved away from a node."""
    moves: list[PlannedMove] = field(init=False)
    _least: float = field(init=False)

    def __post_init__(self) -> None:
        self.weights = dict.fromkeys(self.nodes, 0.0)
        self.ops = dict.fromkeys(self.weights, 0.0)
        self.held = {name: [] for name in self.weights}
        self.moves = []
        self._least = max(SHARD_BYTES, sum(shard.bytes for shard in self.shards) / (100 * len(self.shards) or 1))
        for shard in self.shards:
            if shard.node in self.weights:
                self.weights[shard.node] += self.weight(shard)
                self.ops[shard.node] += shard.ops_s
                if shard.shard not in self.fixed:
                    self.held[shard.node].append(shard)

    def weight(self, shard: ShardLoad) -> float:
        return shard.bytes + self._least

    def mean(self, by: str = "weights") -> float:
        amounts: dict[str, float] = getattr(self, by)
        return sum(amounts.values()) / len(amounts) if amounts else 0.0

    def spread(self, by: str = "weights") -> float:
        """How far the node that is farthest from the mean is from it, as a share of the mean."""
        amounts: dict[str, float] = getattr(self, by)
        mean = self.mean(by)
        return max((abs(amount - mean) / mean for amount in amounts.values()), default=0.0) if mean else 0.0

    def move(self, shard: ShardLoad, target: str) -> None:
        if shard.node in self.weights:
            self.weights[shard.node] -= self.weight(shard)
            self.ops[shard.node] -= shard.ops_s
            self.held[shard.node].remove(shard)
        self.weights[target] += self.weight(shard)
        self.ops[target] += shard.ops_s
        self.moves.append(PlannedMove(shard.shard, shard.node, target, shard.bytes))


def _balance(board: _Board, slack: float, moves_max: int | None, only_to: str | None) -> None:
    mean = board.mean()
    while moves_max is None or len(board.moves) < moves_max:
        found = _best_move(board, mean, slack, only_to)
        if found is None:
            return
        board.move(*found)


def _best_move(board: _Board, mean: float, slack: float, only_to: str | None) -> tuple[ShardLoad, str] | None:
    """From the fullest node that has something fitting to the emptiest one; None: balanced, or nothing helps."""
    targets = [only_to] if only_to is not None else sorted(board.weights, key=lambda name: (board.weights[name], name))
    sources = sorted(board.weights, key=lambda name: (-board.weights[name], name))
    for target in targets:
        for source in sources:
            room, excess = mean - board.weights[target], board.weights[source] - mean
            if min(room, excess) <= 0 or max(room, 0 if only_to else excess) <= slack * mean:
                continue
            shard = _fitting(board, source, room, excess, board.weights[source] - board.weights[target])
            if shard is not None:
                return shard, target
    return None


def _fitting(board: _Board, source: str, room: float, excess: float, gap: float) -> ShardLoad | None:
    """The largest shard that takes neither node beyond the mean; else the smallest that brings them closer."""
    fits = [shard for shard in board.held[source] if board.weight(shard) <= min(room, excess)]
    if fits:
        return max(fits, key=lambda each: (each.bytes, -each.shard))
    closer = [shard for shard in board.held[source] if board.weight(shard) < gap]
    return min(closer, key=lambda each: (each.bytes, each.shard), default=None)


def _balance_load(board: _Board, slack: float, moves_max: int | None) -> None:
    """Moves, or exchanges, that take load off the busiest node and leave bytes within the slack."""
    mean = board.mean("ops")
    while moves_max is None or len(board.moves) < moves_max:
        source = max(board.ops, key=lambda name: (board.ops[name], name))
        target = min(board.ops, key=lambda name: (board.ops[name], name))
        excess = min(board.ops[source] - mean, mean - board.ops[target])
        if excess <= slack * mean:
            return
        found = _lighter_move(board, source, target, excess, slack)
        if not found or (moves_max is not None and len(board.moves) + len(found) > moves_max):
            return
        for shard, node in found:
            board.move(shard, node)


def _lighter_move(
    board: _Board, source: str, target: str, excess: float, slack: float
) -> list[tuple[ShardLoad, str]] | None:
    """The move or exchange that comes closest to moving `excess` of load without going beyond it."""
    mean = board.mean()
    busiest = sorted(board.held[source], key=lambda each: (-each.ops_s, each.shard))[:SWAPS_LOOKED_AT]
    calmest = sorted(board.held[target], key=lambda each: (each.ops_s, each.shard))[:SWAPS_LOOKED_AT]
    best: tuple[float, int, int, int] | None = None
    found: list[tuple[ShardLoad, str]] | None = None
    for shard in busiest:
        for other in [None, *calmest]:
            gain = shard.ops_s - (other.ops_s if other else 0.0)
            shift = board.weight(shard) - (board.weight(other) if other else 0.0)
            after = (board.weights[source] - shift, board.weights[target] + shift)
            if not excess / 10 < gain <= excess or any(abs(each - mean) > slack * mean for each in after):
                continue
            rank = (gain, -1 if other else 0, -shard.shard, -(other.shard if other else 0))
            if best is None or rank > best:
                best = rank
                found = [(shard, target)] + ([(other, source)] if other else [])
    return found


def _plan(shards: Sequence[ShardLoad], board: _Board, rate_bytes_s: int) -> Plan:
    before: dict[str, int] = {}
    for shard in shards:
        before[shard.node] = before.get(shard.node, 0) + shard.bytes
    for name in board.weights:
        before.setdefault(name, 0)
    after, traffic = dict(before), dict.fromkeys(before, 0)
    for move in board.moves:
        after[move.source] -= move.bytes
        after[move.target] += move.bytes
        traffic[move.source] += move.bytes
        traffic[move.target] += move.bytes
    eta_s = max(traffic.values(), default=0) / (rate_bytes_s or ASSUMED_BYTES_S)
    return Plan(board.moves, sum(move.bytes for move in board.moves), eta_s, before, after)
