"""A simulated cluster under load and faults, and the judgement of what happened.

`run(seed)` is one story: nodes, two controllers, clients, and somebody who asks for moves, splits, merges and removals,
and cancels them; things break for a while, then everything heals, jobs end, and this must hold:

- no two nodes ever served one token (checked whenever a node's serving changes);
- what clients were told is linearizable, key by key, scans and the last reads included: no acknowledged write is lost,
  no delete is undone, no write is applied twice;
- every job has ended, the keyspace is covered exactly, every shard is served, and no node has a staging, a fence, or a
  tablet that is nobody's.
"""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from shardkv.control import changes, jobs
from shardkv.control.duties import Serve
from shardkv.control.keyspaces import create_keyspace
from shardkv.control.labels import owned_label
from shardkv.errors import InvalidArgument
from shardkv.topology.documents import (
    CONTROLLER_SETTINGS,
    NODES,
    ControllerSettings,
    NodeDocument,
    Partition,
    encode_document,
)
from shardkv.topology.tokens import TOKEN_OF
from shardkv.topology.view import Topology
from shardkv.wire.messages import MetaPut, MetaTxn
from tests.shardkv.control.sim_node import Disk, Node
from tests.shardkv.control.sim_people import Client, SimController
from tests.shardkv.control.sim_world import Broken, Killed, World
from tests.worlds.linearizability import Get, Register, check

NODE_NAMES = ("n1", "n2", "n3")
KEYS = [b"%c" % letter for letter in range(ord("a"), ord("a") + 6)]
CUTS = [b"c", b"e"]
STORM_S = 12.0
HEAL_S = 30.0
SETTINGS = ControllerSettings(
    attempts_max=1000,
    backoff_ms=100,
    backoff_most_ms=500,
    stuck_ms=2_500,
    away_ms=2_000,
    split_bytes=350,
    merge_bytes=150,
    merge_quiet_ms=1_000,
    jobs_kept=5,
)
DELICATE = {
    "after fence",
    "fence told",
    "synced",
    "before commit",
    "commit sent",
    "after adopt",
    "before adopt",
    "after drop",
}
"""Steps at which more goes wrong than elsewhere."""


class Cluster:
    """The cast, wired up, with a keyspace of three shards."""

    def __init__(
        self,
        seed: int,
        removed: frozenset[str] = frozenset(),
        *,
        automatic: bool = False,
        partition: Partition = "range",
    ) -> None:
        self.world = world = World(seed, removed)
        self.token = TOKEN_OF[partition]
        world.token = self.token
        world.store.on_change = self._note_shards
        settings = ControllerSettings(
            **{
                **{name: getattr(SETTINGS, name) for name in SETTINGS.__struct_fields__},
                "auto_split": automatic,
                "auto_merge": automatic,
            }
        )
        self.nodes = [Node(world, name) for name in NODE_NAMES]
        documents: dict[str, Any] = {CONTROLLER_SETTINGS: settings}
        documents |= {f"{NODES}{name}": NodeDocument(name, "", 0, f"{name}:1", 1) for name in NODE_NAMES}
        world.store.apply(MetaTxn([], [MetaPut(key, encode_document(each)) for key, each in documents.items()]))
        cuts = CUTS if partition == "range" else []
        world.store.apply(create_keyspace(world.store.topology, "default", partition, shards=3, split_at=cuts))
        self.controllers = [SimController(world, f"c{number}") for number in (1, 2)]
        self.clients = [Client(world, f"k{number}", KEYS) for number in (1, 2, 3, 4)]
        for node in self.nodes:
            node.reports_to = list(self.controllers)
        for process in [*self.nodes, *self.controllers, *self.clients]:
            process.start()

    def _note_shards(self, topology: Topology) -> None:
        for shard in topology.shards.values():
            self.world.note_shard(shard)

    @property
    def topology(self) -> Topology:
        return self.world.store.topology

    def ask(self, txn: MetaTxn) -> None:
        self.world.store.apply(txn)

    # The end

    def heal(self) -> None:
        """Nothing breaks any more; whoever is down is started. Jobs go on, or are all cancelled where they are."""
        self.world.calm()
        self.world.hook = lambda step, process: None
        for process in [*self.nodes, *self.controllers]:
            process.paused_until = 0.0
            if not process.up:
                process.start()
        cancels = self.world.rng.random() < 0.5
        for job in list(self.topology.jobs.values()):
            if job.state in jobs.ACTIVE and cancels:
                self.ask(jobs.cancel(self.topology, job.id))
            elif job.state == "paused":
                self.ask(jobs.resume(self.topology, job.id))

    def is_settled(self) -> bool:
        topology = self.topology
        if any(shard.change for shard in topology.shards.values()):
            return False
        return all(job.state in jobs.ENDED for job in topology.jobs.values()) and not self.left_over()

    def left_over(self) -> str:
        """What should not be there, or is missing; empty: all is well."""
        owners = {shard.id: shard for shard in self.topology.shards.values()}
        for node in self.nodes:
            wanted = {owned_label(shard.id, shard.owned_since) for shard in owners.values() if shard.node == node.name}
            serving = {
                shard: Serve(shard, owners[shard].epoch, owned_label(shard, owners[shard].owned_since))
                for shard in owners
                if owners[shard].node == node.name
            }
            if {*node.disk.tablets} != wanted:
                return f"{node.name} has tablets {sorted(node.disk.tablets)} and should have {sorted(wanted)}"
            if node.disk.fences or node.fencing:
                return f"{node.name} has fences {sorted({*node.disk.fences, *node.fencing})}"
            if node.serving != serving:
                return f"{node.name} serves {node.serving} and should serve {serving}"
        return ""

    def finish(self) -> None:
        """Heal, wait until all is settled, read everything once more, judge. Raises AssertionError."""
        world = self.world
        self.heal()
        end = world.now + HEAL_S
        world.run_until(end, self.is_settled)
        if not self.is_settled():
            open_jobs = [job for job in self.topology.jobs.values() if job.state not in jobs.ENDED]
            changing = [shard for shard in self.topology.shards.values() if shard.change]
            raise Broken(f"not settled: {self.left_over()}; jobs {open_jobs}; changes {changing}")
        for client in self.clients:
            client.stopped = True
        world.run_until(world.now + 12, lambda: not any(client.calls for client in self.clients))
        self.topology.keyspace("default").check()
        self._read_all()
        operations = [operation for client in self.clients for operation in client.operations]
        check(operations, Register())

    def _read_all(self) -> None:
        client = self.clients[0]
        for key in KEYS:
            shard = self.topology.keyspace("default").shard_for(key)
            node = next(node for node in self.nodes if node.name == shard.node)
            tablet = node.disk.tablets[owned_label(shard.id, shard.owned_since)]
            operation = type(client.operations[0])(key, Get(), tablet.value(key), self.world.now, self.world.now + 1)
            client.operations.append(operation)

    def counts(self) -> Counter[str]:
        """What happened, for the report of a run."""
        topology = self.topology
        found = Counter({f"job {job.kind} {job.state}": 1 for job in topology.jobs.values()})
        found["operations"] = sum(len(client.operations) for client in self.clients)
        found["scans"] = sum(client.scans for client in self.clients)
        found["commits"] = sum(1 for step, _ in self.world.steps if step == "commit answered")
        found["starts"] = sum(1 for step, _ in self.world.steps if step == "start")
        return found


@dataclass(frozen=True)
class Tilt:
    """What goes wrong more often than it would by chance: for a rule that only matters then."""

    slow: float = 0.0
    late_s: float = 3.0
    duplicates: float = 0.0
    damage: float = 0.0
    loss: float = 0.0
    slow_disk_s: float = 0.0
    often: str = ""
    """A fault that is chosen every other time."""
    ambush: tuple[str, ...] = ()
    """(step, what happens there every other time): see Storm._ambush."""
    fury: float = 0.0
    """Of everything else; 0: by chance."""


NO_TILT = Tilt()


class Storm:
    """Everything that goes wrong, and everything that is asked for, until `STORM_S`."""

    def __init__(self, cluster: Cluster, tilt: Tilt) -> None:
        self.cluster = cluster
        self.tilt = tilt
        self.world = cluster.world
        self.rng = cluster.world.rng
        self._old_disks: list[tuple[Node, Disk]] = []
        self._removed_one = False
        self.fury = self.rng.choice([0.2, 0.5, 1.0])
        self.fury = tilt.fury or self.fury
        self._tilt()
        self.world.hook = self._at_step
        self.world.at(0.6, self._break)
        self.world.at(0.4, self._ask)

    def _over(self) -> bool:
        return self.world.now > STORM_S

    def _tilt(self) -> None:
        world, tilt = self.world, self.tilt
        world.late_s = tilt.late_s
        world.slow, world.damage = max(world.slow, tilt.slow), max(world.damage, tilt.damage)
        world.duplicates = max(world.duplicates, tilt.duplicates)
        world.loss = max(world.loss, tilt.loss)
        world.slow_disk_s = max(world.slow_disk_s, tilt.slow_disk_s)

    # Faults

    def _ambush(self, node: Node, what: str) -> None:
        """Something bad at the worst moment, to a node that works on a change, and to who works with it."""
        world, rng = self.world, self.rng
        sources = [world.processes[work.source] for work in node.works.values() if work.source != node.name]
        match what:
            case "kill source":
                self._restart_quickly(sources)
            case "kill source, pause the others":
                self._restart_quickly(sources)
                for each in [node, *self.cluster.controllers]:
                    each.pause(rng.uniform(0.4, 0.8))
            case "source and clients hear nothing":
                for name in [*(source.name for source in sources), "k1", "k2"]:
                    world.cut.add(("M", name))
                    world.at(rng.uniform(0.5, 1.0), world.cut.discard, ("M", name))
            case "abort":
                self._abort_one(node)
            case "late":
                world.slow, world.late_s = 1.0, 0.6
                world.at(0.001, self._calm_down)
            case "pause":
                node.pause(rng.uniform(0.5, 1.5))

    def _restart_quickly(self, nodes: list[Any]) -> None:
        for node in nodes:
            if node.up:
                node.kill()
                self.world.at(0.005, self._start, node)

    def _calm_down(self) -> None:
        self.world.slow = self.tilt.slow

    def _at_step(self, step: str, process: Any) -> None:
        """Now and then somebody dies, stands still, or is cut off, just where something became durable or was sent."""
        if self._over() or step in ("start", "registered") or isinstance(process, SimController):
            return
        if self.tilt.ambush and step == self.tilt.ambush[0] and self.rng.random() < 0.5:
            self._ambush(process, self.tilt.ambush[1])
        chance, weight = self.rng.random(), self.fury * (4 if step in DELICATE else 1)
        if chance < 0.015 * weight:
            self.world.at(self.rng.uniform(0.02, 1.5), self._start, process)
            raise Killed
        if chance < 0.025 * weight:
            process.pause(self.rng.uniform(0.2, 3.0))
        elif chance < 0.04 * weight:
            link = self.rng.choice([(process.name, "M"), ("M", process.name)])
            self.world.cut.add(link)
            self.world.at(self.rng.uniform(0.2, 3.0), self.world.cut.discard, link)
        elif chance < 0.055 * weight:
            self._abort_one(process)

    def _abort_one(self, node: Node) -> None:
        """Anybody may abort anything at any time."""
        changing = [
            each for each in self.cluster.topology.shards.values() if each.change and each.change.id in node.works
        ]
        if changing:
            shard = self.rng.choice(changing)
            assert shard.change is not None
            txn = changes.abort(self.cluster.topology, shard.id, shard.change.id, "Somebody wanted it.")
            if txn is not None:
                self.world.at(self.rng.uniform(0, 0.015), self.cluster.ask, txn)

    def _break(self) -> None:
        if self._over():
            return
        kind = self.rng.choice(
            [
                "kill",
                "kill",
                "pause",
                "pause",
                "cut",
                "cut",
                "store cut",
                "ack cut",
                "loss",
                "heal",
                "heal",
                "controller",
                "old disk",
                "clock",
                "slow disk",
                "damage",
            ]
        )
        if self.tilt.often and self.rng.random() < 0.5:
            kind = self.tilt.often
        getattr(self, f"_{kind.replace(' ', '_')}")()
        self._tilt()
        self.world.at(self.rng.uniform(0.1, 0.8) / self.fury, self._break)

    def _node(self) -> Node:
        """Preferably one that is in the middle of something."""
        busy = [node for node in self.cluster.nodes if node.works and node.up]
        return self.rng.choice(busy if busy and self.rng.random() < 0.7 else self.cluster.nodes)

    def _kill(self) -> None:
        node = self._node()
        if node.up:
            node.kill()
            self.world.at(self.rng.uniform(0.05, 2), self._start, node)

    def _start(self, process: Any) -> None:
        if not process.up:
            process.start()

    def _pause(self) -> None:
        self._node().pause(self.rng.uniform(0.2, 3))

    def _cut(self) -> None:
        others = [*NODE_NAMES, "k1", "k2", "k3", "k4", "c1", "c2"]
        pair = [self._node().name, self.rng.choice(others)]
        self.rng.shuffle(pair)
        self.world.cut.add((pair[0], pair[1]))

    def _ack_cut(self) -> None:
        """Some clients are heard and do not hear: what they wrote is applied, and sent again."""
        for name in self.rng.sample(["k1", "k2", "k3", "k4"], 2):
            for node in NODE_NAMES:
                self.world.cut.add((node, name))
                self.world.at(self.rng.uniform(0.3, 0.8), self.world.cut.discard, (node, name))

    def _store_cut(self) -> None:
        name = self.rng.choice([self._node().name, "c1", "c2", "k1"])
        self.world.cut.add(self.rng.choice([(name, "M"), ("M", name)]))

    def _loss(self) -> None:
        world = self.world
        world.loss, world.slow = self.rng.choice([0, 0.1, 0.3]), self.rng.choice([0.0, 0.05, 0.2])
        world.duplicates = self.rng.choice([0, 0.1, 0.3])

    def _heal(self) -> None:
        self.world.cut.clear()
        self.world.loss = 0.0

    def _controller(self) -> None:
        controller = self.rng.choice(self.cluster.controllers)
        if controller.up and self.rng.random() < 0.5:
            controller.kill()
            self.world.at(self.rng.uniform(0.1, 2), self._start, controller)
        else:
            controller.pause(self.rng.uniform(0.5, 4))

    def _clock(self) -> None:
        self.rng.choice(self.cluster.controllers).wall_shift_ms = self.rng.choice([-(10**8), -5000, 0, 5000, 10**8])

    def _slow_disk(self) -> None:
        self.world.slow_disk_s = self.rng.choice([0.0, 0.05, 0.4])

    def _damage(self) -> None:
        self.world.damage = self.rng.choice([0.0, 0.1, 0.3])

    def _old_disk(self) -> None:
        """A copy of a directory is kept; later, when the node has started anew, the copy is put in its place."""
        node = self._node()
        for kept, disk in self._old_disks:
            if kept is node and self.cluster.topology.nodes[node.name].start_id not in disk.start_ids:
                self._old_disks.remove((kept, disk))
                if node.up:
                    node.kill()
                self._start_on(node, disk)
                return
        if node.registered and not any(tablet.pending for tablet in node.disk.tablets.values()):
            self._old_disks.append((node, copy.deepcopy(node.disk)))

    def _start_on(self, node: Node, disk: Disk) -> None:
        mine, node.disk = node.disk, disk
        node.refuses_to_start = False
        node.start()

        def back() -> None:
            if node.up:
                node.kill()
            node.disk = mine
            node.start()

        self.world.at(self.rng.uniform(0.3, 2), back)

    # Wishes

    def _ask(self) -> None:
        if self._over():
            return
        with suppress(InvalidArgument):
            txn = self._wish()
            if txn is not None:
                self.cluster.ask(txn)
        self.world.at(self.rng.uniform(0.02, 0.2), self._ask)

    def _wish(self) -> MetaTxn | None:
        topology, rng, now_ms = self.cluster.topology, self.rng, int(self.world.now * 1000)
        keyspace = topology.keyspaces.get("default")
        if keyspace is None:
            return None
        shards, node = keyspace.shards, rng.choice(NODE_NAMES)
        underway = [job.id for job in topology.jobs.values() if job.state in jobs.ACTIVE]
        kind = rng.choices(
            ["move", "split", "merge", "rebalance", "cancel", "pause", "resume", "rate", "remove"],
            [10, 4, 4, 1, 2, 1, 3, 1, 0.2],
        )[0]
        position = rng.randrange(len(shards))
        match kind:
            case "move":
                return jobs.ask_move(topology, shards[position].id, node, now_ms)
            case "split":
                at = self.cluster.token(rng.choice(KEYS))
                return jobs.ask_split(topology, keyspace.shard_for(rng.choice(KEYS)).id, now_ms, at=at)
            case "merge" if position + 1 < len(shards):
                return jobs.ask_merge(topology, shards[position].id, shards[position + 1].id, now_ms)
            case "rebalance":
                return jobs.ask_rebalance(topology, now_ms)
            case "remove" if not self._removed_one:
                self._removed_one = True
                return jobs.ask_remove(topology, node, now_ms)
            case "cancel" | "pause" | "resume" if underway:
                steer = {"cancel": jobs.cancel, "pause": jobs.pause, "resume": jobs.resume}[kind]
                return steer(topology, rng.choice(underway))
            case "rate" if underway:
                return jobs.set_rate(topology, rng.choice(underway), rng.choice([0, 1000]))
        return None


def run(
    seed: int,
    removed: frozenset[str] = frozenset(),
    *,
    partition: Partition | None = None,
    tilt: Tilt = NO_TILT,
) -> Counter[str]:
    """One story. Raises AssertionError when something did not hold; the message says what."""
    kind: Partition = partition or ("hash" if seed % 3 == 2 else "range")
    cluster = Cluster(seed, removed, automatic=seed % 4 == 3, partition=kind)
    Storm(cluster, tilt)
    cluster.world.run_until(STORM_S)
    cluster.finish()
    return cluster.counts()


if __name__ == "__main__":
    import sys

    for argument in sys.argv[1:]:
        print(argument, dict(run(int(argument))))
