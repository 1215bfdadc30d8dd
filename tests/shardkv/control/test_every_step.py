"""A move, a split and a merge, each with one thing going wrong at one persisted step: all steps, all who take part.

The steps are those a run without faults goes through. At each of them the node it happens at, the other node, or both
controllers die or stand still for long; or the job is cancelled; or the change is aborted, or the link between the
nodes is cut for good. Afterwards all is judged as after a storm.
"""

from __future__ import annotations

from typing import Any

import pytest

from shardkv.control import changes, jobs
from tests.shardkv.control.sim import Cluster
from tests.shardkv.control.sim_world import Killed

KINDS = ("move", "split", "merge")
PAUSE_S = 4.0
"""Longer than anything waits for anybody."""
HARMS = (
    "kill it",
    "kill the other",
    "kill the controllers",
    "pause it",
    "pause the other",
    "pause the controllers",
    "cut it from the store",
    "cut the nodes",
    "cancel",
    "abort",
)


class Story:
    """One change of one kind; `harm` happens at step number `at` (None: nothing does)."""

    def __init__(self, kind: str, at: int | None, harm: str) -> None:
        self.cluster = Cluster(7, partition="range" if kind != "split" else "hash")
        self.kind, self.at, self.harm = kind, at, harm
        self.steps: list[str] = []
        world = self.cluster.world
        world.run_until(1.0)
        self._ask()
        world.hook = self._at_step
        world.run_until(PAUSE_S + 2.0 if harm.startswith("pause") else 2.5, self._is_done if at is None else _never)

    def _ask(self) -> None:
        """The move, from n1 to n2; the split, on n1; the merge of two shards that were brought to one node."""
        topology = self.cluster.topology
        first, second = topology.keyspace("default").shards[:2]
        match self.kind:
            case "move":
                txn = jobs.ask_move(topology, first.id, second.node, 0)
            case "split":
                txn = jobs.ask_split(topology, first.id, 0)
            case _:
                txn = jobs.ask_merge(topology, first.id, second.id, 0)
        self.cluster.ask(txn)

    def _is_done(self) -> bool:
        return all(job.state in jobs.ENDED for job in self.cluster.topology.jobs.values())

    def _at_step(self, step: str, process: Any) -> None:
        self.steps.append(f"{step} at {process.name}")
        if self.at is not None and len(self.steps) == self.at + 1:
            self._do_harm(process)

    def _do_harm(self, process: Any) -> None:
        world, cluster = self.cluster.world, self.cluster
        others = [node for node in cluster.nodes if node is not process][:2]
        controllers = cluster.controllers
        match self.harm:
            case "kill the other":
                for node in others:
                    self._kill(node)
            case "kill the controllers":
                for controller in controllers:
                    if controller is not process:
                        self._kill(controller)
            case "pause it" | "pause the other" | "pause the controllers":
                who = {"pause it": [process], "pause the other": others, "pause the controllers": controllers}[
                    self.harm
                ]
                for each in who:
                    each.pause(PAUSE_S)
            case "cut it from the store":
                world.cut |= {(process.name, "M"), ("M", process.name)}
            case "cut the nodes":
                world.cut |= {(a.name, b.name) for a in cluster.nodes for b in cluster.nodes}
            case "cancel" | "abort":
                world.at(0, self._end_it)
        if self.harm == "kill it" or (self.harm == "kill the controllers" and process in controllers):
            world.at(0.3, self._start, process)
            raise Killed

    def _kill(self, process: Any) -> None:
        if process.up:
            process.kill()
            self.cluster.world.at(0.3, self._start, process)

    def _start(self, process: Any) -> None:
        if not process.up:
            process.start()

    def _end_it(self) -> None:
        topology = self.cluster.topology
        if self.harm == "cancel":
            for job in topology.jobs.values():
                if job.state in jobs.ACTIVE:
                    self.cluster.ask(jobs.cancel(topology, job.id))
            return
        for shard in topology.shards.values():
            txn = changes.abort(topology, shard.id, shard.change.id, "By the test.") if shard.change else None
            if txn is not None:
                self.cluster.ask(txn)
                return


def _never() -> bool:
    return False


def _harms() -> list[Any]:
    """In the default run those that end things; the long ones are those that take long."""
    return [
        harm if harm.startswith(("kill", "cancel", "abort")) else pytest.param(harm, marks=pytest.mark.long)
        for harm in HARMS
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("harm", _harms())
def test_harm_at_every_step_of_a_change_loses_nothing(kind: str, harm: str) -> None:
    steps = steps_of(kind)
    for at, step in enumerate(steps):
        story = Story(kind, at, harm)
        try:
            story.cluster.finish()
        except AssertionError as error:
            raise AssertionError(f"{harm} at step {at}, {step}: {error}") from error


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_goes_through_the_steps_of_the_specification(kind: str) -> None:
    story = Story(kind, None, "")
    assert [job.state for job in story.cluster.topology.jobs.values()] == ["done"]
    seen = [step.partition(" at ")[0] for step in steps_of(kind)]
    wanted = {
        "move": ["after staging", "fetched", "after fence", "fence told", "synced", "commit sent", "after adopt"],
        "split": [
            "after staging",
            "after fence",
            "synced",
            "commit sent",
            "after adopt",
            "after drop",
            "after unfence",
        ],
        "merge": [
            "after staging",
            "after fence",
            "synced",
            "commit sent",
            "after adopt",
            "after drop",
            "after unfence",
        ],
    }[kind]
    assert [step for step in wanted if step not in seen] == []


def steps_of(kind: str) -> list[str]:
    return Story(kind, None, "").steps
