"""Shards move while they are read, written and scanned: nothing is lost or doubled, and one node has each."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.worlds.changes import Meta, status_of
from tests.worlds.cluster import until
from tests.worlds.history import Writer, check_scan
from tests.worlds.hot_keys import HotKeys, check_versions
from tests.worlds.linearizability import Register, check
from tests.worlds.wired_cluster import WiredCluster, wired_cluster

CONFIG = """
[engine]
memtable_bytes_max = 262144
block_cache_bytes = 1048576
table_bytes_max = 131072
"""
"""A few thousand rows already flush and compact."""
KEYS = [b"0hot", b"a hot", b"hot", b"last hot", b"very hot", b"~"]
ROWS = 3_000
WRITERS = 4


@pytest.fixture(params=["hash", "range"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[WiredCluster]:
    with wired_cluster(tmp_path, partition=request.param, nodes=2, routers=2, config=CONFIG) as found:
        try:
            yield found
        except BaseException as error:
            error.add_note(found.logs())
            raise


def still_rows() -> dict[bytes, bytes]:
    """What nobody changes."""
    return {b"%c-still-%05d" % (b"09afkmpsuz"[number % 10], number): b"%d" % number * 20 for number in range(ROWS)}


class Scans(threading.Thread):
    """Scans all the time, and looks for the rows that nobody changes."""

    def __init__(self, world: WiredCluster, rows: dict[bytes, bytes]) -> None:
        super().__init__(daemon=True)
        self.counts = 0
        self.surprises: list[BaseException] = []
        self._world, self._rows = world, rows
        self._ending = threading.Event()

    def run(self) -> None:
        try:
            with self._world.client(timeout=20) as db:
                while not self._ending.is_set():
                    found = [(key, value) for key, value in db.scan() if b"-still-" in key]
                    assert found == sorted(self._rows.items()), "a scan missed rows, or had some twice"
                    self.counts += 1
        except BaseException as error:
            self.surprises.append(error)
            raise

    def stop(self) -> None:
        self._ending.set()
        self.join(30)
        assert not self.surprises, self.surprises


def check_owners(world: WiredCluster, meta: Meta) -> None:
    """Each shard is served by its owner and nobody else, at its epoch; no tablet is left over, no change, no fence."""

    def wanted() -> dict[str, dict[int, int]]:
        shards = meta.topology().shards.values()
        assert all(shard.change is None for shard in shards)
        return {node: {one.id: one.epoch for one in shards if one.node == node} for node in world.nodes}

    def served() -> dict[str, dict[int, int]]:
        return {node: status_of(world.proxies[node].address)["shards"] for node in world.nodes}

    until(lambda: served() == wanted(), what="every shard is served by its owner alone")
    for node in world.nodes:
        status = status_of(world.proxies[node].address)
        assert status["engine"]["tablets"] == len(status["shards"]), "a tablet is left over"
        assert {one[0] for one in status["report"]["shards"]} == status["shards"].keys()
        assert (status["report"]["changes"], status["report"]["kept"], status["missing"]) == ([], [], {})


def test_moves_under_load_lose_and_repeat_nothing(world: WiredCluster) -> None:
    meta, rows = Meta(world.proxies["meta"].address), still_rows()
    with world.client(timeout=20) as db:
        db.put_many(rows)
    writers = [Writer(number, world.addresses, seed=7) for number in range(WRITERS)]
    hot = HotKeys(world.addresses, KEYS, seed=5, threads=6, tasks=6)
    scans = Scans(world, rows)
    for one in (*writers, hot, scans):
        one.start()
    for there in ("node-2", "node-1", "node-2"):
        for shard in [one.id for one in meta.topology().shards.values() if one.node != there]:
            done = meta.wait_over(shard, meta.move(shard, there))
            assert done is not None
            assert (done.node, done.problem) == (there, "")
    until(lambda: scans.counts > 1 or scans.surprises, timeout_s=60)
    scans.stop()
    for writer in writers:
        writer.stop()
        writer.join(30)
        assert not writer.surprises, writer.surprises
    hot.stop()
    assert not hot.surprises, hot.surprises
    check_versions(hot.versions)
    check(hot.operations, Register())
    with world.client(timeout=20) as db:
        assert sum(writer.check(db) for writer in writers)
        found = dict(db.scan())
        assert {key: value for key, value in found.items() if b"-still-" in key} == rows
        for key in [*KEYS, *rows]:
            db.delete(key)
        check_scan(db, writers)
    refused = [writer.refused for writer in writers]
    assert not any(refused), f"calls did not outlast a move: {refused}"
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
