"""Disks that go wrong around changes of shards: the target's is full, a node starts on an old copy of its directory."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shardkv import Admin, Client
from shardkv.errors import ShardKVError
from tests.worlds.changes import status_of
from tests.worlds.cluster import until
from tests.worlds.history import Writer, check_scan
from tests.worlds.storm import CONFIG, left_over
from tests.worlds.wired_cluster import WiredCluster, wired_cluster

SMALL_DISK = "24m"
"""A store opens in it, and takes a few MB of rows."""
ROWS = {b"row-%05d" % number: b"%05d" % number * 1600 for number in range(3_000)}
"""24 MB that do not fit beside another shard."""


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[None]:
    """`path` is a disk of its own, of this size."""
    path.mkdir(parents=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("a small disk cannot be mounted here; run this test as root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_move_to_a_full_disk_is_given_up_and_the_shard_goes_on_where_it_was(tmp_path: Path) -> None:
    with (
        small_disk(tmp_path / "node-2", SMALL_DISK),
        wired_cluster(tmp_path, partition="hash", nodes=2, routers=1, config=CONFIG) as world,
    ):
        writers = [Writer(number, world.addresses, seed=3) for number in range(2)]
        with Admin(world.addresses) as admin, world.client(timeout=20) as db:
            _only_on(admin, "node-1")
            for first in range(0, len(ROWS), 100):
                db.put_many(dict(list(ROWS.items())[first : first + 100]))
            for writer in writers:
                writer.start()
            jobs = [admin.move_shard(one.id, "node-2").id for one in admin.shards()]
            until(lambda: any("disk" in one.problem.lower() for one in admin.shards()), timeout_s=60)
            for job in jobs:
                _cancel(admin, job)
            until(lambda: all(job.ended for job in admin.jobs()), timeout_s=60, what="all jobs ended")
            for writer in writers:
                writer.stop()
                writer.join(30)
                assert not writer.surprises, writer.surprises
            assert not any(writer.refused for writer in writers), "a full disk of the target refused writes"
            assert world.runs("node-2"), world.logs()
            until(lambda: not left_over(world), timeout_s=30, what="nothing left over")
            assert sum(writer.check(db) for writer in writers)
            assert dict(db.scan(prefix=b"row-")) == ROWS


def _cancel(admin: Admin, job: int) -> None:
    if not admin.job(job).ended:
        admin.cancel_job(job)


def _only_on(admin: Admin, node: str) -> None:
    for shard in admin.shards():
        if shard.node != node:
            assert admin.wait_job(admin.move_shard(shard.id, node).id).state == "done"


@pytest.mark.parametrize("starts", [1, pytest.param(3, marks=pytest.mark.long)])
def test_a_node_on_an_old_copy_of_its_directory_serves_nothing(tmp_path: Path, starts: int) -> None:
    """However often it is started; with the right directory it goes on as if nothing had been."""
    with wired_cluster(tmp_path, partition="hash", nodes=2, routers=1, config=CONFIG) as world:
        writers = [Writer(number, world.addresses, seed=4) for number in range(2)]
        here, copy, aside = (tmp_path / name for name in ("node-1", "copy", "aside"))
        with Admin(world.addresses) as admin, world.client(timeout=20) as db:
            db.put(b"still", b"old")
            world.kill("node-1")
            shutil.copytree(here, copy)
            world.restart("node-1")
            world.wait_serving()
            db.put(b"still", b"new")
            for writer in writers:
                writer.start()
            for shard in admin.shards():
                other = "node-2" if shard.node == "node-1" else "node-1"
                assert admin.wait_job(admin.move_shard(shard.id, other).id).state == "done"
            for writer in writers:
                writer.stop()
                writer.join(30)
            world.kill("node-1")
            here.rename(aside)
            shutil.copytree(copy, here)
            for _ in range(starts):
                world.restart("node-1")
                until(lambda: not world.runs("node-1"), timeout_s=30, what="the old copy is refused")
            assert "copy" in world.logs()
            _serves_nothing_old(world, writers)
            shutil.rmtree(here)
            aside.rename(here)
            world.restart("node-1")
            world.wait_serving()
            assert db.get(b"still") == b"new"
            db.delete(b"still")
            assert sum(writer.check(db) for writer in writers)
            check_scan(db, writers)
            until(lambda: not left_over(world), timeout_s=30, what="nothing left over")


def _serves_nothing_old(world: WiredCluster, writers: list[Writer]) -> None:
    with Client(world.addresses, timeout=0.2) as db:
        for writer in writers:
            for key, expected in list(writer.expected.items())[:15]:
                try:
                    found = db.get(key)
                except ShardKVError:
                    continue
                assert expected.allows(found), f"{key!r} holds {found!r}, not {expected.settled!r}"


def test_an_old_copy_that_is_started_beside_the_node_ends_and_changes_nothing(tmp_path: Path) -> None:
    """Two processes of one name: the right one goes on, or, had it ended, starts again."""
    with wired_cluster(tmp_path, partition="hash", nodes=2, routers=1, config=CONFIG) as world:
        here, copy = tmp_path / "node-1", tmp_path / "copy"
        with world.client(timeout=20) as db:
            world.kill("node-1")
            shutil.copytree(here, copy)
            world.restart("node-1")
            world.wait_serving()
            db.put_many(dict.fromkeys(ROWS, b"new"))
            world.add_process("stray", like="node-1", data_dir=copy)
            until(lambda: not world.runs("stray"), timeout_s=30, what="the old copy is refused")
            if not world.runs("node-1"):
                world.restart("node-1")
            world.wait_serving()
            time.sleep(0.2)
            assert set(db.get_many(list(ROWS)).values()) == {b"new"}
            assert status_of(world.proxies["node-1"].address)["missing"] == {}
            until(lambda: not left_over(world), timeout_s=30, what="nothing left over")
