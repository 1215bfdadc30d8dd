"""The incarnation rises durably with every start, and a directory is taken for no other node's or cluster's."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardkv.errors import StoreMismatch
from shardkv_node.identity import NodeIdentity


def test_every_start_has_a_number_of_its_own_even_when_it_got_no_further(tmp_path: Path) -> None:
    for start in (1, 2, 3):
        identity = NodeIdentity(str(tmp_path), "node-1")
        assert identity.begin() == start - 1
        assert identity.incarnation == start


def test_a_directory_stays_with_its_cluster_and_its_node(tmp_path: Path) -> None:
    identity = NodeIdentity(str(tmp_path), "node-1")
    identity.begin()
    identity.join("cluster-a", 1)
    again = NodeIdentity(str(tmp_path), "node-1")
    assert (again.cluster_id, again.incarnation) == ("cluster-a", 1)
    with pytest.raises(StoreMismatch, match="belongs to cluster cluster-a"):
        again.join("cluster-b", 2)
    with pytest.raises(StoreMismatch, match="belongs to node 'node-1', not to 'node-2'"):
        NodeIdentity(str(tmp_path), "node-2")


def test_a_directory_knows_the_starts_it_drew_since_the_last_one_that_was_registered(tmp_path: Path) -> None:
    drawn = []
    for _ in range(3):
        identity = NodeIdentity(str(tmp_path), "node-1")
        identity.begin()
        drawn.append(identity.start_id)
    assert len(set(drawn)) == 3
    assert NodeIdentity(str(tmp_path), "node-1").start_ids == drawn
    identity.registered()
    assert NodeIdentity(str(tmp_path), "node-1").start_ids == drawn[-1:]
