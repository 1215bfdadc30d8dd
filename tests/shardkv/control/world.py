"""Topologies made by hand, for tests of what is decided from one."""

from __future__ import annotations

from typing import Any

import msgspec

from shardkv.control.keyspaces import create_keyspace
from shardkv.control.reports import NodeReport, ShardReport
from shardkv.topology.documents import NodeDocument, Partition, ShardDocument, encode_document
from shardkv.topology.view import Topology
from shardkv.wire.messages import MetaTxn


class Book:
    """A store of nothing but documents, to which transactions are applied one after the other."""

    def __init__(self, *nodes: str, shards: int = 4, partition: Partition = "hash") -> None:
        self.topology = Topology()
        self.put(**{f"nodes/{name}": NodeDocument(name, "s", 1, f"{name}:1", 1) for name in nodes})
        if shards:
            assert self.apply(create_keyspace(self.topology, "default", partition, shards=shards))

    def put(self, **documents: msgspec.Struct | None) -> None:
        revision = self.topology.revision + 1
        entries = [(key, encode_document(each) if each else None, revision) for key, each in documents.items()]
        self.topology = self.topology.with_entries(revision, entries)

    def apply(self, txn: MetaTxn | None) -> bool:
        """Whether every compare held."""
        assert txn is not None
        if any(self.topology.revision_of(each.key) != each.revision for each in txn.compares):
            return False
        revision = self.topology.revision + 1
        self.topology = self.topology.with_entries(revision, [(put.key, put.value, revision) for put in txn.puts])
        return True

    def shard(self, number: int) -> ShardDocument:
        return self.topology.shards[number]

    def report(self, node: str, *, sizes: dict[int, int] | None = None, **fields: Any) -> NodeReport:
        """What a node that is well says: of its shards, with 100 bytes each unless `sizes` says more."""
        mine = [shard.id for shard in self.topology.shards.values() if shard.node == node]
        shards = [ShardReport(number, (sizes or {}).get(number, 100)) for number in mine]
        incarnation = self.topology.nodes[node].incarnation
        return NodeReport(node, incarnation, self.topology.revision, **{"shards": shards, **fields})
