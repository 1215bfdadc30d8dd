"""Shards move while they are read, written and scanned: nothing is lost or doubled, and one node has each."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.worlds.changes import SMALL, Load, Meta, check_owners, status_of, still_rows
from tests.worlds.cluster import until
from tests.worlds.wired_cluster import WiredCluster, wired_cluster

CONFIG = SMALL + "\n[node]\nfence_abort_ms = 15000\n"
"""No change is given up because the machine is busy."""
RATE = 100_000
BURST_BYTES = 1 << 20
"""The first piece comes at once, and it is as large as a table."""


@pytest.fixture(params=["hash", "range"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[WiredCluster]:
    with wired_cluster(tmp_path, partition=request.param, nodes=2, routers=2, config=CONFIG) as found:
        try:
            yield found
        except BaseException as error:
            error.add_note(found.logs())
            raise


def test_moves_under_load_lose_and_repeat_nothing(world: WiredCluster) -> None:
    meta, load = Meta(world.proxies["meta"].address), Load(world, seed=7)
    load.start()
    for there in ("node-2", "node-1", "node-2"):
        for shard in [one.id for one in meta.topology().shards.values() if one.node != there]:
            done = meta.wait_over(shard, meta.move(shard, there))
            assert done is not None
            assert (done.node, done.problem) == (there, "")
    until(lambda: load.scans.counts > 1 or load.scans.surprises, timeout_s=60)
    load.stop()
    refused = [writer.refused for writer in load.writers]
    assert not any(refused), f"calls did not outlast a move: {refused}"
    check_owners(world, meta)


def test_splits_and_merges_under_load_lose_and_repeat_nothing(world: WiredCluster) -> None:
    meta, load = Meta(world.proxies["meta"].address), Load(world, seed=8)
    load.start()
    for shard in list(meta.topology().shards.values()):
        middle = shard.start + 2**61 if isinstance(shard.start, int) else (shard.start or b"0") + b"-still-01"
        assert meta.wait_over(shard.id, meta.split(shard.id, middle)) is None
        halves = [one.id for one in meta.topology().shards.values() if shard.id in one.parents]
        assert len(halves) == 2
        assert meta.wait_over(halves[0], meta.merge(*halves)) is None
    until(lambda: load.scans.counts > 1 or load.scans.surprises, timeout_s=60)
    load.stop()
    refused = [writer.refused for writer in load.writers]
    assert not any(refused), f"calls did not outlast a split or merge: {refused}"
    check_owners(world, meta)


def test_an_aborted_move_leaves_the_shard_where_it_was(world: WiredCluster) -> None:
    meta, rows = Meta(world.proxies["meta"].address), still_rows()
    with world.client(timeout=20) as db:
        db.put_many(rows)
        shard = next(one.id for one in meta.topology().shards.values() if one.node == "node-1")
        change = meta.move(shard, "node-2", rate_bytes_s=1)
        meta.abort(shard, change)
        done = meta.wait_over(shard, change)
        assert done is not None
        assert (done.node, done.epoch) == ("node-1", 2)
        check_owners(world, meta)
        assert dict(db.scan()) == rows
        again = meta.wait_over(shard, meta.move(shard, "node-2"))
        assert again is not None
        assert (again.node, again.problem) == ("node-2", "")
        assert dict(db.scan()) == rows
    check_owners(world, meta)


@pytest.mark.parametrize("world", ["hash"], indirect=True)
def test_a_move_keeps_to_its_rate_and_ships_nothing_while_it_is_paused(world: WiredCluster) -> None:
    meta, rng = Meta(world.proxies["meta"].address), random.Random(3)
    rows = {b"big-%04d" % number: rng.randbytes(4000) for number in range(800)}
    with world.client(timeout=20) as db:
        db.put_many(rows)
    shard = next(one.id for one in meta.topology().shards.values() if one.node == "node-1")
    change, began = meta.move(shard, "node-2", rate_bytes_s=RATE), time.monotonic()

    def shipped() -> int:
        reports = status_of(world.proxies["node-2"].address)["report"]["changes"]
        return int(reports[0]["bytes_done"]) if reports else 0

    until(lambda: shipped() > RATE // 2, what="some of it arrives")
    assert shipped() <= RATE * (time.monotonic() - began) + BURST_BYTES
    meta.adjust(shard, paused=True, rate_bytes_s=RATE)
    time.sleep(0.5)  # what was asked for before has come by then
    arrived = shipped()
    time.sleep(1)
    assert shipped() == arrived
    assert meta.shard(shard).change is not None
    meta.adjust(shard)
    done = meta.wait_over(shard, change)
    assert done is not None
    assert (done.node, done.problem) == ("node-2", "")
    with world.client(timeout=20) as db:
        assert dict(db.scan()) == rows
    check_owners(world, meta)


def test_a_store_that_went_back_changes_nothing(tmp_path: Path) -> None:
    """An old copy of the metadata store in place of the real one: nodes go on as they were, and lose nothing."""
    with wired_cluster(tmp_path, partition="hash", nodes=2, routers=1, config=CONFIG) as world:
        meta, rows = Meta(world.proxies["meta"].address), still_rows()
        with world.client(timeout=20) as db:
            db.put_many(rows)
        world.kill("meta")
        shutil.copytree(tmp_path / "meta", tmp_path / "old")
        world.restart("meta")
        shard = next(one.id for one in meta.topology().shards.values() if one.node == "node-1")
        done = meta.wait_over(shard, meta.move(shard, "node-2"))
        assert done is not None
        assert done.node == "node-2"
        check_owners(world, meta)
        served = {node: status_of(world.proxies[node].address)["shards"] for node in world.nodes}
        world.kill("meta")
        shutil.move(tmp_path / "meta", tmp_path / "new")
        shutil.copytree(tmp_path / "old", tmp_path / "meta")
        world.restart("meta")
        until(lambda: meta.shard(shard).node == "node-1", what="the old copy is in place")
        time.sleep(1)
        assert served == {node: status_of(world.proxies[node].address)["shards"] for node in world.nodes}
        world.kill("meta")
        shutil.rmtree(tmp_path / "meta")
        shutil.move(tmp_path / "new", tmp_path / "meta")
        world.restart("meta")
        world.wait_serving()
        with world.client(timeout=20) as db:
            assert dict(db.scan()) == rows
        check_owners(world, meta)
