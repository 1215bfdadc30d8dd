"""What each admin verb drafts, what it refuses and why, and what people are told: pure functions."""

from __future__ import annotations

from typing import Any

import pytest

from shardkv.control.asking import VERBS, next_node_name, plan
from shardkv.control.reports import ChangeReport
from shardkv.control.told import tell_job, tell_nodes, tell_shards, tell_status
from shardkv.errors import InvalidArgument
from shardkv.topology.documents import Change, JobDocument, PlannedMove, ShardDocument, WantedDocument, encode_document
from shardkv.topology.view import Topology
from tests.shardkv.admin.world import SHARD_BYTES, after, made, situation


def asked(topology: Topology, verb: str, *, silent: tuple[str, ...] = (), **arguments: Any) -> tuple[Topology, Any]:
    """The topology after a verb, and its answer."""
    txn, answer = VERBS[verb](situation(topology, silent=silent), arguments, 77)
    return after(topology, txn), answer


def refused(topology: Topology, verb: str, *, silent: tuple[str, ...] = (), **arguments: Any) -> str:
    with pytest.raises(InvalidArgument) as caught:
        asked(topology, verb, silent=silent, **arguments)
    return str(caught.value)


@pytest.mark.parametrize("partition", ["hash", "range"])
def test_each_kind_of_job_is_written_down_under_the_next_id(partition: str) -> None:
    topology = made(partition=partition)
    at = 2**62 + 5 if partition == "hash" else b"010"
    for number, (verb, arguments, kind) in enumerate(
        [
            ("add_node", {}, "add"),
            ("remove_node", {"name": "node-2"}, "remove"),
            ("rebalance", {"moves_max": 3, "rate_bytes_s": 5}, "rebalance"),
            ("split_shard", {"shard": 2, "at": at}, "split"),
            ("merge_shards", {"left": 3, "right": 4}, "merge"),
        ],
        start=1,
    ):
        topology, answer = asked(topology, verb, **arguments)
        assert answer["job"] == number
        assert topology.jobs[number].kind == kind
        assert topology.jobs[number].created_ms == 77
    assert topology.jobs[3].rate_bytes_s == 5
    assert topology.jobs[4].asked["at"] == at
    assert topology.wanted["node-3"].state == "active"
    assert topology.wanted["node-2"].state == "draining"


def test_neighbours_may_be_named_in_any_order() -> None:
    topology, _ = asked(made(), "merge_shards", left=3, right=2)
    assert topology.jobs[1].asked == {"left": 2, "right": 3}


def test_a_node_is_named_after_the_highest_number_that_was_ever_used() -> None:
    topology = made(nodes=3)
    assert next_node_name(topology) == "node-4"
    gone = encode_document(WantedDocument("node-9", state="removed"))
    assert next_node_name(topology.with_entries(11, [("wanted/node-9", gone)])) == "node-10"
    assert next_node_name(made(nodes=1), ["node-5"]) == "node-6"


@pytest.mark.parametrize(
    ("verb", "arguments", "said"),
    [
        ("add_node", {"name": "node-1"}, "There is a node node-1 already"),
        ("add_node", {"name": "a/b"}, "cannot name a node"),
        ("add_node", {"hosts": "x"}, "cannot be understood"),
        ("remove_node", {"name": "node-7"}, "There is no node node-7"),
        ("remove_node", {}, "`name`"),
        ("remove_node", {"name": "node-1", "accept_data_loss": "node-2"}, "but 'node-1' is to be removed"),
        ("rebalance", {"moves_max": 0}, "at least one move"),
        ("rebalance", {"rate_bytes_s": -1}, "bytes a second"),
        ("move_shard", {"shard": 1, "node": "node-1"}, "on node node-1 already"),
        ("move_shard", {"shard": 9, "node": "node-1"}, "There is no shard 9"),
        ("split_shard", {"shard": 1, "at": 0}, "not inside of it"),
        ("split_shard", {"shard": 1, "at": b"key"}, "not inside of it"),
        ("merge_shards", {"left": 1, "right": 3}, "no neighbours"),
        ("create_keyspace", {"name": "default"}, "exists"),
        ("create_keyspace", {"name": "a/b"}, "cannot name a keyspace"),
        ("create_keyspace", {"name": "a", "split_at": [b"m"]}, "only a range keyspace"),
        ("create_keyspace", {"name": "a", "partition": "list"}, "Invalid enum value"),
        ("drop_keyspace", {"name": "none"}, "There is no keyspace"),
        ("pause_job", {"job": 1}, "There is no job 1"),
        ("change_settings", {"changed": {"speed": 1}}, "There is no setting 'speed'"),
        ("change_settings", {"changed": {"changes_per_node": 0}}, "cannot be 0"),
        ("change_settings", {"changed": {"auto_split": 3}}, "wrong kind of value"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(verb: str, arguments: dict[str, Any], said: str) -> None:
    assert said in refused(made(), verb, **arguments)


def test_a_silent_node_with_the_only_copy_is_not_removed_by_force_alone() -> None:
    topology = made()
    told = refused(topology, "remove_node", silent=("node-2",), name="node-2", force=True)
    assert "has the only copy of 2 shards" in told
    assert "--accept-data-loss node-2" in told
    asked(topology, "remove_node", name="node-2", force=True)  # it is there, so nothing is lost
    asked(topology, "remove_node", silent=("node-2",), name="node-2")  # is waited for
    accepted, _ = asked(
        topology, "remove_node", silent=("node-2",), name="node-2", force=True, accept_data_loss="node-2"
    )
    assert accepted.jobs[1].asked == {"node": "node-2", "accept_data_loss": "node-2"}


def test_settings_change_only_where_asked() -> None:
    topology, answer = asked(made(), "change_settings", changed={"auto_split": False, "rate_bytes_s": 0})
    topology, answer = asked(topology, "change_settings", changed={"changes_per_node": 4})
    assert topology.settings.auto_split is False
    assert topology.settings.changes_per_node == 4
    assert answer["settings"]["auto_split"] is False


def test_a_plan_for_more_nodes_moves_each_shard_once_and_fills_all_of_them() -> None:
    told = plan(situation(made(nodes=2, shards=16)), {"kind": "add", "count": 2, "rate_bytes_s": SHARD_BYTES})
    assert len({move.shard for move in told.moves}) == len(told.moves) == 8
    assert {move.target for move in told.moves} == {"node-3", "node-4"}
    assert set(told.after.values()) == {4 * SHARD_BYTES}
    assert told.bytes == 8 * SHARD_BYTES
    assert told.eta_s == 4.0


def test_a_plan_to_remove_empties_the_node() -> None:
    told = plan(situation(made(nodes=3, shards=6)), {"kind": "remove", "node": "node-2"})
    assert {move.source for move in told.moves} == {"node-2"}
    assert told.after["node-2"] == 0


def test_a_job_tells_how_far_its_bytes_are_and_what_is_left() -> None:
    topology = made(nodes=2, shards=4)
    change = Change("c", "move", 1, 1, "node-2", 1)
    moves = [PlannedMove(1, "node-1", "node-2", SHARD_BYTES), PlannedMove(3, "node-1", "node-2", SHARD_BYTES)]
    job = JobDocument(1, "rebalance", "running", moves=moves, done=[3])
    shard = ShardDocument(1, "default", 0, 2**62, 1, "node-1", change=change)
    topology = topology.with_entries(11, [("jobs/1", encode_document(job)), ("shards/1", encode_document(shard))])
    under_way = ChangeReport("c", 1, "ship", bytes_done=600, bytes_total=1200, bytes_s=250_000)
    told = tell_job(situation(topology, changes={"node-2": [under_way]}), job)
    assert (told.bytes_done, told.bytes_total) == (SHARD_BYTES * 3 // 2, 2 * SHARD_BYTES)
    assert told.eta_s == 2.0
    assert told.changes == [under_way]
    (told_shard, *_) = tell_shards(situation(topology, changes={"node-2": [under_way]}))
    assert told_shard.change is not None
    assert (told_shard.change.phase, told_shard.change.target) == ("ship", "node-2")


def test_nodes_that_are_not_as_they_should_be_come_with_advice() -> None:
    topology = made(nodes=2)
    wanted = encode_document(WantedDocument("node-3", "10.0.0.3", started_by="operator"))
    topology = topology.with_entries(11, [("wanted/node-3", wanted)])
    told = tell_status(situation(topology, silent=("node-1",)))
    assert [node.state for node in told.nodes] == ["not answering", "serving", "not joined"]
    assert told.nodes[0].bytes is None
    assert told.nodes[1].bytes == 2 * SHARD_BYTES
    assert "has the only copy of 2 shards" in told.advice[0]
    assert "start it on host 10.0.0.3" in told.advice[1]
    assert tell_status(situation(made())).advice == []


def test_a_removed_node_that_is_gone_is_told_as_removed() -> None:
    gone = encode_document(WantedDocument("node-2", state="removed"))
    topology = made(nodes=2).with_entries(11, [("wanted/node-2", gone)])
    states = {node.name: node.state for node in tell_nodes(situation(topology, silent=("node-2",)))}
    assert states == {"node-1": "serving", "node-2": "removed"}
