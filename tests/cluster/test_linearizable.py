"""Single keys are linearizable: many clients on few keys while processes are killed and frozen and links break.

What each client was told is recorded, and a checker decides whether any order of the operations explains it all.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.worlds.hot_keys import HotKeys, check_versions
from tests.worlds.linearizability import Register, check
from tests.worlds.nemesis import Nemesis
from tests.worlds.wired_cluster import WiredCluster, wired_cluster

THREADS = 12
TASKS = 12
KEYS = [b"0hot", b"a hot", b"hot", b"last hot", b"very hot", b"~"]
"""Spread over the shards in both modes."""
CONFIG = """
[engine]
durability = "{durability}"
memtable_bytes_max = 4194304
[limits]
silence_timeout_ms = 1000
"""
DURABILITY = {"hash": "always", "range": "interval"}
"""kill -9 loses nothing in either."""


def one_history(world: WiredCluster, seed: int, *, rounds: int) -> str:
    """Load and faults; then the verdict. Returns what was checked, in words."""
    keys = [b"%s %d" % (key, seed) for key in KEYS]
    load = HotKeys(world.addresses, keys, seed=seed, threads=THREADS, tasks=TASKS)
    lanes = [
        Nemesis(world, victims, rng=random.Random(f"{seed} {victims}"), rounds=rounds)
        for victims in (world.nodes, world.routers, ["meta"])
    ]
    load.start()
    for lane in lanes:
        lane.start()
    for lane in lanes:
        lane.join()
        assert not lane.surprises, lane.surprises
    world.wait_serving()
    load.stop()
    assert not load.surprises, load.surprises
    check_versions(load.versions)
    check(load.operations, Register())
    assert all(diary.counts["acknowledged"] for diary in load.diaries), "a client never got through"
    assert load.counts["unknown"], "no fault left an outcome unknown: the faults did not hit"
    faults = sum((lane.counts for lane in lanes), Counter[str]())
    told = ", ".join(f"{number} {what}" for what, number in load.counts.items())
    return f"{load.counts.total()} operations ({told}), {faults.total()} faults ({', '.join(sorted(faults))})"


def run(directory: Path, partition: str, seeds: Iterable[int], *, rounds: int) -> None:
    with wired_cluster(directory, partition=partition, config=CONFIG.format(durability=DURABILITY[partition])) as world:
        for seed in seeds:
            try:
                print(f"\n{partition}, seed {seed}: {one_history(world, seed, rounds=rounds)}")
            except BaseException as error:
                error.add_note(f"Partition {partition}, seed {seed}.\n{world.logs()}")
                raise


@pytest.mark.parametrize("partition", ["hash", "range"])
def test_every_key_is_linearizable(tmp_path: Path, partition: str) -> None:
    run(tmp_path, partition, [1 if partition == "hash" else 2], rounds=1)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("partition", ["hash", "range"])
def test_every_key_is_linearizable_for_long(tmp_path: Path, partition: str) -> None:
    run(tmp_path, partition, range(100, 110), rounds=3)
