"""A storm: a cluster whose topology changes all the time, under mixed load, with faults if wanted; then the verdict.

Invariant: what `one_storm` returns was checked: no acknowledged write lost, no delete undone, hot keys linearizable,
scans complete and in order, tokens counted once; and at the end every job ended, every shard with one owner, nothing
left over of any change, and the cluster's own status saying so.
"""

from __future__ import annotations

import json
import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from shardkv import Admin
from shardkv.control.told import Shard
from shardkv.errors import InvalidArgument, ShardKVError
from shardkv.topology.view import Topology
from tests.worlds.changes import SMALL, Meta, status_of
from tests.worlds.cluster import until
from tests.worlds.etcd_cluster import etcd_cluster
from tests.worlds.nemesis import KINDS, Nemesis
from tests.worlds.storm_load import StormLoad, Worker
from tests.worlds.wired_cluster import WiredCluster

CONFIG = SMALL + "[limits]\nsilence_timeout_ms = 1000\n"
NODES_LEAST, NODES_MOST = 2, 5
SHARDS_MOST = 14
LANES = 2
"""Changes of the topology are asked for by so many at once."""
JOB_PATIENCE_S = 90.0
OVERTAKEN = "any more|meanwhile|takes no shards"
"""What a job may fail for without any fault: another one was quicker."""
WATCHDOG_S = (2.3, 3.2)
"""A node that is stopped for so long has a fence beyond `fence_abort_ms`, or a change beyond its target's patience."""
APART_S = (0.5, 1.5)
APART_WAIT_S = 2.0
FAULTS = (*KINDS, *2 * ("kill", "freeze long", "kill meta"), "freeze meta", *2 * ("apart from meta", "source apart"))


@dataclass(frozen=True)
class Weather:
    """What a run is like."""

    seed: int
    partition: str = "hash"
    store: str = "embedded"
    faults: bool = False
    seconds: float = 8.0
    bug: str = ""
    """Of all nodes, from tests/worlds/buggy_node.py."""
    only_moves: bool = False
    two_controllers: bool = False
    """Both metadata processes control the cluster, at the same time (etcd)."""
    fault_kinds: tuple[str, ...] = FAULTS

    def __str__(self) -> str:
        controllers = ", two controllers" if self.two_controllers else ""
        faults = "faults" if self.faults else "no faults"
        return f"{self.partition}, {self.store}{controllers}, {faults}, seed {self.seed}"


def forecast(seed: int, seconds: float) -> Weather:
    """The run of a seed: each kind of partition and store, two of three with faults."""
    store = "etcd" if seed % 5 == 4 else "embedded"
    two = store == "etcd" and seed % 4 > 1
    return Weather(seed, ("hash", "range")[seed % 2], store, seed % 3 != 0, seconds, two_controllers=two)


@contextmanager
def storm_world(directory: Path, weather: Weather) -> Iterator[WiredCluster]:
    shape = {"nodes": 3, "routers": 2, "partition": weather.partition, "config": CONFIG}
    if weather.store == "etcd":
        with etcd_cluster(directory, **shape) as world:  # type: ignore[arg-type]
            _set_up(world, weather)
            yield world
        return
    world = WiredCluster(directory, **shape)  # type: ignore[arg-type]
    try:
        _set_up(world, weather)
        yield world
    finally:
        world.close()


def _set_up(world: WiredCluster, weather: Weather) -> None:
    world.split_meta_links()
    if weather.bug:
        world.run_instead("shardkv_node", "tests.worlds.buggy_node", weather.bug)
    if weather.two_controllers:
        world.run_instead("shardkv", "tests.worlds.rash_meta")
    world.start()


# What changes


class Events(Worker):
    """Asks for one change of the topology after the other, as an operator does, and waits for its job."""

    def __init__(self, storm: Storm, number: int) -> None:
        super().__init__(f"events {number}", faults=storm.weather.faults)
        self._storm = storm
        self._world = storm.world
        self._rng = random.Random(f"{storm.weather.seed} events {number}")
        self._admin = Admin(storm.world.addresses, timeout=60)
        self._first = number == 0

    def step(self) -> None:
        try:
            self._one()
        except InvalidArgument as error:  # the other lane was quicker
            self.counts["refused"] += 1
            self._storm.notes.append(f"refused: {error.message}")
        except ShardKVError:
            if not self.faults:
                raise
            self.counts["not asked"] += 1

    def _one(self) -> None:
        if self._storm.weather.only_moves:
            self._move()
            return
        kinds = [*4 * [self._move], *3 * [self._split], *3 * [self._merge], self._rebalance]
        if self._first:  # one at a time
            kinds += [*2 * [self._add], *2 * [self._remove]]
        self._rng.choice(kinds)()

    def _shards(self) -> list[Shard]:
        return self._admin.shards()

    def _active(self) -> list[str]:
        return [node.name for node in self._admin.nodes() if node.wish == "active" and node.state == "serving"]

    def _move(self) -> None:
        shard = self._rng.choice(self._shards())
        nodes = [name for name in self._active() if name != shard.node]
        if nodes:
            rate = self._rng.choice((0, 0, 0, 200_000))
            self._wait("move", self._admin.move_shard(shard.id, self._rng.choice(nodes), rate_bytes_s=rate).id)

    def _split(self) -> None:
        shards = self._shards()
        if len(shards) < SHARDS_MOST:
            shard = self._rng.choice(shards)
            self._wait("split", self._admin.split_shard(shard.id, at=self._cut(shard)).id)

    def _cut(self, shard: Shard) -> int | bytes | None:
        if self._rng.random() < 0.3:
            return None
        if isinstance(shard.start, int):
            stop = shard.stop if isinstance(shard.stop, int) else 1 << 64
            return self._rng.randrange(shard.start + 1, stop)
        stop = shard.stop if isinstance(shard.stop, bytes) else b"\xff"
        inside = [key for key in self._storm.load.rows if shard.start < key < stop]
        return self._rng.choice(inside) if inside else None

    def _merge(self) -> None:
        shards = self._shards()
        if len(shards) > 3:
            left = self._rng.randrange(len(shards) - 1)
            self._wait("merge", self._admin.merge_shards(shards[left].id, shards[left + 1].id).id)

    def _rebalance(self) -> None:
        self._wait("rebalance", self._admin.rebalance().id)

    def _add(self) -> None:
        if len(self._active()) < NODES_MOST:
            added = self._admin.add_node(started_by="operator")
            with self._storm.processes:
                self._world.add_node(added.node)
            self._wait("add", added.job)

    def _remove(self) -> None:
        nodes = self._active()
        if len(nodes) > NODES_LEAST:
            name = self._rng.choice(nodes)
            self._wait("remove", self._admin.remove_node(name).id)
            self._storm.retire_removed()

    def _wait(self, kind: str, job: int) -> None:
        self.counts[kind] += 1
        if self._rng.random() < 0.15:
            self._steer(job)
        end = time.monotonic() + JOB_PATIENCE_S
        while not self._ending.is_set():
            with suppress(ShardKVError):
                found = self._admin.job(job)
                if found.ended:
                    self.counts[f"{kind} {found.state}"] += 1
                    if found.state == "failed":
                        self._storm.notes.append(f"job {job} {kind} {found.asked} failed: {found.problem}")
                        assert found.problem, found
                    return
            assert time.monotonic() < end, f"{kind}, job {job}, has not ended in {JOB_PATIENCE_S} s: {found}"
            time.sleep(0.05)

    def _steer(self, job: int) -> None:
        """Cancel it, or pause it for a while, at a moment that comes by chance."""
        time.sleep(self._rng.random() * 0.5)
        with suppress(InvalidArgument):
            if self._rng.random() < 0.6:
                self._admin.cancel_job(job)
                self.counts["cancel"] += 1
                return
            self._admin.pause_job(job)
            self.counts["pause"] += 1
            time.sleep(self._rng.random() * 0.3)
            self._admin.resume_job(job)

    def close(self) -> None:
        self._admin.close()


# What breaks


class Faults(Worker):
    """One fault after the other; most hit who takes part in a change just now."""

    def __init__(self, storm: Storm) -> None:
        super().__init__("faults", faults=True)
        self._storm = storm
        self._world = storm.world
        self._kinds = storm.weather.fault_kinds
        self._rng = random.Random(f"{storm.weather.seed} faults")
        self._nemesis = Nemesis(storm.world, [], rng=self._rng, rounds=0)
        self._left: list[str] = []

    def step(self) -> None:
        self._left = self._left or self._rng.sample(self._kinds, len(self._kinds))
        kind = self._left.pop()
        with self._storm.processes:
            died = [name for name in self._storm.all_processes if not self._world.runs(name)]
            assert not died, f"{died} ended by themselves\n{self._world.logs()}"
            self._strike(kind)
        time.sleep(self._rng.uniform(0, 0.3))

    def _strike(self, kind: str) -> None:
        name = self._victim()
        if kind == "freeze long":
            self.counts[kind] += 1
            name = self._rng.choice([*self._changing(), *self._world.nodes])
            self._world.signal(name, signal.SIGSTOP)
            time.sleep(self._rng.uniform(*WATCHDOG_S))
            self._world.signal(name, signal.SIGCONT)
        elif kind == "apart from meta":
            self.counts[kind] += 1
            self.apart([name, self._rng.choice(self._world.routers)], self._rng.uniform(*APART_S))
        elif kind == "source apart":
            self._source_apart()
        elif kind == "freeze meta":
            self.counts[kind] += 1
            self._freeze_meta()
        elif kind == "kill meta":
            self.counts[kind] += 1
            self._nemesis.strike("kill", self._rng.choice(self._storm.metas))
        else:
            self.counts[kind] += 1
            self._nemesis.strike(kind, name)

    def _source_apart(self) -> None:
        """The source of a move that has just begun, and a router, do not hear how it ends."""
        end = time.monotonic() + APART_WAIT_S
        while time.monotonic() < end and not self._ending.is_set():
            moves = [one for one in self._storm.topology().shards.values() if one.change and one.change.target]
            if moves:
                self.counts["source apart"] += 1
                time.sleep(self._rng.uniform(0.05, 0.5))
                self.apart([moves[0].node, self._rng.choice(self._world.routers)], self._rng.uniform(1.0, 2.0))
                return

    def _freeze_meta(self) -> None:
        """For longer than a controller's lease."""
        name = self._rng.choice(self._storm.metas)
        self._world.signal(name, signal.SIGSTOP)
        time.sleep(self._rng.uniform(*WATCHDOG_S))
        self._world.signal(name, signal.SIGCONT)

    def apart(self, names: Sequence[str], seconds: float) -> None:
        """What these know of the topology stands still."""
        links = [link for name in set(names) for link in self._world.meta_links.get(name, ())]
        for link in links:
            self._world.wires.do(link.hold)
        time.sleep(seconds)
        for link in links:
            self._world.wires.do(link.heal)

    def _victim(self) -> str:
        changing = self._changing()
        if changing and self._rng.random() < 0.7:
            return self._rng.choice(changing)
        return self._rng.choice(self._storm.all_processes)

    def _changing(self) -> list[str]:
        """Nodes that take part in a change."""
        found = [shard for shard in self._storm.topology().shards.values() if shard.change is not None]
        names = {name for shard in found if shard.change for name in (shard.node, shard.change.target)}
        return sorted(names & set(self._world.nodes))


# The run


class Storm:
    """One run in a world that serves. See `one_storm`."""

    def __init__(self, world: WiredCluster, weather: Weather) -> None:
        self.world = world
        self.weather = weather
        self.processes = threading.RLock()
        """Held by whoever starts, ends or stops processes."""
        self.notes: list[str] = []
        self.metas = metas_of(world)
        self.load = StormLoad(world, seed=weather.seed, faults=weather.faults)
        self.lanes = [Events(self, number) for number in range(LANES)]
        self.faults: list[Faults] = [Faults(self)] if weather.faults else []

    @property
    def all_processes(self) -> list[str]:
        return [*self.world.nodes, *self.world.routers, *self.metas]

    def topology(self) -> Topology:
        with suppress(ShardKVError):
            return Meta(self.world.proxies[self.metas[0]].address).topology()
        return Topology()

    def run(self) -> Counter[str]:
        """Load, changes and faults; then the verdict, and what was checked."""
        self.load.start()
        for one in (*self.lanes, *self.faults):
            one.start()
        end = time.monotonic() + self.weather.seconds
        while time.monotonic() < end and not self._surprises():
            time.sleep(0.05)
        for worker in (*self.faults, *self.lanes):
            worker.stop()
        for worker in (*self.faults, *self.lanes):
            worker.join(60)
            assert not worker.is_alive(), f"{worker.name} did not end"
        self.settle()
        self.load.stop()
        if self._surprises():
            raise self._surprises()[0]
        self.load.check_histories()
        self.check_settled()
        checked = self.load.check_rows()
        checked += self._check_after_crash()
        return self._counts(checked)

    def _surprises(self) -> list[BaseException]:
        found = [surprise for one in (*self.lanes, *self.faults) for surprise in one.surprises]
        return found + self.load.surprises

    def settle(self) -> None:
        """No more faults; until all jobs have ended."""
        self.world.heal()
        for link in self.world.links if self.faults else ():
            self.world.wires.do(link.cut)  # those that lost bytes stay mute
        died = [name for name in self.all_processes if not self.world.runs(name)]
        assert not died, f"{died} ended by themselves"
        self.world.wait_serving()
        with Admin(self.world.addresses, timeout=60) as admin:
            for job in admin.jobs():
                if job.state == "paused":
                    admin.resume_job(job.id)
            until(lambda: all(job.ended for job in admin.jobs()), timeout_s=JOB_PATIENCE_S, what="all jobs ended")
            failed = [job for job in admin.jobs() if job.state == "failed"]
            told = [f"job {job.id} {job.kind} {job.asked}: {job.problem}" for job in failed]
            self.notes += told
            wrong = [each for each in told if re.search(OVERTAKEN, each) is None]
            assert self.faults or not wrong, f"jobs failed without a fault: {wrong}"
        self.retire_removed()

    def retire_removed(self) -> None:
        """End nodes that are not wanted any more; they must have nothing."""
        topology = self.topology()
        for name in list(self.world.nodes):
            wish = topology.wanted.get(name)
            if wish is not None and wish.state == "removed":
                with self.processes:
                    assert not [one for one in topology.shards.values() if one.node == name], (
                        f"{name} still owns shards"
                    )
                    self.world.retire_node(name)

    def check_settled(self) -> None:
        """One owner per shard, nothing left over, and the status says so."""
        check_whole(self.topology(), self.weather.partition)
        until(lambda: not self.left_over(), timeout_s=20, what="nothing left over")

    def left_over(self) -> str:
        return left_over(self.world)

    def _check_after_crash(self) -> int:
        """All nodes die at once, and come back with all that was acknowledged."""
        for name in self.world.nodes:
            self.world.kill(name)
        for name in self.world.nodes:
            self.world.restart(name)
        self.world.wait_serving()
        self.check_settled()
        return self.load.check_rows()

    def _counts(self, checked: int) -> Counter[str]:
        found = self.load.counts()
        found["keys compared"] = checked
        for lane in self.lanes:
            found += Counter({f"event: {kind}": number for kind, number in lane.counts.items()})
            lane.close()
        for faults in self.faults:
            found += Counter({f"fault: {kind}": number for kind, number in faults.counts.items()})
        return found


def metas_of(world: WiredCluster) -> list[str]:
    """The names of its metadata processes."""
    return getattr(world, "metas", ["meta"])


def left_over(world: WiredCluster) -> str:
    """What a settled cluster should not have, in words; empty when all is well."""
    shards = Meta(world.proxies[metas_of(world)[0]].address).topology().shards
    if any(one.change is not None for one in shards.values()):
        return "a shard is in a change"
    for name in world.nodes:
        wanted = {one.id: one.epoch for one in shards.values() if one.node == name}
        if problem := _problem_of(world, name, wanted):
            return problem
    return _status_problem(world)


def _problem_of(world: WiredCluster, name: str, wanted: dict[int, int]) -> str:
    found = status_of(world.proxies[name].address)
    if found["shards"] != wanted:
        return f"{name} serves {found['shards']} instead of {wanted}"
    if found["engine"]["tablets"] != len(wanted):
        return f"{name} has {found['engine']['tablets']} tablets of {len(wanted)} shards"
    report = found["report"]
    if report["changes"] or report["kept"] or found["missing"]:
        return f"{name} reports {report['changes']}, {report['kept']}, {found['missing']}"
    files = world.directory / name
    fences = files / "fences.json"
    if fences.exists() and json.loads(fences.read_text())["fences"]:
        return f"{name} has fences: {fences.read_text()}"
    left = [str(each) for each in files.glob("incoming/*")]
    return f"{name} has {left}" if left else ""


def _status_problem(world: WiredCluster) -> str:
    with Admin(world.addresses, timeout=30) as admin:
        status = admin.status()
    if status.jobs or status.advice:
        return f"the status has {status.jobs}, {status.advice}"
    live = [node for node in status.nodes if node.wish != "removed"]
    if sorted(node.name for node in live) != sorted(world.nodes):
        return f"the status has nodes {live}"
    bad = [node for node in live if node.state != "serving" or node.fenced or node.missing or node.kept]
    return f"the status says {bad}" if bad else ""


def check_whole(topology: Topology, partition: str) -> None:
    """The shards of the keyspace are its whole, without a gap or an overlap."""
    shards = sorted(topology.shards.values(), key=lambda one: (one.start is not None, one.start))
    assert shards[0].start in (0, b"", None), shards[0]
    for left, right in pairwise(shards):
        assert left.stop == right.start, f"{left} and {right} do not meet"
    assert shards[-1].stop in (None, 1 << 64), shards[-1]


def one_storm(directory: Path, weather: Weather) -> Counter[str]:
    """A run in a cluster of its own; a failure says how to repeat it."""
    directory.mkdir(parents=True, exist_ok=True)
    with storm_world(directory, weather) as world:
        storm: Storm | None = None
        try:
            storm = Storm(world, weather)
            return storm.run()
        except BaseException as error:
            notes = storm.notes[-20:] if storm is not None else []
            left = ""
            with suppress(Exception):
                left = storm.left_over() if storm is not None else ""
            error.add_note(f"{weather}\nLeft over: {left}\n" + "\n".join(notes) + f"\n{world.logs()}")
            raise
