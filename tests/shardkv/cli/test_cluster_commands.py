"""The commands that change a cluster, on a real one: what they print, as text and as JSON, and their exit codes."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shardkv import Admin
from tests.worlds.cluster import ClusterWorld, cluster_world, shardkv, until


@pytest.fixture(scope="module", params=["hash", "range"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterWorld]:
    shape = ("--shards", "4") if request.param == "hash" else ("--split-at", "3", "--split-at", "5", "--split-at", "7")
    options = ("--nodes", "2", "--partition", request.param, *shape)
    with cluster_world(tmp_path_factory.mktemp("commands"), *options) as started:
        with started.client(timeout=30) as db, Admin(started.address) as admin:
            db.put_many({f"{number:03d}": "x" * 1000 for number in range(1000)})
            admin.change_settings(auto_split=False, auto_merge=False)
        yield started


def run(world: ClusterWorld, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        shardkv(*arguments),
        env={**os.environ, "SHARDKV_ROUTER": world.address},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == code, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def told(world: ClusterWorld, *arguments: str, code: int = 0) -> Any:
    """What a command prints with --json."""
    return json.loads(run(world, *arguments, "--json", code=code).stdout)


def everything_is_there(world: ClusterWorld) -> None:
    with world.client(timeout=30) as db:
        assert [key for key, _ in db.scan()] == [b"%03d" % number for number in range(1000)]


def test_a_node_is_added_and_removed(world: ClusterWorld) -> None:
    out = run(world, "cluster", "add-node").stdout
    assert "Plan: " in out
    assert "node-3 has joined" in out
    assert "Added node-3" in out
    found = told(world, "shard", "list")["shards"]
    assert sum(shard["node"] == "node-3" for shard in found) >= 1
    everything_is_there(world)
    out = run(world, "cluster", "remove-node", "node-3").stdout
    assert "moved" in out
    assert "node-3 has nothing left, and is stopped" in out
    assert "There is no node" in run(world, "cluster", "remove-node", "node-9", code=2).stderr
    everything_is_there(world)
    until(lambda: "node-3" not in world.records())


def test_a_plan_is_shown_and_a_balanced_cluster_left_alone(world: ClusterWorld) -> None:
    while told(world, "cluster", "rebalance")["plan"]["moves"]:
        continue
    assert "nothing has to move" in run(world, "cluster", "rebalance").stdout
    before = len(told(world, "job", "list")["jobs"])
    assert told(world, "cluster", "rebalance", "--dry-run") == {
        "plan": told(world, "cluster", "rebalance", "--dry-run")["plan"],
        "job": None,
    }
    assert len(told(world, "job", "list")["jobs"]) == before


def test_a_shard_is_moved_split_and_merged(world: ClusterWorld) -> None:
    shard = told(world, "shard", "list", "--keyspace", "default")["shards"][0]
    other = "node-1" if shard["node"] == "node-2" else "node-2"
    moved = told(world, "shard", "move", str(shard["id"]), other, "--rate", "100")
    assert moved["job"]["state"] == "done"
    assert moved["job"]["rate_bytes_s"] == 100_000_000
    assert moved["plan"]["moves"] == [
        {"shard": shard["id"], "source": shard["node"], "target": other, "bytes": moved["plan"]["bytes"]}
    ]
    at = "1" if shard["partition"] == "range" else "1000000000000000"
    made = told(world, "shard", "split", str(shard["id"]), "--at", at)["job"]["done"]
    found = told(world, "shard", "list")["shards"]
    assert [each["start"] for each in found[:2]] == [shard["start"], at]
    assert [each["id"] for each in found[:2]] == made
    out = run(world, "shard", "merge", *map(str, made)).stdout
    assert "(merge) is done" in out
    assert "no shard" in run(world, "shard", "split", str(shard["id"]), code=2).stderr
    everything_is_there(world)


def test_keyspaces_are_made_listed_used_and_dropped_only_when_meant(world: ClusterWorld) -> None:
    partition = ("--partition", "range", "--split-at", "m")
    assert "Keyspace people is ready: range, 2 shards." in run(world, "keyspace", "create", "people", *partition).stdout
    run(world, "--keyspace", "people", "put", "ada", "1815")
    run(world, "put", "ada", "other")
    assert run(world, "get", "ada", "--keyspace", "people").stdout.strip() == "1815"
    run(world, "delete", "ada")
    assert [each["name"] for each in told(world, "keyspace", "list")["keyspaces"]] == ["default", "people"]
    assert "--yes" in run(world, "keyspace", "drop", "people", code=2).stderr
    assert told(world, "keyspace", "drop", "people", "--yes") == {"name": "people", "dropped": True}
    assert "no keyspace 'people'" in run(world, "get", "ada", "--keyspace", "people", code=2).stderr


def test_jobs_are_steered_and_end_with_their_exit_code(world: ClusterWorld) -> None:
    out = run(world, "cluster", "add-node", "--host", "10.1.2.3", "--no-wait")
    name = out.stdout.partition("Added ")[2].partition(";")[0]
    assert f"--name {name} --meta 127.0.0.1:" in out.stderr
    assert "cannot reach it: see docs/" in out.stderr
    job = str(told(world, "job", "list")["jobs"][-1]["id"])
    until(lambda: "has not joined yet" in run(world, "job", "show", job).stdout)
    assert told(world, "job", "pause", job)["state"] == "paused"
    status = run(world, "cluster", "status", "--router", world.address)
    assert f"`shardkv job resume {job}` goes on" in status.stdout
    assert "10.1.2.3" in status.stdout
    assert "is planned" in run(world, "job", "resume", job).stdout
    run(world, "job", "cancel", job)
    run(world, "job", "watch", job, code=1)
    assert "is cancelled" in run(world, "job", "pause", job, code=2).stderr
    assert "There is no job 99999" in run(world, "job", "show", "99999", code=2).stderr
    run(world, "cluster", "remove-node", name)


def test_status_of_the_data_directory_tells_nodes_and_what_they_carry(world: ClusterWorld) -> None:
    found = told(world, "cluster", "status", "--data-dir", str(world.data_dir))
    nodes = {node["name"]: node for node in found["cluster"]["nodes"]}
    assert nodes["node-1"]["shards"] + nodes["node-2"]["shards"] == 4
    assert nodes["node-1"]["bytes"] > 0
    assert nodes["node-1"]["host"]
    text = run(world, "cluster", "status", "--data-dir", str(world.data_dir)).stdout
    assert "What to do next" not in text


def test_settings_are_shown_and_changed(world: ClusterWorld) -> None:
    assert "auto_split = false" in run(world, "cluster", "settings").stdout
    assert told(world, "cluster", "settings", "changes_per_node=3")["changes_per_node"] == 3
    assert "is not NAME=VALUE" in run(world, "cluster", "settings", "changes_per_node", code=2).stderr
    assert "no setting 'speed'" in run(world, "cluster", "settings", "speed=1", code=2).stderr


def test_a_rolling_restart(world: ClusterWorld) -> None:
    done = told(world, "cluster", "restart", "--rolling", "--data-dir", str(world.data_dir))["restarted"]
    assert [each["name"] for each in done] == ["node-1", "node-2", "router-1", "meta"]
    assert "Say --rolling" in run(world, "cluster", "restart", code=2).stderr
    everything_is_there(world)


def test_the_data_directory_names_the_router(world: ClusterWorld) -> None:
    done = subprocess.run(
        shardkv("job", "list", "--json", "--data-dir", str(world.data_dir)),
        env={name: value for name, value in os.environ.items() if name != "SHARDKV_ROUTER"},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert "jobs" in json.loads(done.stdout)


def test_without_a_cluster_the_commands_say_so(tmp_path: Path) -> None:
    for command in (("job", "list"), ("cluster", "rebalance"), ("keyspace", "list")):
        done = subprocess.run(
            shardkv(*command, "--router", "127.0.0.1:1", "--timeout", "0.2"),
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == 3
        assert "was not reached" in done.stderr


def test_a_node_of_another_host_joins_with_the_command_that_is_printed(world: ClusterWorld, tmp_path: Path) -> None:
    asking = subprocess.Popen(
        shardkv("cluster", "add-node", "--host", "127.0.0.1", "--json", "--router", world.address),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert asking.stderr is not None
    assert asking.stderr.readline().startswith("Run this on 127.0.0.1")
    printed = shlex.split(asking.stderr.readline())
    printed[printed.index("--data-dir") + 1] = str(tmp_path / "far")
    node = subprocess.Popen([*shardkv(), *printed[1:]], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        out, _ = asking.communicate(timeout=60)
        assert asking.returncode == 0
        found = json.loads(out)
        name = found["added"][0]["node"]
        assert [job["state"] for job in found["jobs"]] == ["done"]
        assert name not in world.records()
        removed = run(world, "cluster", "remove-node", name).stdout
        assert "has nothing left: stop it on" in removed
        everything_is_there(world)
    finally:
        node.terminate()
        node.wait(20)
