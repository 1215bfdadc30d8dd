"""A transaction being written down: every key it puts, and every key it rests on, is compared with the view.

Invariant: a drafted transaction is applied only if nothing it looked at has changed since, so it may be sent twice,
by two controllers, or too late, and still happens at most once.
"""

from __future__ import annotations

import msgspec

from shardkv.topology.documents import SHARDS, ShardDocument, encode_document
from shardkv.topology.view import Topology
from shardkv.wire.messages import MetaCompare, MetaPut, MetaTxn


class Draft:
    """Collects puts and compares over one view; `shard` shows what it has put so far."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self._compares: dict[str, int] = {}
        self._puts: dict[str, msgspec.Struct | None] = {}

    def rest_on(self, *keys: str) -> None:
        """The transaction is applied only if these keys are as the view shows them."""
        for key in keys:
            self._compares[key] = self.topology.revision_of(key)

    def put(self, key: str, document: msgspec.Struct) -> None:
        self.rest_on(key)
        self._puts[key] = document

    def delete(self, key: str) -> None:
        self.rest_on(key)
        self._puts[key] = None

    def put_shard(self, shard: ShardDocument) -> None:
        self.put(f"{SHARDS}{shard.id}", shard)

    def __bool__(self) -> bool:
        """Whether there is anything to write."""
        return bool(self._puts)

    def __len__(self) -> int:
        return len(self._puts)

    def txn(self) -> MetaTxn:
        return MetaTxn(
            [MetaCompare(key, revision) for key, revision in self._compares.items()],
            [
                MetaPut(key, None if document is None else encode_document(document))
                for key, document in self._puts.items()
            ],
        )
