"""Where the keys of one keyspace are: the part of the topology that a client needs to ask nodes by itself.

A router tells it as columns, one row a shard (10,000 shards: about 137 KiB). Routes may be old at any time and are
trusted with nothing but the choice of whom to ask: a node answers only for what it owns, at the epoch it is asked for.

Invariant: routes never change; newer ones take their place.
"""

from __future__ import annotations

from shardkv.errors import RemoteProtocolError
from shardkv.topology.documents import Partition, ShardDocument, TopologyBound
from shardkv.topology.view import KeyspaceView, Topology
from shardkv.wire.messages import RoutesReply

_LOWEST: dict[Partition, TopologyBound] = {"hash": 0, "range": b""}


class Routes:
    """The shards of a keyspace, and the addresses of the nodes that own them, as of a revision of the topology."""

    __slots__ = ("addresses", "cluster_id", "revision", "shards", "view")

    def __init__(self, cluster_id: str, revision: int, view: KeyspaceView, addresses: dict[str, str]) -> None:
        self.cluster_id = cluster_id
        self.revision = revision
        self.view = view
        self.shards: dict[int, ShardDocument] = {shard.id: shard for shard in view.shards}
        self.addresses = addresses
        """HOST:PORT by the node's name; nodes that have none yet are not in it."""


def tell_routes(topology: Topology, keyspace: str) -> RoutesReply:
    """What a router tells of a keyspace. Raises UnknownKeyspace."""
    view = topology.keyspace(keyspace)
    names = sorted({shard.node for shard in view.shards})
    number_of = {name: number for number, name in enumerate(names)}
    return RoutesReply(
        cluster_id=topology.cluster.cluster_id if topology.cluster else "",
        revision=topology.revision,
        partition=view.partition,
        starts=[shard.start for shard in view.shards],
        shards=[shard.id for shard in view.shards],
        epochs=[shard.epoch for shard in view.shards],
        owners=[number_of[shard.node] for shard in view.shards],
        nodes=[(name, topology.nodes[name].address if name in topology.nodes else "") for name in names],
    )


def told_routes(told: RoutesReply, keyspace: str) -> Routes | None:
    """The routes a router told of; None: those it was asked about are its newest. Raises RemoteProtocolError."""
    if told.partition is None:
        return None
    names = [name for name, _ in told.nodes]
    stops = [*told.starts[1:], None]
    try:
        shards = [
            ShardDocument(shard, keyspace, start, stop, epoch, names[owner])
            for shard, start, stop, epoch, owner in zip(
                told.shards, told.starts, stops, told.epochs, told.owners, strict=True
            )
        ]
        view = KeyspaceView(keyspace, told.partition, shards)
    except (ValueError, IndexError, TypeError) as error:
        raise RemoteProtocolError(f"What a router told of the topology makes no sense: {error}.") from None
    if not shards or view.shards != shards or shards[0].start != _LOWEST[told.partition]:
        raise RemoteProtocolError("The shards that a router told of do not cover the keyspace in order.")
    addresses = {name: address for name, address in told.nodes if address}
    return Routes(told.cluster_id, told.revision, view, addresses)
