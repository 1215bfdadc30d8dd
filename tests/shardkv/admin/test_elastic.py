"""A cluster that changes while it is written to, asked for through Admin: grow, shrink, move, split, merge, rebalance.

After each step every key has the last value that was acknowledged for it, and a scan tells each key once.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shardkv import Admin, InvalidArgument
from shardkv.admin import Job
from tests.worlds.cluster import ClusterWorld, cluster_world, until

GROW = Path(__file__).parents[3] / "configs" / "ops" / "grow_cluster.py"
KEYS = 600
JOB_TIMEOUT_S = 60.0


class Writer:
    """Overwrites keys, one after the other, and remembers what was acknowledged. `with` it runs in a thread."""

    def __init__(self, world: ClusterWorld) -> None:
        self._world = world
        self.acknowledged: dict[bytes, bytes] = {}
        self.failures: list[Exception] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        round_number = 0
        with self._world.client(timeout=20) as db:
            while not self._stop.is_set():
                round_number += 1
                for number in range(KEYS):
                    key, value = b"%03d" % number, b"%d-%d" % (number, round_number)
                    try:
                        db.put(key, value)
                        self.acknowledged[key] = value
                    except Exception as error:  # noqa: BLE001 - a test tells all of them
                        self.failures.append(error)
                    if self._stop.is_set():
                        return

    def check(self) -> None:
        """Requires: it has stopped."""
        assert not self.failures, self.failures[:3]
        assert len(self.acknowledged) > 50
        with self._world.client(timeout=20) as db:
            found = db.get_many(list(self.acknowledged))
            assert found == self.acknowledged
            keys = [key for key, _ in db.scan()]
        assert keys == sorted(self.acknowledged)


@pytest.fixture(params=["hash", "range"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ClusterWorld]:
    shape = ("--shards", "6") if request.param == "hash" else ("--split-at", "200", "--split-at", "400")
    with cluster_world(tmp_path, "--nodes", "2", "--partition", request.param, *shape) as started:
        yield started


def done(admin: Admin, job: Job) -> Job:
    ended = admin.wait_job(job.id, timeout=JOB_TIMEOUT_S)
    assert ended.state == "done", (ended, admin.status())
    return ended


def test_a_cluster_grows_and_shrinks_under_writes(world: ClusterWorld) -> None:
    with Admin(world.address) as admin:
        admin.change_settings(auto_split=False, auto_merge=False)
        with Writer(world) as writer:
            until(lambda: len(writer.acknowledged) > 100)
            added = admin.add_node()
            job = done(admin, admin.job(added.job))
            assert job.moves
            assert sorted(job.done) == sorted(move.shard for move in job.moves)
            shards = {node.name: node.shards for node in admin.nodes()}
            assert shards[added.node] == len(job.done)
            done(admin, admin.remove_node("node-1"))
            assert {shard.node for shard in admin.shards()} == {"node-2", added.node}
            until(lambda: "node-1" not in world.records(), what="the launcher stops what was removed")
        writer.check()
        assert admin.status().advice == []


def test_shards_are_moved_split_and_merged_under_writes(world: ClusterWorld) -> None:
    with Admin(world.address) as admin:
        admin.change_settings(auto_split=False, auto_merge=False)
        with Writer(world) as writer:
            until(lambda: len(writer.acknowledged) == KEYS)
            first = admin.shards()[0]
            other = next(node.name for node in admin.nodes() if node.name != first.node)
            done(admin, admin.move_shard(first.id, other))
            moved = admin.shards()[0]
            assert (moved.id, moved.node) == (first.id, other)
            assert moved.epoch > first.epoch
            split = done(admin, admin.split_shard(first.id))
            assert len(split.done) == 2
            assert first.id not in [shard.id for shard in admin.shards()]
            merged = done(admin, admin.merge_shards(*split.done))
            assert len(merged.done) == 1
            whole = admin.shards()[0]
            assert (whole.id, whole.start, whole.stop) == (merged.done[0], first.start, first.stop)
            left, right = admin.shards()[:2]
            assert left.node != right.node or admin.move_shard(right.id, "node-1")
            done(admin, admin.merge_shards(left.id, right.id))
        writer.check()


def test_a_move_of_a_job_that_is_cancelled_leaves_the_shard_where_it_was(world: ClusterWorld) -> None:
    with Admin(world.address) as admin, world.client(timeout=30) as db:
        db.put_many({b"%03d" % number: b"x" * 4000 for number in range(KEYS)})
        shard = admin.shards()[0]
        other = next(node.name for node in admin.nodes() if node.name != shard.node)
        job = admin.move_shard(shard.id, other, rate_bytes_s=1000)
        until(lambda: any(change.bytes_done for change in admin.job(job.id).changes), what="it ships")
        assert admin.pause_job(job.id).state == "paused"
        assert admin.cancel_job(job.id).state in ("cancelling", "cancelled")
        assert admin.wait_job(job.id).state == "cancelled"
        assert admin.shards()[0].node == shard.node
        assert len(list(db.scan(keys_only=True))) == KEYS


def test_a_dead_node_is_given_up_only_by_its_name(world: ClusterWorld) -> None:
    with Admin(world.address) as admin, world.client(timeout=30) as db:
        admin.change_settings(away_ms=2000)
        db.put_many({b"%03d" % number: b"x" for number in range(KEYS)})
        mine = [shard.id for shard in admin.shards() if shard.node == "node-2"]
        world.kill("launcher", "node-2")
        until(lambda: {n.name: n.state for n in admin.nodes()}["node-2"] == "not answering")
        with pytest.raises(InvalidArgument, match=f"only copy of {len(mine)} shards"):
            admin.remove_node("node-2", force=True)
        job = admin.remove_node("node-2")
        until(lambda: "Start it again" in admin.job(job.id).problem, timeout_s=30)
        admin.cancel_job(job.id)
        admin.wait_job(job.id)
        done(admin, admin.remove_node("node-2", accept_data_loss="node-2"))
        assert {shard.node for shard in admin.shards()} == {"node-1"}
        left = len(list(db.scan(keys_only=True)))
        assert 0 < left < KEYS
        db.put(b"%03d" % 1, b"again")


def test_the_script_that_grows_a_cluster(world: ClusterWorld) -> None:
    def grow(*options: str) -> str:
        command: list[Any] = [sys.executable, GROW, "--router", world.address, *options]
        finished = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
        assert finished.returncode == 0, finished.stdout + finished.stderr
        return finished.stdout

    with Writer(world) as writer:
        until(lambda: len(writer.acknowledged) > 100)
        assert "The cluster has 2 nodes" in grow("--nodes", "3", "--dry-run")
        told = grow("--nodes", "3")
        assert "node-3 is wanted" in told
        assert "(add) done" in told
        assert "node-3: " in told.splitlines()[-1]
        assert "(remove) done" in grow("--nodes", "2", "--rate", "100")
    writer.check()
