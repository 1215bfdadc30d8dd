"""What a node answers for, and how it refuses the rest."""

from __future__ import annotations

import pytest

from shardkv.errors import ShardFenced, ShardUnavailable, StaleEpoch, WrongShard
from shardkv_node.ownership import Expected, Ownership


def serving() -> Ownership:
    ownership = Ownership("node-1")
    ownership.serve(7, 3, 40)
    return ownership


def test_a_shard_is_answered_for_at_its_epoch_only() -> None:
    ownership = serving()
    assert ownership.tablet_of(7, 3) == 40
    for epoch in (2, 4, None):
        with pytest.raises(StaleEpoch):
            ownership.tablet_of(7, epoch)
    for shard in (8, None):
        with pytest.raises(WrongShard):
            ownership.tablet_of(shard, 3)


def test_a_fenced_shard_is_refused_until_it_is_served_at_another_epoch() -> None:
    ownership = serving()
    ownership.fence(7, 3)
    with pytest.raises(ShardFenced):
        ownership.tablet_of(7, 3)
    ownership.serve(7, 4, 40)
    assert ownership.tablet_of(7, 4) == 40
    with pytest.raises(StaleEpoch):
        ownership.tablet_of(7, 3)


def test_who_asks_too_early_is_told_to_wait_and_who_asks_for_what_is_lost_is_not() -> None:
    ownership, settled = serving(), []
    ownership.on_settled = lambda: settled.append(1)
    ownership.expect([8], "c0ffee")
    with pytest.raises(Expected):
        ownership.tablet_of(8, 2)
    with pytest.raises(Expected):
        ownership.require_settled([(7, 3, 1), (8, 2, 1)])
    ownership.settle({"c0ffee"})
    assert not settled
    ownership.serve(8, 2, 41)
    ownership.settle(set())
    assert (settled, ownership.tablet_of(8, 2)) == ([1], 41)
    ownership.lose(8, "Shard 8 has no tablet.")
    with pytest.raises(ShardUnavailable, match="no tablet"):
        ownership.tablet_of(8, 2)


def test_requested_keys_are_counted() -> None:
    ownership = serving()
    ownership.tablet_of(7, 3)
    ownership.count_more(7, 9)
    ownership.serve(7, 4, 40)
    ownership.tablet_of(7, 4)
    assert ownership.asked() == {7: (40, 11)}
