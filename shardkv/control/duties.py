"""What the topology asks of a node: the tablets to make, adopt, drop and keep, what to serve, what to work on.

Invariants: a shard is served only by the owner, from the tablet of this very ownership, unfenced, and never while it
is in a change begun before the node's last start. A tablet is dropped only when the topology positively says that it
is of the past; what cannot be told is kept and reported. The order of the steps matters: a tablet is adopted before
what it was made from is dropped, and a tablet is dropped before its fence is.

The node carries the steps out, each durably before the next, and asks again with every newer view. A step carried out
twice, or cut off by a crash, does no harm: the next answer goes on from what is there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from shardkv.control.labels import Label, owned_label, parse_label, staging_label
from shardkv.topology.documents import Change, ShardDocument
from shardkv.topology.view import Topology


class Fence(msgspec.Struct, frozen=True, order=True):
    """A node's durable promise to answer nothing for a shard while its epoch is `epoch`, given for a change."""

    shard: int
    epoch: int
    change: str


# Steps


@dataclass(frozen=True, slots=True)
class Create:
    """Make an empty tablet: the shard was placed here and nothing was ever written to it."""

    label: bytes


@dataclass(frozen=True, slots=True)
class Adopt:
    """Relabel the staging of a committed change; it is this node's shard now."""

    staging: bytes
    label: bytes


@dataclass(frozen=True, slots=True)
class Drop:
    """Drop a tablet. `why` is for the log."""

    label: bytes
    why: str


@dataclass(frozen=True, slots=True)
class Unfence:
    """Forget a fence: the shard's epoch moved on, or it is not here any more."""

    fence: Fence


@dataclass(frozen=True, slots=True)
class Abort:
    """Send `changes.abort` until the change is over; until then the shard is not served."""

    shard: int
    change: str
    problem: str


@dataclass(frozen=True, slots=True)
class Serve:
    """Answer requests for a shard at exactly this epoch from the tablet with this label."""

    shard: int
    epoch: int
    label: bytes


@dataclass(frozen=True, slots=True)
class Work:
    """Take part in a change. Anything in its name that does not fit this step is refused.

    `role`: "source" gives the shard, "target" fetches it and commits, "owner" splits or merges and commits.
    `stagings`: labels to fill, in the order of the change's children; the tablets are made where missing.
    """

    role: str
    change: Change
    shards: tuple[int, ...]
    epochs: tuple[int, ...]
    source: str
    """The node that owns the shards."""
    stagings: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Keep:
    """Report a tablet that is not served and that nothing allows to drop."""

    label: bytes
    why: str


@dataclass(frozen=True, slots=True)
class Missing:
    """Report a shard that this node owns and has no data of. It is not served."""

    shard: int
    why: str


Step = Create | Adopt | Drop | Unfence | Abort | Serve | Work | Keep | Missing


def duties(
    node: str,
    incarnation: int,
    topology: Topology,
    labels: Iterable[bytes],
    fences: Iterable[Fence],
    *,
    revision_seen: int = 0,
) -> list[Step] | None:
    """The steps of `node`, which has tablets with these labels and these fences, at its start number `incarnation`.

    `revision_seen`: the highest store revision the node knows it has acted on. A store that is behind it is an old
    copy: then the answer is None, and the node goes on as before.
    """
    if topology.revision < revision_seen:
        return None
    return _Duties(node, incarnation, topology, labels, fences).steps()


class _Duties:
    def __init__(
        self, node: str, incarnation: int, topology: Topology, labels: Iterable[bytes], fences: Iterable[Fence]
    ) -> None:
        self._node = node
        self._incarnation = incarnation
        self._topology = topology
        self._owned = [shard for shard in topology.shards.values() if shard.node == node]
        self._mine = [shard for shard in topology.shards.values() if shard.change and takes_part(shard, node)]
        parsed = {label: parse_label(label) for label in labels}
        self._tablets = {label: found for label, found in parsed.items() if found is not None and not found.is_staging}
        self._stagings = {label: found for label, found in parsed.items() if found is not None and found.is_staging}
        self._strange = [label for label, found in parsed.items() if found is None]
        self._fences: dict[int, list[Fence]] = defaultdict(list)
        for fence in fences:
            self._fences[fence.shard].append(fence)

    def steps(self) -> list[Step]:
        making = self._making()
        have = {*self._tablets, *(step.label for step in making if isinstance(step, Create | Adopt))}
        aborts = self._aborts()
        return [
            *making,
            *self._drops(making, have),
            *self._unfences(),
            *aborts,
            *self._serves(have, {step.change for step in aborts}),
            *self._works(),
        ]

    # Tablets to have

    def _making(self) -> list[Step]:
        """What gives each owned shard its tablet, where it has none yet."""
        found: list[Step] = []
        for shard in self._owned:
            label = owned_label(shard.id, shard.owned_since)
            if label in self._tablets or shard.dropped:
                continue
            staging = self._staging_of(shard)
            if staging is not None:
                found.append(Adopt(staging, label))
            elif may_be_made(shard):
                found.append(Create(label))
            else:
                found.append(
                    Missing(
                        shard.id, f"Shard {shard.id} came by change {shard.last_change}, and no tablet is left of it."
                    )
                )
        return found

    def _staging_of(self, shard: ShardDocument) -> bytes | None:
        """The staging that the change which gave us the shard has filled."""
        for label, found in self._stagings.items():
            if found.shard == shard.id and is_brought_by(shard, found.change):
                return label
        return None

    # Tablets to drop or keep

    def _drops(self, making: list[Step], have: set[bytes]) -> list[Step]:
        adopted = {step.staging for step in making if isinstance(step, Adopt)}
        heirs = self._heirs()
        found: list[Step] = []
        for label, tablet in self._tablets.items():
            found += self._fate_of_tablet(label, tablet, heirs.get(tablet.shard, ()), have)
        working = {shard.change.id for shard in self._mine if shard.change}
        for label, staging in self._stagings.items():
            if label not in adopted and staging.change not in working:
                found.append(self._fate_of_staging(label, staging))
        return [*found, *(Keep(label, "Its label is of another version.") for label in self._strange)]

    def _heirs(self) -> dict[int, list[ShardDocument]]:
        """For each shard that a split or merge ended, the shards that are made from it."""
        wanted = {tablet.shard for tablet in self._tablets.values()} - self._topology.shards.keys()
        heirs: dict[int, list[ShardDocument]] = defaultdict(list)
        if wanted:
            for shard in self._topology.shards.values():
                for parent in shard.parents:
                    heirs[parent].append(shard)
        return heirs

    def _fate_of_tablet(
        self, label: bytes, tablet: Label, heirs: Sequence[ShardDocument], have: set[bytes]
    ) -> list[Step]:
        shard = self._topology.shards.get(tablet.shard)
        if shard is None and heirs:
            if any(heir.node == self._node and owned_label(heir.id, heir.owned_since) not in have for heir in heirs):
                return [Keep(label, "A shard that was made from it has no tablet yet.")]
            return [Drop(label, f"Shard {heirs[0].id} is made from it.")]
        if shard is None:
            return [Keep(label, f"The topology does not know shard {tablet.shard}.")]
        if shard.dropped:
            return [Drop(label, f"Keyspace {shard.keyspace} is being dropped.")]
        if is_superseded(tablet, shard):
            return [Drop(label, f"Node {shard.node} has the shard since epoch {shard.owned_since}.")]
        if shard.node == self._node and tablet.since == shard.owned_since:
            return []
        return [Keep(label, f"It is newer than the topology says: node {shard.node} since epoch {shard.owned_since}.")]

    def _fate_of_staging(self, label: bytes, staging: Label) -> Step:
        """Of one whose change is not known to be under way, and that is not adopted."""
        if staging.since > self._topology.revision:
            return Keep(label, f"It was begun at revision {staging.since}, which the topology has not reached.")
        return Drop(label, f"Change {staging.change} is over.")

    # Fences

    def _unfences(self) -> list[Step]:
        return [Unfence(fence) for fences in self._fences.values() for fence in fences if self._is_over(fence)]

    def _is_over(self, fence: Fence) -> bool:
        shard = self._topology.shards.get(fence.shard)
        if shard is not None:
            return ends_fence(fence, shard)
        return not any(tablet.shard == fence.shard for tablet in self._tablets.values()) or bool(
            self._heirs().get(fence.shard)
        )

    # Serving

    def _aborts(self) -> list[Abort]:
        """Changes that this node took part in before it was started the last time."""
        return [
            Abort(shard.id, shard.change.id, f"Node {self._node} was started again while it took part.")
            for shard in self._mine
            if shard.change and begun_in_earlier_life(shard, self._node, self._incarnation)
        ]

    def _serves(self, have: set[bytes], aborted: set[str]) -> list[Step]:
        found: list[Step] = []
        for shard in self._owned:
            label = owned_label(shard.id, shard.owned_since)
            fenced = any(not ends_fence(fence, shard) for fence in self._fences.get(shard.id, ()))
            waits = shard.change is not None and shard.change.id in aborted
            if label in have and not fenced and not waits and not shard.dropped:
                found.append(Serve(shard.id, shard.epoch, label))
        return found

    # Working

    def _works(self) -> list[Step]:
        """Each change once, whoever of its shards is met first."""
        works: dict[str, Work] = {}
        for shard in self._mine:
            change = shard.change
            assert change is not None
            if change.id not in works and not begun_in_earlier_life(shard, self._node, self._incarnation):
                works[change.id] = self._work(shard, change)
        return list(works.values())

    def _work(self, shard: ShardDocument, change: Change) -> Work:
        carrying = [shard]
        if change.partner in self._topology.shards:
            carrying = sorted((shard, self._topology.shards[change.partner]), key=lambda each: each.start)
        if change.kind == "move" and shard.node == self._node:
            role, made = "source", []
        elif change.kind == "move":
            role, made = "target", [shard.id]
        else:
            role, made = "owner", change.children
        return Work(
            role=role,
            change=change,
            shards=tuple(each.id for each in carrying),
            epochs=tuple(each.epoch for each in carrying),
            source=shard.node,
            stagings=tuple(self._staging_label(child, change) for child in made),
        )

    def _staging_label(self, shard: int, change: Change) -> bytes:
        for label, staging in self._stagings.items():
            if (staging.shard, staging.change) == (shard, change.id):
                return label
        return staging_label(shard, change.id, self._topology.revision)


# The rules the steps rest on. Each is one of CHANGES.md; the simulation removes them one by one.


def takes_part(shard: ShardDocument, node: str) -> bool:
    """Whether `node` has something to do in the change that a shard carries."""
    return shard.change is not None and node in (shard.node, shard.change.target)


def begun_in_earlier_life(shard: ShardDocument, node: str, incarnation: int) -> bool:
    """Whether the change that a shard carries began before this start of `node` (a node of that change)."""
    change = shard.change
    assert change is not None
    if shard.node == node:
        return change.source_incarnation != incarnation
    return change.target_incarnation != incarnation


def may_be_made(shard: ShardDocument) -> bool:
    """Whether the owner may begin with an empty tablet: no change ever brought the shard."""
    return not shard.last_change


def is_brought_by(shard: ShardDocument, change_id: str) -> bool:
    """Whether this change made the owner the owner."""
    return shard.last_change == change_id


def is_superseded(tablet: Label, shard: ShardDocument) -> bool:
    """Whether a later ownership was committed than the one a tablet was adopted in."""
    return tablet.since < shard.owned_since


def ends_fence(fence: Fence, shard: ShardDocument) -> bool:
    """Whether the change a fence was given for is over: the epoch moved on."""
    return shard.epoch > fence.epoch
