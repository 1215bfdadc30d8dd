"""Who asks things of a simulated cluster: clients that read, write, delete and scan, and controllers.

A client stands for a router and its user: it routes by a view that may be old, sends a refused or unanswered request
again under the same token, and writes down what it was told. A page of a scan counts as a read of every key it covers.
"""

from __future__ import annotations

from typing import Any

from shardkv.control.controller import Controller
from shardkv.control.reports import NodeReport
from shardkv.errors import UnknownKeyspace
from shardkv.topology.documents import ShardDocument
from tests.shardkv.control.sim_node import Node
from tests.shardkv.control.sim_world import Process, World
from tests.worlds.linearizability import FOREVER, UNKNOWN, Delete, Get, Operation, Put

ATTEMPTS_MAX = 60
RETRY_S = (0.03, 0.15)


class Client(Process):
    """One operation at a time, until `stop`."""

    def __init__(self, world: World, name: str, keys: list[bytes]) -> None:
        super().__init__(world, name)
        self.keys = keys
        self.operations: list[Operation] = []
        self.stopped = False
        self.scans = 0
        self.calls: dict[int, _Call | _Scan] = {}
        self._number = 0
        self._requests = 0

    def boot(self) -> None:
        self.later(0.3 + self.world.rng.random() * 0.2, self._next)

    def _next(self) -> None:
        rng = self.world.rng
        if self.stopped:
            return
        chance, key = rng.random(), rng.choice(self.keys)
        if chance < 0.06:
            _Scan(self, None).go()
            return
        self._number += 1
        value: Any = ... if chance < 0.45 else None if chance < 0.65 else f"{self.name}-{self._number}"
        _Call(self, key, value, (self.name, self._number)).go()

    def done(self) -> None:
        self.later(self.world.rng.uniform(0, 0.05), self._next)

    def shard_for(self, key: bytes) -> ShardDocument | None:
        try:
            return self.view.keyspace("default").shard_for(key)
        except UnknownKeyspace:
            return None

    def node_of(self, shard: ShardDocument) -> Node | None:
        node = self.world.processes.get(shard.node)
        return node if isinstance(node, Node) else None

    # Answers come to whatever waits for that number

    def refused(self, number: int) -> None:
        """A retry is under way already."""

    def answered(self, number: int, result: Any) -> None:
        call = self.calls.get(number)
        if call is not None:
            call.answered(result)

    def expect(self, call: _Call | _Scan) -> int:
        """A number under which `call` gets its answer."""
        self._requests += 1
        self.calls[self._requests] = call
        return self._requests

    def forget(self, number: int) -> None:
        self.calls.pop(number, None)


class _Call:
    """One read (value ...), put or delete (value None)."""

    def __init__(self, client: Client, key: bytes, value: Any, token: tuple[str, int]) -> None:
        self.client = client
        self.key, self.value, self.token = key, value, token
        self.begun = client.world.now
        self.number = client.expect(self)
        self.attempt = 0

    def go(self) -> None:
        """Send it, again and again, to whoever the newest view says."""
        client = self.client
        if client.calls.get(self.number) is not self:
            return
        self.attempt += 1
        if self.attempt > ATTEMPTS_MAX:
            self._end(UNKNOWN, FOREVER)
            return
        shard = client.shard_for(self.key)
        node = client.node_of(shard) if shard else None
        if shard is not None and node is not None:
            arguments = (client, self.number, shard.id, shard.epoch, self.key, self.value, self.token)
            client.world.send(client.name, node.name, node.request, *arguments)
        client.later(client.world.rng.uniform(*RETRY_S), self.go)

    def answered(self, result: Any) -> None:
        self._end(result, self.client.world.now)

    def _end(self, result: Any, end: float) -> None:
        client, action = self.client, self._action()
        client.forget(self.number)
        if not (isinstance(action, Get) and end == FOREVER):
            client.operations.append(Operation(self.key, action, result, self.begun, end, client.name))
        client.done()

    def _action(self) -> Get | Delete | Put:
        return Get() if self.value is ... else Delete() if self.value is None else Put(self.value)


class _Scan:
    """A page after the other, shard after shard, by the newest view each time."""

    def __init__(self, client: Client, at: Any) -> None:
        self.client = client
        self.at = at
        self.attempt = 0
        self._sent = 0
        self._renew()

    def _renew(self) -> None:
        self.begun = self.client.world.now
        self.number = self.client.expect(self)
        self.asked: ShardDocument | None = None

    def go(self, sent: int | None = None) -> None:
        client = self.client
        if client.calls.get(self.number) is not self or (sent is not None and sent != self._sent):
            return
        self.attempt += 1
        self._sent += 1
        if self.attempt > ATTEMPTS_MAX:
            client.forget(self.number)
            client.done()
            return
        self.asked = self._shard()
        node = client.node_of(self.asked) if self.asked else None
        if self.asked is not None and node is not None:
            client.forget(self.number)
            self.number = client.expect(self)
            client.world.send(client.name, node.name, node.scan, client, self.number, self.asked.id, self.asked.epoch)
        client.later(client.world.rng.uniform(*RETRY_S), self.go, self._sent)

    def _shard(self) -> ShardDocument | None:
        """The one that the cursor is in."""
        keyspace = self.client.view.keyspaces.get("default")
        if keyspace is None:
            return None
        later = [shard for shard in keyspace.shards if self.at is None or shard.stop is None or shard.stop > self.at]
        return later[0] if later else None

    def answered(self, rows: dict[bytes, str]) -> None:
        client, asked = self.client, self.asked
        assert asked is not None
        client.forget(self.number)
        for key in client.keys:
            token = client.world.token(key)
            covered = (self.at is None or token >= self.at) and token >= asked.start
            if covered and (asked.stop is None or token < asked.stop):
                operation = Operation(key, Get(), rows.get(key), self.begun, client.world.now, f"{client.name} scan")
                client.operations.append(operation)
        if asked.stop is None:
            client.scans += 1
            client.done()
            return
        self.at = asked.stop
        self.attempt = 0
        self._renew()
        self.go()


class SimController(Process):
    """The real controller in a loop. Its clock never goes back; the time of day it writes down jumps."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name)
        self.wall_shift_ms = 0

    def boot(self) -> None:
        self._controller = Controller(lambda: f"{self.world.rng.getrandbits(64):016x}")
        self.later(self.world.rng.uniform(0.05, 0.2), self._tick)

    def hear(self, report: NodeReport) -> None:
        self._controller.hear(report, self._now_ms())

    def _now_ms(self) -> int:
        return int(self.world.now * 1000)

    def _tick(self) -> None:
        if self.view.revision:
            wall_ms = self._now_ms() + 1_700_000_000_000 + self.wall_shift_ms
            for txn in self._controller.tick(self.view, self._now_ms(), wall_ms):
                self.world.step("controller sends", self)
                self.transact(txn)
        self.later(self.world.rng.uniform(0.03, 0.1), self._tick)
