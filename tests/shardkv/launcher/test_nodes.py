"""Nodes that are added to and removed from a launched cluster, and a rolling restart, on real processes."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from shardkv import Admin
from shardkv.errors import LaunchError
from shardkv.launcher.rolling import restart_rolling
from shardkv.launcher.state import Layout, birth_of
from tests.worlds.cluster import ClusterWorld, cluster_world, until

CONFIG = """
[launcher]
restart_first_ms = 20
restart_most_ms = 100
"""


def nodes(world: ClusterWorld) -> list[str]:
    return [name for name, record in world.records().items() if record["role"] == "node"]


def test_what_was_added_and_removed_outlives_the_launcher(tmp_path: Path) -> None:
    with cluster_world(tmp_path, "--nodes", "2", "--shards", "4", config=CONFIG) as world:
        with Admin(world.address) as admin:
            added = admin.add_node(rebalance=False)
            admin.wait_joined(added.node)
            assert nodes(world) == ["node-1", "node-2", "node-3"]
            was = world.pid("node-2")
            assert admin.wait_job(admin.remove_node("node-2").id, timeout=60).state == "done"
            until(lambda: nodes(world) == ["node-1", "node-3"])
            assert birth_of(was) is None
            world.kill("node-3")
            until(lambda: admin.nodes()[-1].incarnation == 2, what="an added node is supervised")
        kept = world.pid("node-3")
        world.kill("launcher")
        world.start()
        assert world.pid("node-3") == kept
        assert nodes(world) == ["node-1", "node-3"]
        world.close()
        world.start()
        assert sorted(nodes(world)) == ["node-1", "node-3"]
        assert world.pid("node-3") != kept
        assert (world.data_dir / "node-2").is_dir()


def test_what_changed_while_there_was_no_launcher_is_made_up_for(tmp_path: Path) -> None:
    shape = ("--nodes", "2", "--shards", "4")
    with cluster_world(tmp_path, *shape, config=CONFIG) as world, Admin(world.address) as admin:
        world.kill("launcher")
        added = admin.add_node(rebalance=False)
        assert admin.wait_job(admin.remove_node("node-1").id, timeout=60).state == "done"
        was = world.pid("node-1")
        world.start()
        admin.wait_joined(added.node)
        until(lambda: nodes(world) == ["node-2", "node-3"])
        assert birth_of(was) is None


def test_a_rolling_restart_fails_no_call(tmp_path: Path) -> None:
    with cluster_world(tmp_path, "--nodes", "2", "--shards", "4", config=CONFIG) as world:
        before = {name: world.pid(name) for name in world.records()}
        stop, made, failed = threading.Event(), [0], list[Exception]()

        def work(worker: int) -> None:
            with world.client() as db:
                while not stop.is_set():
                    key = b"%d-%d" % (worker, made[0])
                    try:
                        db.put(key, key)
                        assert db.get(key) == key
                        assert len(db.get_many([b"%d-%d" % (worker, n) for n in range(20)])) == 20
                        made[0] += 1
                    except Exception as error:  # noqa: BLE001 - a test tells all of them
                        failed.append(error)

        workers = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for worker in workers:
            worker.start()
        until(lambda: made[0] > 10)
        told: list[str] = []
        done = restart_rolling(
            Layout(world.data_dir), timeout_s=60, on_restarted=lambda restarted: told.append(restarted.name)
        )
        stop.set()
        for worker in workers:
            worker.join()
        assert not failed, failed[:3]
        assert told == ["node-1", "node-2", "router-1", "meta"]
        assert {each.name: each.pid for each in done} == {name: world.pid(name) for name in before}
        assert all(each.pid != before[each.name] for each in done)
        assert {record["restarts"] for record in world.records().values()} == {0}
        assert world.status()["state"] == "serving"


def test_a_rolling_restart_begins_only_where_all_is_well(tmp_path: Path) -> None:
    with cluster_world(tmp_path, "--nodes", "1", "--shards", "2") as world:
        world.kill("launcher")
        before = world.pid("node-1")
        with pytest.raises(LaunchError, match="has no launcher"):
            restart_rolling(Layout(world.data_dir), timeout_s=5, on_restarted=print)
        assert birth_of(before) is not None
