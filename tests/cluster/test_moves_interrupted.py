"""Nodes die or stand still at every step of a change, links break, the metadata store is away: after each, every shard
has one owner that serves it, nothing acknowledged is lost, and the status says so."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardkv.topology.documents import ShardDocument
from shardkv_node.changes.stops import VARIABLE
from tests.worlds.changes import SMALL, Meta, check_owners, status_of, still_rows
from tests.worlds.cluster import until
from tests.worlds.history import Writer
from tests.worlds.wired_cluster import WiredCluster, wired_cluster

CONFIG = SMALL + "\n[limits]\nsilence_timeout_ms = 1000\n"
ROWS = still_rows()
WRITERS = 3
SOURCE_STEPS = ["begin", "fencing", "fenced", "drop", "unfence"]
TARGET_STEPS = ["ship", "staged", "tail", "fence", "commit", "committed", "adopt", "serve"]
DEFAULT = {
    "source.fenced",
    "source.drop",
    "target.tail",
    "target.commit",
    "target.committed",
    "owner.fenced",
    "owner.committed",
    "cut",
}
"""Where something goes wrong in a default run."""
OWNER_STEPS = ["fencing", "fenced", "staged", "commit", "committed", "adopt", "drop"]


@pytest.fixture(scope="module", params=["hash", pytest.param("range", marks=pytest.mark.long)])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WiredCluster]:
    directory = tmp_path_factory.mktemp(f"changes-{request.param}")
    with wired_cluster(directory, partition=request.param, nodes=2, routers=1, config=CONFIG) as found:
        with found.client(timeout=20) as db:
            db.put_many(ROWS)
        yield found


def each(*cases: str, default: int | None = None) -> list[object]:
    """Those of DEFAULT, the first `default` of them, as they are, the others for the long battery."""
    chosen = [case for case in cases if case in DEFAULT][:default]
    return [case if case in chosen else pytest.param(case, marks=pytest.mark.long) for case in cases]


class Interrupted:
    """A cluster with load, in which a change is begun and something goes wrong."""

    def __init__(self, world: WiredCluster) -> None:
        self.world = world
        self.meta = Meta(world.proxies["meta"].address)
        self.writers = [Writer(number, world.addresses, seed=int(time.time())) for number in range(WRITERS)]
        self.shard = next(iter(self.meta.topology().shards.values()))
        self.source = self.shard.node
        self.target = next(name for name in world.nodes if name != self.source)

    def stop_at(self, step: str, *, how: str = "") -> str:
        """Have the node whose step it is die (or stop) there. Its name."""
        role = step.partition(".")[0]
        name = self.target if role == "target" else self.source
        self.world.kill(name)
        self.world.restart(name, **{VARIABLE: f"{step}:{how}" if how else step})
        self.world.wait_serving()
        return name

    def begin(self) -> None:
        for writer in self.writers:
            writer.start()

    def move(self) -> str:
        return self.meta.move(self.shard.id, self.target)

    def end(self) -> None:
        """All is well again: see that it is."""
        self.world.heal()
        self.world.wait_serving()
        check_owners(self.world, self.meta)
        for writer in self.writers:
            writer.stop()
        for writer in self.writers:
            writer.join(30)
            assert not writer.surprises, writer.surprises
        with self.world.client(timeout=20) as db:
            assert sum(writer.check(db) for writer in self.writers)
            assert {key: value for key, value in db.scan() if b"-still-" in key} == ROWS
            for writer in self.writers:
                for key in writer.expected:
                    db.delete(key)
            assert dict(db.scan()) == ROWS


@pytest.fixture
def story(world: WiredCluster) -> Iterator[Interrupted]:
    found = Interrupted(world)
    try:
        yield found
    except BaseException as error:
        error.add_note(world.logs())
        raise
    finally:
        world.heal()
        for writer in found.writers:
            writer.stop()
        for name in world.nodes:
            world.signal(name, signal.SIGCONT)
            if not world.runs(name):
                world.restart(name)
        world.wait_serving()


def _is_stopped(world: WiredCluster, name: str) -> bool:
    state = Path(f"/proc/{world.pid(name)}/stat").read_text().rpartition(")")[2].split()[0]
    return state == "T"


@pytest.mark.parametrize(
    "step", each(*(f"source.{one}" for one in SOURCE_STEPS), *(f"target.{one}" for one in TARGET_STEPS))
)
def test_a_node_killed_at_any_step_of_a_move_loses_nothing(story: Interrupted, step: str) -> None:
    world, name = story.world, story.stop_at(step)
    story.begin()
    change = story.move()
    until(lambda: not world.runs(name), what=f"{name} dies at {step}")
    world.restart(name)
    done = story.meta.wait_over(story.shard.id, change)
    assert done is not None
    moved = step in ("source.drop", "source.unfence", "target.committed", "target.adopt", "target.serve")
    assert (done.node == story.target) == moved, done
    story.end()


@pytest.mark.parametrize("step", each(*(f"owner.{one}" for one in OWNER_STEPS)))
def test_an_owner_killed_at_any_step_of_a_split_and_a_merge_loses_nothing(story: Interrupted, step: str) -> None:
    world, meta, shard = story.world, story.meta, story.shard
    name = story.stop_at(step)
    story.begin()
    meta.split(shard.id, _middle(shard))
    until(lambda: not world.runs(name), what=f"{name} dies at {step}")
    world.restart(name)
    until(lambda: all(one.change is None for one in meta.topology().shards.values()))
    if shard.id in meta.topology().shards:
        assert meta.wait_over(shard.id, meta.split(shard.id, _middle(shard))) is None
    check_owners(world, meta)
    name = story.stop_at(step)
    left, right = sorted(
        (one for one in meta.topology().shards.values() if shard.id in one.parents), key=lambda one: one.start
    )
    meta.merge(left.id, right.id)
    until(lambda: not world.runs(name), what=f"{name} dies at {step}")
    world.restart(name)
    until(lambda: all(one.change is None for one in meta.topology().shards.values()))
    if left.id in meta.topology().shards:
        assert meta.wait_over(left.id, meta.merge(left.id, right.id)) is None
    story.end()


def _middle(shard: ShardDocument) -> int | bytes:
    if isinstance(shard.start, int):
        return (shard.start + (shard.stop if isinstance(shard.stop, int) else 2**64)) // 2
    return (shard.start or b"0") + b"-still-01"


@pytest.mark.parametrize("step", each("source.fenced", "target.commit", "target.tail", default=1))
def test_a_node_that_stands_still_longer_than_the_watchdog_ends_in_one_owner(story: Interrupted, step: str) -> None:
    world, name = story.world, story.stop_at(step, how="STOP")
    story.begin()
    change = story.move()
    until(lambda: _is_stopped(world, name), what=f"{name} stops at {step}")
    time.sleep(2.5)
    world.signal(name, signal.SIGCONT)
    done = story.meta.wait_over(story.shard.id, change)
    assert done is not None
    assert done.node in (story.source, story.target)
    story.end()


def test_a_fence_is_lifted_when_the_target_stands_still(story: Interrupted) -> None:
    world, name = story.world, story.stop_at("target.commit", how="STOP")
    change = story.move()
    until(lambda: _is_stopped(world, name), what=f"{name} stops before the commit")
    done = story.meta.wait_over(story.shard.id, change)
    assert done is not None
    assert done.node == story.source
    assert "stood for 2 s" in done.problem
    until(lambda: story.shard.id in status_of(world.proxies[story.source].address)["shards"])
    world.signal(name, signal.SIGCONT)
    story.begin()
    story.end()


@pytest.mark.parametrize("fault", each("cut", "refuse", "hold", "mute"))
def test_a_broken_link_between_source_and_target_is_mended_or_the_move_given_up(story: Interrupted, fault: str) -> None:
    world, proxy = story.world, story.world.proxies[story.source]
    change = story.meta.move(story.shard.id, story.target, rate_bytes_s=20_000)

    def arrived() -> bool:
        reports = status_of(world.proxies[story.target].address)["report"]["changes"]
        return bool(reports) and reports[0]["bytes_done"] > 0

    until(arrived, what="the first piece arrives")
    world.wires.do(getattr(proxy, fault))
    time.sleep(0.3)
    world.wires.do(proxy.heal)
    if fault == "mute":
        world.wires.do(proxy.cut_mute)
    story.meta.adjust(story.shard.id)
    done = story.meta.wait_over(story.shard.id, change)
    assert done is not None
    assert (done.node, done.problem) == (story.target, "")
    story.begin()
    story.end()


@pytest.mark.parametrize("step", each("source.fenced", "target.commit", "target.committed", default=1))
def test_the_store_is_away_in_the_fence(story: Interrupted, step: str) -> None:
    """Nobody decides anything meanwhile; afterwards the change is committed or given up."""
    world, name = story.world, story.stop_at(step, how="STOP")
    story.begin()
    change = story.move()
    until(lambda: _is_stopped(world, name), what=f"{name} stops at {step}")
    world.wires.do(world.proxies["meta"].refuse)
    world.signal(name, signal.SIGCONT)
    time.sleep(3)
    served = {node: status_of(world.proxies[node].address)["shards"] for node in world.nodes}
    assert sum(story.shard.id in shards for shards in served.values()) <= 1
    world.wires.do(world.proxies["meta"].heal)
    done = story.meta.wait_over(story.shard.id, change)
    assert done is not None
    story.end()
