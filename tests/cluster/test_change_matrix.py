"""At every step of a move, split and merge one process stands still and another one dies: the job ends all the same.

Cases are (kind, step, fault). The process whose step it is stops there, the fault strikes, then it goes on:

    peer      kill -9 of the other node
    both      kill -9 of both nodes
    meta      kill -9 of the metadata process
    router    kill -9 of the router
    late      nothing dies; the process stands still for longer than the fence's watchdog, cut off from everybody
    cancel    nothing dies; a person cancels the job

After each: the job is done (or cancelled), everything acknowledged is there, one owner per shard, nothing left over,
and the status of the cluster says so. A tenth of the cases is run by default.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from shardkv import Admin
from shardkv.errors import InvalidArgument
from shardkv_node.changes.stops import VARIABLE
from tests.worlds.changes import Meta
from tests.worlds.cluster import until
from tests.worlds.history import Writer
from tests.worlds.storm import CONFIG, check_whole, left_over
from tests.worlds.wired_cluster import WiredCluster, wired_cluster

ROWS = {b"%c-still-%05d" % (b"09afkmpsuz"[number % 10], number): b"%d" % number * 20 for number in range(1_000)}
SOURCE = ("source.begin", "source.fencing", "source.fenced", "source.drop", "source.unfence")
TARGET = ("target.ship", "target.staged", "target.tail", "target.fence", "target.commit", "target.committed")
TARGET_END = ("target.adopt", "target.serve")
OWNER = ("fencing", "fenced", "staged", "commit", "committed", "adopt", "drop")
WATCHDOG_S = 2.5
WRITERS = 3

CASES = [
    *(
        ("move", step, fault)
        for step in (*SOURCE, *TARGET, *TARGET_END)
        for fault in ("peer", "both", "meta", "router", "late", "cancel")
    ),
    *(
        (kind, f"owner.{step}", fault)
        for kind in ("split", "merge")
        for step in OWNER
        for fault in ("both", "meta", "router", "late", "cancel")
    ),
]
DEFAULT = {
    ("move", "source.fenced", "peer"),
    ("move", "source.fenced", "cancel"),
    ("move", "target.commit", "both"),
    ("move", "target.commit", "late"),
    ("move", "target.committed", "peer"),
    ("split", "owner.commit", "meta"),
    ("merge", "owner.fenced", "late"),
    ("merge", "owner.committed", "both"),
}
"""With those of test_moves_interrupted.py a tenth of all cases."""
assert set(CASES) >= DEFAULT


@pytest.fixture(scope="module", params=["hash", pytest.param("range", marks=pytest.mark.long)])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WiredCluster]:
    directory = tmp_path_factory.mktemp(f"matrix-{request.param}")
    with wired_cluster(directory, partition=request.param, nodes=2, routers=1, config=CONFIG) as found:
        with found.client(timeout=20) as db:
            db.put_many(ROWS)
        yield found


class Case:
    """A job that is interrupted, under writes."""

    def __init__(self, world: WiredCluster, kind: str, step: str) -> None:
        self.world = world
        self.kind = kind
        self.step = step
        self.job = 0
        self.ends: tuple[str, ...] = ("done",)
        self.admin = Admin(world.addresses, timeout=60)
        self.writers = [Writer(number, world.addresses, seed=time.time_ns()) for number in range(WRITERS)]
        shards = {one.id: one for one in self.admin.shards()}
        self.shard = max(shards.values(), key=lambda one: one.bytes or 0)
        if kind == "merge":
            self.shard, self.neighbour = self._halves()
        self.other = next(name for name in world.nodes if name != self.shard.node)
        self.stopped = self.other if step.startswith("target") else self.shard.node
        self.peer = next(name for name in world.nodes if name != self.stopped)

    def _halves(self) -> tuple:  # type: ignore[type-arg]
        made = self.admin.wait_job(self.admin.split_shard(self.shard.id).id)
        assert made.state == "done", made
        left, right = (next(one for one in self.admin.shards() if one.id == each) for each in made.done)
        return left, right

    def begin(self) -> None:
        """Until the process stands still at the step."""
        self.world.kill(self.stopped)
        self.world.restart(self.stopped, **{VARIABLE: f"{self.step}:STOP"})
        self.world.wait_serving()
        for writer in self.writers:
            writer.start()
        self.job = self._ask()
        until(self._is_stopped, timeout_s=30, what=f"{self.stopped} stops at {self.step}")

    def _ask(self) -> int:
        if self.kind == "move":
            return self.admin.move_shard(self.shard.id, self.other).id
        if self.kind == "split":
            return self.admin.split_shard(self.shard.id).id
        return self.admin.merge_shards(self.shard.id, self.neighbour.id).id

    def _is_stopped(self) -> bool:
        stat = Path(f"/proc/{self.world.pid(self.stopped)}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] == "T"

    def strike(self, fault: str) -> None:
        if fault == "late":
            self._be_late()
            return
        if fault == "cancel":
            self._cancel()
            return
        victims = {"peer": [self.peer], "both": [self.peer, self.stopped], "meta": ["meta"], "router": ["router-1"]}
        for name in victims[fault]:
            self.world.kill(name)
        for name in victims[fault]:
            self.world.restart(name)
        if self.stopped not in victims[fault]:
            self.world.signal(self.stopped, signal.SIGCONT)

    def _cancel(self) -> None:
        with suppress(InvalidArgument):  # it is done
            self.admin.cancel_job(self.job)
            self.ends = ("cancelled", "done")
        self.world.signal(self.stopped, signal.SIGCONT)

    def _be_late(self) -> None:
        proxy = self.world.proxies[self.stopped]
        self.world.wires.do(proxy.refuse)
        time.sleep(WATCHDOG_S)
        self.world.signal(self.stopped, signal.SIGCONT)
        time.sleep(0.3)
        self.world.wires.do(proxy.heal)

    def end(self) -> None:
        self.world.wait_serving()
        ended = self.admin.wait_job(self.job, timeout=60)
        assert ended.state in self.ends, ended
        for writer in self.writers:
            writer.stop()
        for writer in self.writers:
            writer.join(40)
            assert not writer.surprises, writer.surprises
        until(lambda: not left_over(self.world), timeout_s=30, what="nothing left over")
        partition = self.admin.keyspaces()[0].partition
        check_whole(Meta(self.world.proxies["meta"].address).topology(), partition)
        with self.world.client(timeout=20) as db:
            assert sum(writer.check(db) for writer in self.writers)
            assert {key: value for key, value in db.scan() if b"-still-" in key} == ROWS
            for writer in self.writers:
                db.delete_many(writer.expected)
            assert dict(db.scan()) == ROWS

    def clean_up(self) -> None:
        self.world.heal()
        for writer in self.writers:
            writer.stop()
        self.world.kill(self.stopped)  # it must not stop there once more
        for name in self.world.nodes:
            if not self.world.runs(name):
                self.world.restart(name)
        self.world.wait_serving()
        with self.world.client(timeout=20) as db:
            db.delete_many(key for writer in self.writers for key in writer.expected)
        self._merge_back()
        self.admin.close()

    def _merge_back(self) -> None:
        """So that the next case has as many shards as this one had."""
        shards = self.admin.shards()
        while len(shards) > 4:
            self.admin.wait_job(self.admin.merge_shards(shards[0].id, shards[1].id).id)
            shards = self.admin.shards()


@pytest.mark.parametrize(
    ("kind", "step", "fault"),
    [pytest.param(*case, marks=() if case in DEFAULT else pytest.mark.long) for case in CASES],
)
def test_a_job_ends_whoever_dies_at_any_step(world: WiredCluster, kind: str, step: str, fault: str) -> None:
    case = Case(world, kind, step)
    try:
        case.begin()
        case.strike(fault)
        case.end()
    except BaseException as error:
        error.add_note(f"{left_over(world)}\n{world.logs()}")
        raise
    finally:
        case.clean_up()
