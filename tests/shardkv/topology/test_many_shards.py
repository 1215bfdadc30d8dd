"""A keyspace of 10,000 shards stays small and quick to follow: sizes are asserted, times only printed."""

from __future__ import annotations

import time

import msgspec

from shardkv.topology.documents import JobDocument, KeyspaceDocument, encode_document
from shardkv.topology.placement import place_keyspace
from shardkv.topology.view import Topology

SHARDS = 10_000


def test_ten_thousand_shards_fit_into_a_megabyte_and_are_followed_quickly() -> None:
    nodes = [f"node-{number}" for number in range(1, 21)]
    shards = place_keyspace("default", "hash", shards=SHARDS, split_at=[], nodes=nodes, first_id=1)
    entries: list[tuple[str, bytes | None, int]] = [
        ("keyspaces/default", encode_document(KeyspaceDocument("default", "hash", shards=SHARDS)), 1),
        *((f"shards/{shard.id}", encode_document(shard), 1) for shard in shards),
    ]
    size_bytes = sum(len(key) + len(value or b"") for key, value, _ in entries)
    begun = time.perf_counter()
    topology = Topology().with_entries(1, entries)
    made = time.perf_counter()
    moved = msgspec.structs.replace(shards[7], node="node-9", epoch=2, owned_since=2, last_change="00" * 8)
    after = topology.with_entries(2, [("shards/8", encode_document(moved), 2)])
    followed = time.perf_counter()
    same = topology.with_entries(3, [("jobs/1", encode_document(JobDocument(1, "rebalance")), 3)])
    noted = time.perf_counter()
    keys = [b"key-%d" % number for number in range(100_000)]
    routing = time.perf_counter()
    after.keyspace("default").positions(keys)
    routed = time.perf_counter()
    print(
        f"{SHARDS} shards: {size_bytes / 1000:.0f} kB; view made in {(made - begun) * 1000:.0f} ms, a moved shard "
        f"followed in {(followed - made) * 1000:.1f} ms, a job in {(noted - followed) * 1000:.1f} ms; "
        f"a key routed in {(routed - routing) / len(keys) * 1e9:.0f} ns"
    )
    assert size_bytes < 1_000_000
    assert len(after.keyspace("default").shards) == SHARDS
    assert after.shards[8] == moved
    assert after.keyspace("default").shards[7] == moved
    assert same.keyspaces == topology.keyspaces
