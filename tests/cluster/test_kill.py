"""kill -9 of any processes under load: nothing acknowledged is lost or undone, and the cluster comes back by itself."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.worlds.cluster import SMALL_ENGINE, ClusterWorld, cluster_world
from tests.worlds.history import Writer, check_scan

ROUNDS = 10
WRITERS = 4
LOAD_S = 0.15
NODES = ["node-1", "node-2", "node-3"]


def victims(rng: random.Random, round_number: int) -> list[str]:
    """Who dies this round; over the rounds everybody, alone and together."""
    choices = [
        [rng.choice(NODES)],
        ["router-1"],
        ["meta"],
        rng.sample(NODES, 2),
        [rng.choice(NODES), "router-1"],
        [rng.choice(NODES), "meta"],
        NODES,
        ["meta", "router-1"],
        [*NODES, "meta", "router-1"],
        [*NODES, "meta", "router-1", "launcher"],
    ]
    return choices[round_number % len(choices)]


def one_round(world: ClusterWorld, writers: list[Writer], dying: list[str]) -> None:
    """Load, kill in the middle of it, more load, then compare with everything that was acknowledged."""
    for writer in writers:
        writer.start()
    time.sleep(LOAD_S)
    world.kill(*dying)
    if "launcher" in dying:
        world.start()
    time.sleep(LOAD_S)
    world.wait_serving()
    for writer in writers:
        writer.stop()
    for writer in writers:
        writer.join(30)
        assert not writer.is_alive(), "a call did not end within its timeout"
        assert not writer.surprises, writer.surprises


@pytest.mark.parametrize("partition", ["hash", "range"])
def test_no_acknowledged_write_is_lost_and_no_delete_undone(tmp_path: Path, partition: str) -> None:
    seed = 20_000 + len(partition)
    rng = random.Random(seed)
    with cluster_world(tmp_path, "--partition", partition, config=SMALL_ENGINE) as world:
        histories: list[Writer] = []
        for round_number in range(ROUNDS):
            writers = [Writer(number, world.address, seed + round_number) for number in range(WRITERS)]
            for writer, before in zip(writers, histories, strict=False):
                writer.expected = before.expected
            dying = victims(rng, round_number)
            one_round(world, writers, dying)
            with world.client(timeout=20) as db:
                compared = sum(writer.check(db) for writer in writers)
                check_scan(db, writers)
            assert compared
            assert all(writer.acknowledged for writer in writers), f"no writer got through beside {dying}"
            histories = writers
