"""What a router tells a client of the topology: small, complete, and judged before it is used."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from shardkv.errors import RemoteProtocolError, UnknownKeyspace
from shardkv.topology.documents import (
    ClusterDocument,
    KeyspaceDocument,
    NodeDocument,
    Partition,
    ShardDocument,
    encode_document,
)
from shardkv.topology.placement import place_keyspace
from shardkv.topology.routes import tell_routes, told_routes
from shardkv.topology.view import Topology
from shardkv.wire.messages import RoutesReply, decode_routes_reply, raw

NODES = ["node-1", "node-2", "node-3"]


def topology(partition: Partition, shards: int, *, registered: list[str] = NODES) -> Topology:
    documents: list[tuple[str, msgspec.Struct]] = [
        ("cluster", ClusterDocument("c1", 3, partition, shards, [])),
        ("keyspaces/default", KeyspaceDocument("default", partition)),
    ]
    documents += [(f"nodes/{name}", NodeDocument(name, "s", 1, f"10.0.0.1:{7000}", 1)) for name in registered]
    placed = place_keyspace("default", partition, shards=shards, split_at=[], nodes=NODES, first_id=1)
    documents += [(f"shards/{shard.id}", shard) for shard in placed]
    return Topology().with_entries(7, [(key, encode_document(document)) for key, document in documents])


@pytest.mark.parametrize("partition", ["hash", "range"])
def test_routes_send_keys_where_the_router_does(partition: Partition) -> None:
    view = topology(partition, 100)
    routes = told_routes(decode_routes_reply(raw(tell_routes(view, "default"))), "default")
    assert routes is not None
    assert (routes.cluster_id, routes.revision) == ("c1", 7)
    assert routes.view.shards == view.keyspace("default").shards
    routes.view.check()
    assert routes.addresses == dict.fromkeys(NODES, "10.0.0.1:7000")
    rng = random.Random(4)
    keys = [rng.randbytes(rng.randrange(1, 9)) for _ in range(300)]
    assert [routes.view.shard_for(key) for key in keys] == [view.keyspace("default").shard_for(key) for key in keys]


def test_ten_thousand_shards_stay_small() -> None:
    assert len(raw(tell_routes(topology("hash", 10_000), "default"))) < 234 * 1024


def test_a_node_without_an_address_is_not_one_to_ask() -> None:
    routes = told_routes(tell_routes(topology("hash", 6, registered=["node-1"]), "default"), "default")
    assert routes is not None
    assert routes.addresses == {"node-1": "10.0.0.1:7000"}


def test_nothing_new_and_nothing_known() -> None:
    assert told_routes(RoutesReply("c1", 7), "default") is None
    with pytest.raises(UnknownKeyspace):
        tell_routes(topology("hash", 6), "nope")


@pytest.mark.parametrize(
    "wrong",
    [
        {"starts": [0, 5]},
        {"starts": [1, 5, 9]},
        {"starts": [0, 9, 5]},
        {"starts": [0, b"k", 9]},
        {"owners": [0, 1, 2]},
        {"starts": [], "shards": [], "epochs": [], "owners": []},
    ],
)
def test_nonsense_is_refused(wrong: dict[str, Any]) -> None:
    right = RoutesReply("c1", 7, "hash", [0, 5, 9], [1, 2, 3], [1, 1, 4], [0, 1, 0], [("a", "h:1"), ("b", "h:2")])
    routes = told_routes(right, "default")
    assert routes is not None
    assert routes.view.shards[2] == ShardDocument(3, "default", 9, None, 4, "a")
    with pytest.raises(RemoteProtocolError):
        told_routes(msgspec.structs.replace(right, **wrong), "default")
