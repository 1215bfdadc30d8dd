"""What is started: the shape of a new cluster, of one that exists, and the command lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardkv.config import load_config
from shardkv.errors import LaunchError
from shardkv.launcher.plan import Plan, make_plan, process_specs
from shardkv.launcher.state import ClusterFile, Layout, ProcessesFile, ProcessRecord
from shardkv.launcher.summary import Started, summary

MADE = ClusterFile(nodes=2, partition="range", shards=3, split_at=["g", "p"], port=7500, meta_port=17500)


def plan(tmp_path: Path, known: ClusterFile | None = None, **options: object) -> Plan:
    config = load_config(None, {name.replace("__", "."): value for name, value in options.items()})
    return make_plan(config, Layout(tmp_path), known, None)


def test_what_is_not_asked_for_is_as_it_was_made(tmp_path: Path) -> None:
    assert plan(tmp_path, MADE).file == MADE
    assert plan(tmp_path, MADE, cluster__port=7600).file.port == 7600


def test_asking_for_what_it_is_changes_nothing(tmp_path: Path) -> None:
    same = {"cluster__nodes": 2, "cluster__partition": "range", "cluster__split_at": ["p", "g"]}
    assert plan(tmp_path, MADE, **same).file == MADE
    assert plan(tmp_path, MADE, cluster__shards=3).file == MADE


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"cluster__nodes": 3},
            "2 nodes; --nodes does not change that. Leave it out: once the cluster is up, `shardkv cluster add-node`",
        ),
        ({"cluster__nodes": 1}, "was made with 2 nodes"),
        ({"cluster__shards": 8}, "partition range and 3 shards, split at g, p; these are fixed"),
        ({"cluster__partition": "hash"}, "partition range and 3 shards"),
        ({"cluster__partition": "range", "cluster__split_at": ["g", "q"]}, "split at g, p"),
    ],
)
def test_another_shape_than_it_was_made_in_is_refused(tmp_path: Path, options: dict[str, object], said: str) -> None:
    with pytest.raises(LaunchError) as caught:
        plan(tmp_path, MADE, **options)
    assert said in str(caught.value)
    assert "--data-dir" in str(caught.value)


def test_nodes_that_were_added_and_removed_since_are_remembered(tmp_path: Path) -> None:
    records = [
        ProcessRecord(name=name, role="node", command=[], pid=0, birth="", state="stopped")
        for name in ("node-1", "node-7")
    ]
    before = ProcessesFile(bind="127.0.0.1", processes=records, removed=["node-2"])
    config = load_config(None, {"cluster.nodes": 2})
    known = make_plan(config, Layout(tmp_path), MADE, None, before)
    assert known.nodes == ("node-1", "node-7")
    assert [spec.name for spec in process_specs(known)] == ["meta", "node-1", "node-7", "router-1"]
    more = ProcessesFile(bind="127.0.0.1", processes=records)
    assert make_plan(load_config(None, {"cluster.nodes": 3}), Layout(tmp_path), MADE, None, more).nodes == (
        "node-1",
        "node-2",
        "node-7",
    )
    with pytest.raises(LaunchError, match="and has 3 now"):
        make_plan(load_config(None, {"cluster.nodes": 4}), Layout(tmp_path), MADE, None, more)


def test_only_routers_listen_where_others_can_reach_them(tmp_path: Path) -> None:
    wanted = plan(tmp_path, cluster__bind="0.0.0.0", cluster__insecure=True, cluster__nodes=1, cluster__routers=2)
    meta, node, *routers = process_specs(wanted)
    for inner in (meta, node):
        assert "0.0.0.0" not in inner.command
        assert "--insecure" not in inner.command
    assert [router.name for router in routers] == ["router-1", "router-2"]
    assert all({"0.0.0.0", "--insecure", "--reuse-port"} <= set(router.command) for router in routers)
    assert wanted.address == f"127.0.0.1:{wanted.file.port}"


def test_one_router_does_not_share_its_port(tmp_path: Path) -> None:
    assert "--reuse-port" not in process_specs(plan(tmp_path))[-1].command


def test_the_ports_kept_are_below_those_the_system_hands_out(tmp_path: Path) -> None:
    wanted = plan(tmp_path, cluster__port=0)
    assert 1024 <= wanted.file.port < 32768
    assert wanted.file.meta_port != wanted.file.port


def test_port_0_is_a_free_port_that_the_cluster_keeps(tmp_path: Path) -> None:
    made = plan(tmp_path, cluster__port=0).file
    assert made.port not in (0, 7400)
    assert plan(tmp_path, made, cluster__port=0).file.port == made.port


def test_a_port_that_was_not_asked_for_is_told_to_be_that_of_the_last_start(tmp_path: Path) -> None:
    told = summary(Started(plan(tmp_path, MADE), {}, {}, [], 1.0))
    assert "127.0.0.1:7500 (port as at the last start)\n" in told
    for fresh in (plan(tmp_path), plan(tmp_path, MADE, cluster__port=7500)):
        assert "last start" not in summary(Started(fresh, {}, {}, [], 1.0))
