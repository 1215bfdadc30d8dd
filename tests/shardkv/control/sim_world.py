"""Time, links, processes and the metadata store of a simulated cluster: one process, one thread, one seed.

Everything that happens is an event at a time; nothing else makes progress. Messages are delayed, lost, duplicated and
overtake each other as `World` says at that time; links are cut one way. A process is killed, paused, or started anew;
what it remembers beyond its disk dies with its life. The store never fails: who talks to it may be cut off.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from typing import Any

from shardkv.topology.documents import HASH_TOKENS, ShardDocument
from shardkv.topology.view import Entry, Topology
from shardkv.wire.messages import MetaTxn, MetaTxnReply

Hook = Callable[[str, "Process"], None]


class Killed(Exception):
    """The process whose code runs was killed at this very point."""


class Broken(AssertionError):
    """What must always hold does not."""


class World:
    """The event queue, the links, and what is wrong with them now."""

    def __init__(self, seed: int, removed: frozenset[str] = frozenset()) -> None:
        self.rng = random.Random(seed)
        self.removed = removed
        """Names of rules that are not kept."""
        self.now = 0.0
        self.cut: set[tuple[str, str]] = set()
        self.loss = 0.0
        self.duplicates = 0.0
        self.slow = 0.0
        """Share of messages that take up to `late_s`."""
        self.late_s = 3.0
        self.slow_disk_s = 0.0
        self.damage = 0.0
        """Share of tail entries that get lost between a node's memory and its staging."""
        self.hook: Hook = lambda step, process: None
        self.steps: list[tuple[str, str]] = []
        """(step, process) in the order they were made durable."""
        self.token: Callable[[bytes], Any] = lambda key: key
        """Of a key in the keyspace under test."""
        self.store = Store(self)
        self.processes: dict[str, Process] = {}
        self.intervals: dict[int, tuple[Any, Any]] = {}
        """Of every shard there ever was: its first token, and one above all of its tokens."""
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = 0

    def at(self, delay_s: float, run: Callable[..., None], *arguments: Any) -> None:
        self._number += 1
        heapq.heappush(self._queue, (self.now + delay_s, self._number, run, arguments))

    def run_until(self, end: float, done: Callable[[], bool] = lambda: False) -> None:
        while self._queue and self._queue[0][0] <= end and not done():
            self.now, _, run, arguments = heapq.heappop(self._queue)
            run(*arguments)
        if not done():
            self.now = end

    def calm(self) -> None:
        """All links are good, and nothing gets lost or late."""
        self.cut.clear()
        self.loss = self.duplicates = self.slow = self.slow_disk_s = self.damage = 0.0

    def send(self, source: str, target: str, deliver: Callable[..., None], *arguments: Any) -> None:
        """Call `deliver` after a while, unless the message is lost on its way. `target`: a process, "M" or a client."""
        for _ in range(2 if self.rng.random() < self.duplicates else 1):
            if (source, target) not in self.cut and self.rng.random() >= self.loss:
                late = self.slow and self.rng.random() < self.slow
                delay_s = self.rng.uniform(0.05, self.late_s) if late else self.rng.uniform(0.0005, 0.01)
                self.at(delay_s, self._arrive, target, deliver, arguments)

    def _arrive(self, target: str, deliver: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        process = self.processes.get(target)
        if process is None:
            deliver(*arguments)
        elif process.up and process.paused_until > self.now:
            self.at(process.paused_until - self.now + 0.0001, self._arrive, target, deliver, arguments)
        elif process.up:
            process.guarded(deliver, *arguments)

    def disk_s(self) -> float:
        """How long a sync takes."""
        return self.rng.uniform(0.0003, 0.004) + (self.rng.uniform(0, self.slow_disk_s) if self.slow_disk_s else 0.0)

    def note_shard(self, shard: ShardDocument) -> None:
        """Remember its interval."""
        end: Any = b"\xff" * 9 if isinstance(shard.start, bytes) else HASH_TOKENS
        self.intervals[shard.id] = (shard.start, end if shard.stop is None else shard.stop)

    def step(self, name: str, process: Process) -> None:
        """Something became durable, or is about to: the hook may kill or pause the process right here."""
        self.steps.append((name, process.name))
        self.hook(name, process)


class Store:
    """The metadata store: real documents, real compares, and a view of every revision for whoever judges."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._entries: dict[str, tuple[bytes | None, int]] = {}
        self.topology = Topology()
        self.followers: dict[str, Callable[[int, list[Entry]], None]] = {}
        self.on_change: Callable[[Topology], None] = lambda topology: None

    def apply(self, txn: MetaTxn) -> MetaTxnReply:
        if not all(self._revision(compare.key) == compare.revision for compare in txn.compares):
            return MetaTxnReply(False, self.topology.revision)
        if txn.puts:
            revision = self.topology.revision + 1
            for put in txn.puts:
                self._entries[put.key] = (put.value, revision)
            self.topology = self.topology.with_entries(revision, [(put.key, put.value, revision) for put in txn.puts])
            self.on_change(self.topology)
            for name in self.followers:
                self._tell(name, revision - 1)
        return MetaTxnReply(True, self.topology.revision)

    def _revision(self, key: str) -> int:
        value, revision = self._entries.get(key, (None, 0))
        return revision if value is not None else 0

    def _tell(self, name: str, since: int) -> None:
        entries: list[Entry] = [(key, value, at) for key, (value, at) in self._entries.items() if at > since]
        self._world.send("M", name, self.followers[name], since, self.topology.revision, entries)

    def ask(self, name: str, since: int) -> None:
        """A follower says how far it is; it is told what came after that."""
        if name in self.followers and since < self.topology.revision:
            self._tell(name, since)


class Process:
    """Something with a life: what was timed or asked in an earlier life never comes back to a later one."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.life = 0
        self.up = False
        self.paused_until = 0.0
        self.view = Topology()
        world.processes[name] = self

    def start(self) -> None:
        self.up = True
        self.life += 1
        self.paused_until = 0.0
        self.view = Topology()
        self.world.store.followers[self.name] = self._told
        self.guarded(self.boot)
        self.later(self.world.rng.uniform(0, 0.05), self._poll)

    def kill(self) -> None:
        self.up = False
        self.life += 1
        self.world.store.followers.pop(self.name, None)
        self.crashed()

    def pause(self, for_s: float) -> None:
        self.paused_until = max(self.paused_until, self.world.now + for_s)

    def guarded(self, run: Callable[..., None], *arguments: Any) -> None:
        try:
            run(*arguments)
        except Killed:
            if self.up:
                self.kill()

    def later(self, delay_s: float, run: Callable[..., None], *arguments: Any) -> None:
        self.world.at(delay_s, self._wake, self.life, run, arguments)

    def _wake(self, life: int, run: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if life != self.life or not self.up:
            return
        if self.paused_until > self.world.now:
            self.world.at(self.paused_until - self.world.now + 0.0001, self._wake, life, run, arguments)
        else:
            self.guarded(run, *arguments)

    # The store

    def transact(self, txn: MetaTxn, told: Callable[[MetaTxnReply], None] = lambda reply: None) -> None:
        """Send a transaction. The answer may never come, whatever became of it."""
        life = self.life

        def arrive() -> None:
            reply = self.world.store.apply(txn)
            self.world.send("M", self.name, answer, reply)

        def answer(reply: MetaTxnReply) -> None:
            if life == self.life:
                told(reply)

        self.world.send(self.name, "M", arrive)

    def _poll(self) -> None:
        self.world.send(self.name, "M", self.world.store.ask, self.name, self.view.revision)
        self.later(self.world.rng.uniform(0.2, 0.4), self._poll)

    def _told(self, since: int, revision: int, entries: list[Entry]) -> None:
        old = since > self.view.revision or revision <= self.view.revision
        if old and not ("forward" in self.world.removed and since <= self.view.revision and revision):
            return
        self.view = self.view.with_entries(revision, entries)
        self.on_view()

    # To be said by each kind

    def boot(self) -> None:
        """A new life begins."""

    def crashed(self) -> None:
        """The life ended; only what is on disk is left."""

    def on_view(self) -> None:
        """`view` is a newer one."""
