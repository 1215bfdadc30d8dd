import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkv.errors import UnknownKeyspace
from shardkv.topology.documents import (
    CLUSTER_KEY,
    Attempt,
    ClusterDocument,
    ControllerSettings,
    CounterDocument,
    JobDocument,
    KeyspaceDocument,
    NodeDocument,
    Partition,
    Placing,
    WantedDocument,
    encode_document,
)
from shardkv.topology.placement import place_keyspace
from shardkv.topology.tokens import hash_token
from shardkv.topology.view import KeyspaceView, Topology

KEYS = st.binary(min_size=1, max_size=6)


def topology(partition: Partition, shards: int, split_at: list[bytes] | None = None) -> Topology:
    placed = place_keyspace(
        "default", partition, shards=shards, split_at=split_at or [], nodes=["node-1", "node-2"], first_id=1
    )
    entries = [("keyspaces/default", encode_document(KeyspaceDocument("default", partition)))]
    entries += [(f"shards/{shard.id}", encode_document(shard)) for shard in placed]
    return Topology().with_entries(1, entries)


@given(KEYS, st.sampled_from(["hash", "range"]), st.integers(1, 40))
def test_every_key_has_exactly_one_shard(key: bytes, partition: Partition, shards: int) -> None:
    view = topology(partition, shards).keyspace("default")
    view.check()
    token = key if partition == "range" else hash_token(key)
    owners = [s for s in view.shards if s.start <= token and (s.stop is None or token < s.stop)]
    assert owners == [view.shard_for(key)]
    assert [view.shards[position] for position in view.positions([key])] == owners


@given(st.lists(KEYS, min_size=1, unique=True), KEYS, KEYS)
def test_the_shards_of_a_range_hold_all_its_keys_and_no_more_are_asked(cuts: list[bytes], a: bytes, b: bytes) -> None:
    start, stop = min(a, b), max(a, b) + b"\x00"
    view = topology("range", 1, cuts).keyspace("default")
    found = view.shards_in(start, stop)
    wanted = [s for s in view.shards if (s.stop is None or s.stop > start) and s.start < stop]
    assert found == wanted
    assert view.shards_in(start, None) == [s for s in view.shards if s.stop is None or s.stop > start]


def test_a_hole_in_a_keyspace_is_found() -> None:
    from shardkv.errors import LocalProtocolError

    whole = topology("hash", 4).keyspace("default")
    with pytest.raises(LocalProtocolError, match="do not cover it exactly once"):
        KeyspaceView("default", "hash", whole.shards[:1] + whole.shards[2:]).check()


def test_an_unknown_keyspace_is_named_with_those_that_exist() -> None:
    with pytest.raises(UnknownKeyspace, match="no keyspace 'users'; known keyspaces: default"):
        topology("hash", 2).keyspace("users")


def test_a_delta_changes_what_it_names_and_the_old_view_stays() -> None:
    before = topology("hash", 4)
    moved = before.shards[2]
    moved = type(moved)(moved.id, moved.keyspace, moved.start, moved.stop, moved.epoch + 1, "node-9")
    node = NodeDocument("node-9", "00", 1, "127.0.0.1:1", 2)
    after = before.with_entries(
        2,
        [
            ("shards/2", encode_document(moved)),
            ("nodes/node-9", encode_document(node)),
            ("nodes/node-1", None),
            ("of/the/future", b"\x01"),
        ],
    )
    assert (before.revision, after.revision) == (1, 2)
    assert before.keyspace("default").shards[1].node == "node-2"
    assert after.keyspace("default").shards[1] == moved
    assert after.nodes == {"node-9": node}


def test_the_cluster_document_is_kept_across_deltas() -> None:
    cluster = ClusterDocument("id", 3, "range", 4, [b"m"])
    view = Topology().with_entries(1, [(CLUSTER_KEY, encode_document(cluster))]).with_entries(2, [])
    assert view.cluster == cluster


def test_the_first_key_of_a_shard_is_its_own() -> None:
    view = topology("range", 1, [b"h", b"p"]).keyspace("default")
    assert [view.shard_for(key).id for key in (b"g\xff", b"h", b"h\x00", b"p")] == [1, 2, 2, 3]


def test_what_was_deleted_is_gone_from_the_next_view() -> None:
    node = NodeDocument("node-1", "s", 1, "127.0.0.1:1", 1)
    before = Topology().with_entries(1, [("nodes/node-1", encode_document(node))])
    assert before.with_entries(2, [("nodes/node-1", None)]).nodes == {}
    assert before.nodes == {"node-1": node}


def test_what_a_view_says_of_jobs_wishes_counters_and_settings() -> None:
    job = JobDocument(3, "move", asked={"shard": 1, "node": "node-2"}, attempts={1: Attempt(2, 70)})
    documents: dict[str, bytes] = {
        "jobs/3": encode_document(job),
        "wanted/node-2": encode_document(WantedDocument("node-2", state="draining")),
        "counters/job_id": encode_document(CounterDocument(4)),
        "settings/controller": encode_document(ControllerSettings(changes_per_node=5)),
    }
    view = Topology().with_entries(
        9, [(key, document, number) for number, (key, document) in enumerate(documents.items(), 1)]
    )
    assert view.jobs == {3: job}
    assert view.wanted["node-2"].state == "draining"
    assert view.counters["counters/job_id"].next == 4
    assert view.settings.changes_per_node == 5
    assert (view.revision_of("jobs/3"), view.revision_of("settings/controller"), view.revision_of("jobs/4")) == (
        1,
        4,
        0,
    )
    after = view.with_entries(10, [("jobs/3", None), ("settings/controller", None)])
    assert (after.jobs, after.settings, after.revision_of("jobs/3")) == ({}, ControllerSettings(), 0)


def test_a_keyspace_that_is_made_or_dropped_takes_no_requests() -> None:
    whole = topology("hash", 2)
    placing = KeyspaceDocument("default", "hash", placing=Placing(2, [], 1, ["node-1"]))
    for document in (placing, KeyspaceDocument("default", "hash", dropped=True)):
        after = whole.with_entries(2, [("keyspaces/default", encode_document(document))])
        assert after.keyspaces == {}
        assert len(after.shards) == 2
        again = after.with_entries(3, [("keyspaces/default", encode_document(KeyspaceDocument("default", "hash")))])
        assert again.keyspace("default").shards == whole.keyspace("default").shards


def test_a_keyspace_whose_document_came_before_its_shards_is_listed_once_they_are_there() -> None:
    whole = topology("hash", 2)
    first = Topology().with_entries(1, [("keyspaces/default", encode_document(KeyspaceDocument("default", "hash")))])
    assert first.keyspaces == {}
    after = first.with_entries(2, [(f"shards/{shard.id}", encode_document(shard)) for shard in whole.shards.values()])
    assert len(after.keyspace("default").shards) == 2
