"""`Part`: the part of a topology that a node has to look at again, since only that can change its duties.

Duties of a shard follow from its document, from the node's tablets and fences of it, from the documents of shards that
were made from it, and from those of its change. So a shard whose document is the one that was carried out, of which
there is no staging, no fence and no change of this node, and that nothing is reported about, has the duties it had.
Ten thousand shards take a millisecond to look through, and some thirty to ask for all their duties.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import lru_cache

from shardkv.control.duties import Fence, takes_part
from shardkv.control.labels import Label, parse_label
from shardkv.topology.documents import ShardDocument
from shardkv.topology.view import Topology

parsed = lru_cache(maxsize=65_536)(parse_label)


@dataclass(frozen=True, slots=True)
class Part:
    """`topology` has only some of the shards, and `labels` are those of these. `shards` is None for all there are."""

    topology: Topology
    labels: list[bytes]
    shards: set[int] | None

    def covers(self, shard: int) -> bool:
        """Whether the duties of the part say all there is to say of a shard."""
        return self.shards is None or shard in self.shards


def whole(topology: Topology, labels: Iterable[bytes]) -> Part:
    return Part(topology, list(labels), None)


def changed_part(
    topology: Topology,
    before: Topology,
    node: str,
    labels: Collection[bytes],
    fences: Iterable[Fence],
    reported: Iterable[int],
) -> Part:
    """What may be different from `before`, which was carried out. `reported`: shards kept or missing here."""
    ids = _changed(topology.shards, before.shards)
    ids |= {fence.shard for fence in fences}
    ids.update(reported)
    ids.update(shard.id for shard in topology.shards.values() if shard.change and takes_part(shard, node))
    ids |= {label.shard for name in labels if (label := parsed(name)) is not None and label.is_staging}
    ids |= {shard.change.partner for shard in _documents(topology, ids) if shard.change and shard.change.partner}
    gone = ids - topology.shards.keys()
    if gone:
        ids |= {shard.id for shard in topology.shards.values() if shard.parents and not gone.isdisjoint(shard.parents)}
    narrowed = dataclasses.replace(topology, shards={shard.id: shard for shard in _documents(topology, ids)})
    return Part(narrowed, [name for name in labels if _is_of(parsed(name), ids)], ids)


def _changed(after: dict[int, ShardDocument], before: dict[int, ShardDocument]) -> set[int]:
    changed = {shard for shard, document in after.items() if before.get(shard) is not document}
    return changed | (before.keys() - after.keys())


def _documents(topology: Topology, ids: Iterable[int]) -> list[ShardDocument]:
    return [topology.shards[shard] for shard in ids if shard in topology.shards]


def _is_of(label: Label | None, ids: set[int]) -> bool:
    return label is None or label.shard in ids
