"""What the metadata store holds about a cluster: one small document per cluster, keyspace, shard, node and router.

Invariant: a shard's token interval never changes and its id is never used again; what changes is its owner, and
every change of owner raises its epoch. Documents are msgpack maps, so fields can be added; none is ever renamed.

Keys:  cluster   keyspaces/<name>   shards/<id>   nodes/<name>   routers/<name>
"""

from __future__ import annotations

from typing import Literal

import msgspec

TopologyBound = int | bytes
"""A token: an unsigned 64-bit int in a hash keyspace, a key in a range keyspace."""

Partition = Literal["hash", "range"]

HASH_TOKENS = 2**64

CLUSTER_KEY = "cluster"
KEYSPACES = "keyspaces/"
SHARDS = "shards/"
NODES = "nodes/"
ROUTERS = "routers/"


class ClusterDocument(msgspec.Struct, frozen=True):
    """Who the cluster is and what was wanted when it was made."""

    cluster_id: str
    nodes_wanted: int
    """The default keyspace is placed once this many nodes have registered."""
    partition: Partition
    shards: int
    split_at: list[bytes]
    """First keys of the second and later shards of a range keyspace; empty: evenly over letters and digits."""


class KeyspaceDocument(msgspec.Struct, frozen=True):
    name: str
    partition: Partition


class ShardDocument(msgspec.Struct, frozen=True):
    """A half-open token interval [start, stop) and its owner."""

    id: int
    keyspace: str
    start: TopologyBound
    stop: TopologyBound | None
    """None: to the end of the key space (range); in a hash keyspace the last stop is 2**64, stored as None too."""
    epoch: int
    node: str


class NodeDocument(msgspec.Struct, frozen=True):
    """A node as it last registered."""

    name: str
    store_id: str
    """Identity of its data directory (hex)."""
    incarnation: int
    """Number of its starts; rises by one at each."""
    address: str
    """HOST:PORT where it serves."""
    pid: int


class RouterDocument(msgspec.Struct, frozen=True):
    name: str
    address: str
    """Its own HOST:PORT, beside the port it may share with other routers."""
    pid: int


def encode_document(document: msgspec.Struct) -> bytes:
    return msgspec.msgpack.encode(document)


_decoders: dict[str, msgspec.msgpack.Decoder[msgspec.Struct]] = {
    CLUSTER_KEY: msgspec.msgpack.Decoder(ClusterDocument),
    KEYSPACES: msgspec.msgpack.Decoder(KeyspaceDocument),
    SHARDS: msgspec.msgpack.Decoder(ShardDocument),
    NODES: msgspec.msgpack.Decoder(NodeDocument),
    ROUTERS: msgspec.msgpack.Decoder(RouterDocument),
}


def decode_document(key: str, value: bytes) -> msgspec.Struct | None:
    """The document stored under `key`; None for a key this version does not know."""
    decoder = _decoders.get(key[: key.find("/") + 1] or key)
    return decoder.decode(value) if decoder else None
