"""Processes that are frozen, drained and restarted in the middle of writes and scans: histories and coverage hold."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardkv import Client
from shardkv.errors import ShardKVError
from tests.worlds.cluster import SMALL_ENGINE, ClusterWorld, cluster_world
from tests.worlds.history import Writer, check_scan

CONFIG = f"""{SMALL_ENGINE}
[launcher]
restart_first_ms = 20
restart_most_ms = 100
crash_loop_starts = 1000
"""
FROZEN_S = 0.7
TIMEOUT_S = 0.5
"""Shorter than a node is frozen, so that calls run out of time in the middle of it."""
KEYS = [b"fixed-%04d" % number for number in range(1500)]


@pytest.fixture(scope="module", params=["hash", pytest.param("range", marks=pytest.mark.long)])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterWorld]:
    directory: Path = tmp_path_factory.mktemp(f"review-{request.param}")
    options = ("--partition", request.param, "--nodes", "2", "--routers", "2")
    with cluster_world(directory, *options, config=CONFIG) as found:
        with found.client(timeout=20) as db:
            db.put_many(dict.fromkeys(KEYS, b"x" * 100))
        yield found


def freeze(world: ClusterWorld, *names: str) -> None:
    world.kill(*names, number=signal.SIGSTOP)
    time.sleep(FROZEN_S)
    world.kill(*names, number=signal.SIGCONT)


def test_what_was_refused_while_processes_were_frozen_or_drained_is_not_there(world: ClusterWorld) -> None:
    writers = [Writer(number, world.address, seed=7, timeout_s=TIMEOUT_S) for number in range(4)]
    for writer in writers:
        writer.start()
    for names in (["node-1"], ["router-1"], ["node-2", "router-2"], ["node-1", "node-2"]):
        freeze(world, *names)
        time.sleep(0.1)
    world.kill("router-1", number=signal.SIGTERM)
    time.sleep(0.3)
    world.kill("node-1", number=signal.SIGSTOP)
    world.kill("router-2", number=signal.SIGTERM)
    time.sleep(0.3)
    world.kill("node-1", number=signal.SIGCONT)
    world.kill("node-2", number=signal.SIGTERM)
    time.sleep(0.3)
    world.wait_serving()
    for writer in writers:
        writer.stop()
    for writer in writers:
        writer.join(30)
        assert not writer.is_alive()
        assert not writer.surprises, writer.surprises
    time.sleep(0.2)  # what ran out of time may still be on its way; what was refused must not be
    with world.client(timeout=20) as db:
        for writer in writers:
            writer.check(db)
            assert writer.acknowledged
        db.delete_many(KEYS)
        check_scan(db, writers)
        db.put_many(dict.fromkeys(KEYS, b"x" * 100))
    assert sum(writer.unknown for writer in writers), "no call ran out of time: the test tests nothing"


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_through_restarts_misses_and_repeats_nothing(world: ClusterWorld, reverse: bool) -> None:
    rng = random.Random(11)
    ending = threading.Event()

    def trouble() -> None:
        while not ending.is_set():
            victim = rng.choice(["router-1", "router-2", "node-1", "node-2"])
            world.kill(victim, number=rng.choice([signal.SIGKILL, signal.SIGTERM]))
            ending.wait(0.7)

    troublemaker = threading.Thread(target=trouble, daemon=True)
    troublemaker.start()
    try:
        for _ in range(2):
            found = scanned(world, reverse=reverse)
            assert found == sorted(KEYS, reverse=reverse)
    finally:
        ending.set()
        troublemaker.join()
        world.wait_serving()


def scanned(world: ClusterWorld, *, reverse: bool) -> list[bytes]:
    """The fixed keys, by small pages, as one scan found them; a page that fails in time is asked for again."""
    keys: list[bytes] = []
    with Client(world.address, timeout=10) as db:
        while True:
            start = b"fixed-" if not keys or reverse else keys[-1] + b"\0"
            stop = keys[-1] if keys and reverse else b"fixed-a"
            try:
                page = list(db.scan(start, stop, limit=97, reverse=reverse, keys_only=True))
            except ShardKVError:
                continue
            if not page:
                return keys
            keys += page
            time.sleep(0.005)
