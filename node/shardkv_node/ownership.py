"""Which shards this node owns, at which epoch, and which tablet of its store holds each.

Invariant: `tablet_of` answers only for a shard that the newest known topology gives to this node, at exactly the
epoch asked for; anything else is refused, so a request can never read or write what moved away.
A tablet's label in the store is its shard's id in decimal.
"""

from __future__ import annotations

from collections.abc import Sequence

from shardkv.errors import StaleEpoch, WrongShard
from shardkv.topology.documents import ShardDocument
from shardkv.topology.view import Topology
from shardkv_node.engine.store import Store


class Ownership:
    """Kept up to date by `update`; asked once per request."""

    def __init__(self, node: str, store: Store) -> None:
        self._node = node
        self._store = store
        self._owned: dict[int, tuple[int, int]] = {}
        self.revision = 0

    @property
    def shards(self) -> dict[int, int]:
        """Shard id -> epoch of what is owned."""
        return {shard: epoch for shard, (epoch, _) in self._owned.items()}

    def update(self, topology: Topology) -> None:
        """Follow a newer topology: tablets of newly owned shards are made (durably) before they are served."""
        tablets = {int(label): tablet for tablet, label in self._store.tablets.items()}
        owned: dict[int, tuple[int, int]] = {}
        for shard in topology.shards.values():
            if shard.node == self._node:
                owned[shard.id] = (shard.epoch, self._tablet(shard, tablets))
        self._owned = owned
        self.revision = topology.revision

    def _tablet(self, shard: ShardDocument, tablets: dict[int, int]) -> int:
        tablet = tablets.get(shard.id)
        return self._store.create_tablet(str(shard.id).encode()) if tablet is None else tablet

    def tablet_of(self, shard: int | None, epoch: int | None) -> int:
        """The tablet of a shard at an epoch. Raises WrongShard, StaleEpoch."""
        owned = self._owned.get(shard) if shard is not None else None
        if owned is None:
            raise WrongShard(
                f"Node {self._node} does not own shard {shard}.", detail={"shard": shard, "node": self._node}
            )
        if owned[0] != epoch:
            raise StaleEpoch(
                f"Shard {shard} is at epoch {owned[0]} on node {self._node}, the request names {epoch}.",
                detail={"shard": shard, "node": self._node, "epoch": owned[0]},
            )
        return owned[1]

    def tablets_of(self, shards: Sequence[tuple[int, int]]) -> list[int]:
        """The tablets of several (shard, epoch) pairs. Raises WrongShard, StaleEpoch for the first that is not."""
        return [self.tablet_of(shard, epoch) for shard, epoch in shards]
