"""What the controller goes by at one moment: the topology, what was heard of nodes and when, and what is taken.

Invariant: `taken` only grows within a tick, so that no two jobs begin changes of one shard, or load a node with more
changes than it may have.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

from shardkv.control.keyspaces import wish_for
from shardkv.control.planner import ShardLoad
from shardkv.control.reports import NodeReport, ShardReport
from shardkv.topology.documents import ControllerSettings, JobDocument, ShardDocument
from shardkv.topology.view import Topology


class Heard(NamedTuple):
    """The last report of a node, None while there was none, and when it came (or when it began to be waited for)."""

    report: NodeReport | None
    at_ms: int


@dataclass(slots=True)
class Situation:
    topology: Topology
    heard: dict[str, Heard]
    now_ms: int
    taken: set[int] = field(init=False)
    """Shards that are in a change, or that a transaction of this tick begins one of."""
    busy: Counter[str] = field(init=False)
    """By node: the changes it takes part in."""
    ids_taken: bool = field(init=False, default=False)
    """A transaction of this tick takes new shard ids already: a second one would be refused."""
    _reports: dict[int, ShardReport] = field(init=False)

    def __post_init__(self) -> None:
        changing = [shard for shard in self.topology.shards.values() if shard.change is not None]
        self.taken = {shard.id for shard in changing}
        sides = {
            (shard.change.id, name) for shard in changing if shard.change for name in (shard.node, shard.change.target)
        }
        self.busy = Counter(name for _, name in sides)
        self._reports = {}
        for heard in self.heard.values():
            for each in heard.report.shards if heard.report else ():
                shard = self.topology.shards.get(each.shard)
                if shard is not None and heard.report and shard.node == heard.report.name:
                    self._reports[each.shard] = each

    @property
    def settings(self) -> ControllerSettings:
        return self.topology.settings

    # Nodes

    def is_away(self, node: str) -> bool:
        """Whether nothing was heard of a node for long; a new controller has to listen for as long, first."""
        heard = self.heard.get(node)
        return heard is None or self.now_ms - heard.at_ms > self.settings.away_ms

    def is_up(self, node: str) -> bool:
        """Whether the node, in its present life, was heard of lately."""
        heard, known = self.heard.get(node), self.topology.nodes.get(node)
        if heard is None or heard.report is None or known is None or self.is_away(node):
            return False
        return heard.report.incarnation == known.incarnation

    def takes_shards(self, node: str) -> bool:
        """Whether shards may be moved to it."""
        return node in self.topology.nodes and wish_for(self.topology, node) == "active"

    def takers(self) -> list[str]:
        """The nodes that may get shards now, in the order of their names."""
        return sorted(name for name in self.topology.nodes if self.takes_shards(name) and self.is_up(name))

    def holders(self) -> dict[int, set[str]]:
        """For each shard the nodes that report a tablet of it."""
        found = defaultdict[int, set[str]](set)
        for name, heard in self.heard.items():
            for number in (*(each.shard for each in heard.report.shards), *heard.report.kept) if heard.report else ():
                found[number].add(name)
        return found

    def unheard(self, revision: int) -> set[str]:
        """Nodes that may hold tablets nobody knows of: not removed, and they have not reported, in their present life,
        that they carried out a topology of this revision or a newer one."""
        return {
            name
            for name, node in self.topology.nodes.items()
            if wish_for(self.topology, name) != "removed"
            and not self._has_carried_out(name, node.incarnation, revision)
        }

    def _has_carried_out(self, name: str, incarnation: int, revision: int) -> bool:
        report = self.heard[name].report if name in self.heard else None
        return report is not None and report.incarnation == incarnation and report.revision >= revision

    # Shards

    def report_of(self, shard: int) -> ShardReport | None:
        """What its owner says of a shard."""
        return self._reports.get(shard)

    def bytes_of(self, shard: int) -> int:
        report = self._reports.get(shard)
        return report.bytes if report is not None else 0

    def loads(self) -> list[ShardLoad]:
        """Every shard where it is, or is on its way to."""
        found = []
        for shard in self.topology.shards.values():
            if not shard.dropped:
                report = self._reports.get(shard.id)
                going = shard.change.target if shard.change is not None and shard.change.target else shard.node
                ops_s = report.ops_s if report else 0.0
                found.append(ShardLoad(shard.id, going, report.bytes if report else 0, ops_s))
        return found

    def rate_of(self, job: JobDocument) -> int:
        return job.rate_bytes_s or self.settings.rate_bytes_s

    # Taking

    def may_change(self, *nodes: str) -> bool:
        """Whether all of these nodes are up and may take part in one more change."""
        return all(self.is_up(name) and self.busy[name] < self.settings.changes_per_node for name in nodes)

    def take(self, shards: list[ShardDocument], *nodes: str) -> None:
        """A change of these shards, by these nodes, is begun in this tick."""
        self.taken |= {shard.id for shard in shards}
        self.busy.update(nodes)
