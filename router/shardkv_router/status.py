"""The cluster as a router sees it, as plain data: for `shardkv cluster status`, the clients' `status()` and tests."""

from __future__ import annotations

import asyncio
from typing import Any

from shardkv.errors import ShardKVError
from shardkv.topology.documents import ShardDocument, TopologyBound
from shardkv.topology.view import KeyspaceView, Topology
from shardkv.wire.messages import NOTHING, Op, decode_any
from shardkv_router.links import NodeLinks

NODE_TIMEOUT_S = 1.0


async def cluster_status(
    topology: Topology, links: NodeLinks, router: dict[str, Any], *, meta_connected: bool
) -> dict[str, Any]:
    """Cluster id, revision, keyspaces with their shards, every node (with `up` and its own numbers), this router."""
    names = sorted(topology.nodes)
    nodes = await asyncio.gather(*(_node_status(topology, links, name) for name in names))
    return {
        "cluster_id": topology.cluster.cluster_id if topology.cluster else None,
        "revision": topology.revision,
        "meta": {"up": meta_connected},
        "keyspaces": {name: _keyspace(view) for name, view in sorted(topology.keyspaces.items())},
        "nodes": dict(zip(names, nodes, strict=True)),
        "routers": {
            name: {"address": document.address, "pid": document.pid}
            for name, document in sorted(topology.routers.items())
        },
        "router": router,
    }


async def _node_status(topology: Topology, links: NodeLinks, name: str) -> dict[str, Any]:
    document = topology.nodes[name]
    told: dict[str, Any] = {
        "address": document.address,
        "incarnation": document.incarnation,
        "pid": document.pid,
        "up": False,
    }
    peer = links.usable(name)
    if peer is None:
        return {**told, "problem": links.problem(name)}
    try:
        payload = await peer.call(Op.STATUS, NOTHING, timeout_s=NODE_TIMEOUT_S)
    except ShardKVError as error:
        return {**told, "problem": error.message}
    return {**told, "up": True, **decode_any(payload)}


def _keyspace(view: KeyspaceView) -> dict[str, Any]:
    return {"partition": view.partition, "shards": [_shard(shard) for shard in view.shards]}


def _shard(shard: ShardDocument) -> dict[str, Any]:
    return {
        "id": shard.id,
        "node": shard.node,
        "epoch": shard.epoch,
        "start": _bound(shard.start),
        "stop": None if shard.stop is None else _bound(shard.stop),
    }


def _bound(bound: TopologyBound) -> str:
    """A token as text: 16 hex digits of a hash, a key with its odd bytes escaped."""
    return f"{bound:016x}" if isinstance(bound, int) else bound.decode("utf-8", "backslashreplace")
