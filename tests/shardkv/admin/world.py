"""What tests of the admin verbs look at: a situation made of documents and reports, without any process."""

from __future__ import annotations

from collections.abc import Mapping

from shardkv.control.reports import ChangeReport, NodeReport, ShardReport
from shardkv.control.situation import Heard, Situation
from shardkv.topology.documents import (
    ClusterDocument,
    KeyspaceDocument,
    NodeDocument,
    ShardDocument,
    encode_document,
)
from shardkv.topology.view import Topology
from shardkv.wire.messages import MetaTxn

SHARD_BYTES = 1_000_000


def made(nodes: int = 2, shards: int = 4, partition: str = "hash") -> Topology:
    """A cluster whose shards are dealt round robin."""
    width = 2**64 // shards
    starts = [width * n if partition == "hash" else b"%02d" % n if n else b"" for n in range(shards)]
    documents = {
        "cluster": ClusterDocument("c1", nodes, partition, shards, []),  # type: ignore[arg-type]
        "keyspaces/default": KeyspaceDocument("default", partition, shards=shards),  # type: ignore[arg-type]
        **{f"nodes/node-{n}": node(f"node-{n}") for n in range(1, nodes + 1)},
        **{
            f"shards/{n + 1}": ShardDocument(
                n + 1, "default", starts[n], [*starts, None][n + 1], 1, f"node-{n % nodes + 1}"
            )
            for n in range(shards)
        },
    }
    return Topology().with_entries(10, [(key, encode_document(each)) for key, each in documents.items()])


def node(name: str) -> NodeDocument:
    return NodeDocument(name, f"s-{name}", 1, "127.0.0.1:1", 1)


def after(topology: Topology, txn: MetaTxn) -> Topology:
    """The topology once a transaction was applied. Requires: its compares hold."""
    for compare in txn.compares:
        assert topology.revision_of(compare.key) == compare.revision, compare
    revision = topology.revision + 1
    return topology.with_entries(revision, [(put.key, put.value) for put in txn.puts])


def situation(
    topology: Topology,
    *,
    silent: tuple[str, ...] = (),
    changes: Mapping[str, list[ChangeReport]] | None = None,
) -> Situation:
    """Every node but the silent ones has reported, its shards with SHARD_BYTES each."""
    heard = {}
    for name in topology.nodes:
        mine = [ShardReport(shard.id, SHARD_BYTES) for shard in topology.shards.values() if shard.node == name]
        report = NodeReport(name, 1, topology.revision, mine, list((changes or {}).get(name, ())))
        heard[name] = Heard(None if name in silent else report, 1000)
    return Situation(topology, heard, 1000)
