"""Plans: balanced where sizes allow it, each shard moved at most once, nothing moved that need not be."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shardkv.control.planner import Plan, ShardLoad, plan_drain, plan_rebalance

NODES = ["n1", "n2", "n3", "n4"]


@st.composite
def clusters(draw: st.DrawFn) -> tuple[list[ShardLoad], list[str]]:
    nodes = NODES[: draw(st.integers(1, 4))]
    sizes = draw(st.lists(st.integers(0, 1000) | st.integers(0, 20), max_size=40))
    loads = draw(st.lists(st.integers(0, 500), min_size=len(sizes), max_size=len(sizes)))
    owners = draw(st.lists(st.sampled_from(nodes), min_size=len(sizes), max_size=len(sizes)))
    return [ShardLoad(*each) for each in zip(range(1, 99), owners, sizes, loads, strict=False)], nodes


def after(shards: list[ShardLoad], plan: Plan) -> list[ShardLoad]:
    where = {move.shard: move.target for move in plan.moves}
    return [ShardLoad(each.shard, where.get(each.shard, each.node), each.bytes, each.ops_s) for each in shards]


@given(clusters())
def test_a_plan_ends_balanced_as_far_as_shard_sizes_allow(
    cluster: tuple[list[ShardLoad], list[str]],
) -> None:
    shards, nodes = cluster
    plan = plan_rebalance(shards, nodes)
    moved = [move.shard for move in plan.moves]
    assert len(moved) == len(set(moved))
    assert all(move.source != move.target and move.target in nodes for move in plan.moves)
    mean = sum(plan.after.values()) / len(nodes)
    largest = max((each.bytes for each in shards), default=0)
    slack = 0.1 * mean + max(largest, sum(plan.after.values()) / 100) + 2
    assert all(abs(size - mean) <= slack for size in plan.after.values()), plan
    assert sum(plan.before.values()) == sum(plan.after.values())


@given(clusters())
def test_plans_for_bytes_come_to_an_end(cluster: tuple[list[ShardLoad], list[str]]) -> None:
    shards = [ShardLoad(each.shard, each.node, each.bytes) for each in cluster[0]]
    for _ in range(5):
        plan = plan_rebalance(shards, cluster[1])
        if not plan.moves:
            return
        shards = after(shards, plan)
    raise AssertionError(f"still moving: {plan}")


@given(st.integers(2, 4), st.integers(4, 30), st.randoms(use_true_random=False))
def test_equal_shards_end_within_ten_percent_or_one_shard(count: int, each_has: int, rng: object) -> None:
    nodes = NODES[:count]
    shards = [ShardLoad(number, rng.choice(nodes), 100) for number in range(each_has * count)]  # type: ignore[attr-defined]
    plan = plan_rebalance(shards, nodes)
    mean = 100 * each_has
    assert all(abs(size - mean) <= max(0.1 * mean, 100) for size in plan.after.values())
    excess = sum(max(0, plan.before[name] - mean) for name in nodes)
    assert plan.bytes <= excess + 100 * count
    assert plan_rebalance(after(shards, plan), nodes).moves == []


def test_a_balanced_cluster_is_left_alone() -> None:
    shards = [ShardLoad(number, NODES[number % 4], 100 + number % 3) for number in range(40)]
    assert plan_rebalance(shards, NODES).moves == []
    assert plan_rebalance([], NODES).moves == []
    assert plan_rebalance([], []).moves == []


def test_a_new_node_gets_its_share_and_nothing_moves_between_the_others() -> None:
    shards = [ShardLoad(number, NODES[number % 3], 1000) for number in range(36)]
    plan = plan_rebalance(shards, NODES, only_to="n4", rate_bytes_s=1000)
    assert plan.after == {"n1": 9000, "n2": 9000, "n3": 9000, "n4": 9000}
    assert {move.target for move in plan.moves} == {"n4"}
    assert (plan.bytes, plan.eta_s) == (9000, 9.0)


def test_empty_shards_are_dealt_by_number() -> None:
    shards = [ShardLoad(number, "n1", 0) for number in range(8)]
    assert len(plan_rebalance(shards, ["n1", "n2"]).moves) == 4


def test_load_is_balanced_within_what_bytes_allow() -> None:
    shards = [ShardLoad(number, NODES[number // 4], 1000, 1000.0 if number < 4 else 1.0) for number in range(8)]
    plan = plan_rebalance(shards, NODES[:2])
    moved = after(shards, plan)
    assert [sum(each.ops_s for each in moved if each.node == name) for name in NODES[:2]] == [2002.0, 2002.0]
    assert plan.after == {"n1": 4000, "n2": 4000}


def test_no_more_moves_than_are_asked_for() -> None:
    shards = [ShardLoad(number, "n1", 100) for number in range(10)]
    assert len(plan_rebalance(shards, ["n1", "n2"], moves_max=2).moves) == 2


@given(clusters())
def test_a_drained_node_keeps_only_what_is_left_out(cluster: tuple[list[ShardLoad], list[str]]) -> None:
    shards, nodes = cluster
    if len(nodes) < 2:
        return
    left_out = {each.shard for each in shards[:2]}
    plan = plan_drain(shards, "n1", nodes, leave_out=left_out)
    assert {move.shard for move in plan.moves} == {each.shard for each in shards if each.node == "n1"} - left_out
    assert all(move.target != "n1" for move in plan.moves)
