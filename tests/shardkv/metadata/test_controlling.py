"""What the controller's loop does with a plan, and how it hears of nodes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from shardkv.control.reports import NodeReport
from shardkv.errors import OutcomeUnknown
from shardkv.metadata.admin import AdminVerbs
from shardkv.metadata.client import MetaClient
from shardkv.metadata.controlling import BUSY_ROUND_S, WATCHFUL_ROUND_S, ControlLoop, round_s
from shardkv.metadata.embedded import EmbeddedStore
from shardkv.metadata.leading import Leading, Term
from shardkv.metadata.view import StoreView
from shardkv.topology.documents import ControllerSettings, JobDocument, KeyspaceDocument, NodeDocument, encode_document
from shardkv.topology.view import Topology
from shardkv.transport.server import Connection, Server
from shardkv.wire.hello import Identity
from shardkv.wire.messages import MetaCompare, MetaPut, MetaTxn, Op, Request, decode_any, raw
from tests.shardkv.metadata.test_service import wait_for
from tests.shardkv.metadata.world import cluster_document, meta_client, meta_world

ME = Identity("meta", "meta", "c1")


Tick = Callable[[Topology], Sequence[MetaTxn]]


class FakeCore:
    """Decides by `tick`; remembers what it heard."""

    def __init__(self, tick: Tick) -> None:
        self.tick_ = tick
        self.heard: dict[str, NodeReport] = {}

    def hear(self, report: NodeReport, now_ms: int) -> None:
        self.heard[report.name] = report

    def tick(self, topology: Topology, now_ms: int, wall_ms: int) -> Sequence[MetaTxn]:
        return self.tick_(topology)


def never(topology: Topology) -> float | None:
    return None


class Controlled:
    """A store with a controller that leads it."""

    def __init__(self, directory: Path, core: FakeCore, every_s: Callable[[Topology], float | None]) -> None:
        self.store = EmbeddedStore(directory)
        self.view = StoreView()
        self.loop = ControlLoop(self.store, self.view, me=lambda: ME, new_core=lambda: core, round_s=every_s)

    async def put(self, key: str, value: bytes | None) -> int:
        return (await self.store.txn([], [MetaPut(key, value)])).revision


def run(
    tmp_path: Path,
    tick: Tick | FakeCore,
    story: Callable[[Controlled], Awaitable[None]],
    every_s: Callable[[Topology], float | None] = never,
) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            world = Controlled(tmp_path, tick if isinstance(tick, FakeCore) else FakeCore(tick), every_s)
            following = asyncio.ensure_future(world.store.follow(0, world.view.take))
            leading = asyncio.ensure_future(Leading(world.store, world.view, b"\x80").run(world.loop.run))
            try:
                await story(world)
            finally:
                for task in (leading, following):
                    task.cancel()
                await asyncio.gather(leading, following, return_exceptions=True)
                await world.store.aclose()

    asyncio.run(bounded())


def _raise_counter(topology: Topology) -> Sequence[MetaTxn]:
    """One step at a time: job 1 counts up to 5."""
    job = topology.jobs.get(1)
    if job is None or len(job.done) >= 5:
        return []
    raised = JobDocument(1, "rebalance", done=[*job.done, len(job.done)])
    known = topology.revision_of("jobs/1")
    return [MetaTxn([MetaCompare("jobs/1", known)], [MetaPut("jobs/1", encode_document(raised))])]


def test_a_plan_is_carried_out_step_by_step_to_its_end(tmp_path: Path) -> None:
    async def story(world: Controlled) -> None:
        await world.put("jobs/1", encode_document(JobDocument(1, "rebalance")))
        await wait_for(lambda: 1 in world.view.topology.jobs and len(world.view.topology.jobs[1].done) == 5)
        assert world.view.topology.jobs[1].done == [0, 1, 2, 3, 4]
        assert world.loop.txns == 5

    run(tmp_path, _raise_counter, story)


def test_an_unknown_outcome_is_settled_by_the_next_transaction(tmp_path: Path) -> None:
    async def story(world: Controlled) -> None:
        real, count = world.store.txn, [0]

        async def txn(compares: Any, puts: Any, **more: Any) -> Any:
            count[0] += puts[0].key == "jobs/1"
            applied = count[0] % 3 != 1 or puts[0].key != "jobs/1"
            reply = await real(compares, puts, **more) if applied else None
            if puts[0].key == "jobs/1" and count[0] % 3 != 0:
                raise OutcomeUnknown("The answer was lost.")
            return reply

        await world.put("jobs/1", encode_document(JobDocument(1, "rebalance")))
        world.store.txn = txn  # type: ignore[method-assign]
        await wait_for(lambda: 1 in world.view.topology.jobs and len(world.view.topology.jobs[1].done) >= 3)
        assert world.view.topology.jobs[1].done == list(range(len(world.view.topology.jobs[1].done)))

    run(tmp_path, _raise_counter, story)


def test_a_plan_that_is_always_refused_is_not_tried_in_a_loop(tmp_path: Path) -> None:
    planned: list[int] = []

    def plan(topology: Topology) -> Sequence[MetaTxn]:
        planned.append(topology.revision)
        return [MetaTxn([MetaCompare("never", 7)], [MetaPut("a", b"1")])]

    async def story(world: Controlled) -> None:
        await wait_for(lambda: planned)
        await asyncio.sleep(0.3)
        assert len(planned) <= 3
        seen = len(planned)
        await world.put("jobs/1", encode_document(JobDocument(1, "rebalance")))
        await wait_for(lambda: len(planned) > seen)

    run(tmp_path, plan, story)


def test_a_leader_of_the_past_carries_out_nothing(tmp_path: Path) -> None:
    async def story() -> None:
        store, view = EmbeddedStore(tmp_path), StoreView()
        following = asyncio.ensure_future(store.follow(0, view.take))
        await store.txn([], [MetaPut("jobs/1", encode_document(JobDocument(1, "rebalance")))])
        await store.txn([], [MetaPut("leader/controller", b"another")])
        past = Term(1, MetaCompare("leader/controller", 1), until=float("inf"))
        refused: list[bool] = []

        def tick(topology: Topology) -> Sequence[MetaTxn]:
            refused.append(len(topology.jobs[1].done) == 0)
            return _raise_counter(topology)

        core = FakeCore(tick)
        loop = ControlLoop(store, view, me=lambda: ME, new_core=lambda: core, round_s=lambda _: 0.01)
        running = asyncio.ensure_future(loop.run(past))
        await wait_for(lambda: len(refused) >= 2)
        assert all(refused)
        for task in (running, following):
            task.cancel()
        await asyncio.gather(running, following, return_exceptions=True)
        await store.aclose()

    asyncio.run(story())


def test_a_mistake_in_a_decision_does_not_end_the_process(tmp_path: Path) -> None:
    def tick(topology: Topology) -> Sequence[MetaTxn]:
        if 2 not in topology.jobs:
            raise KeyError("a mistake")
        return _raise_counter(topology)

    async def story(world: Controlled) -> None:
        for job in (1, 2):
            await world.put(f"jobs/{job}", encode_document(JobDocument(job, "rebalance")))
            await asyncio.sleep(0.02)
        await wait_for(lambda: len(world.view.topology.jobs[1].done) == 5)

    run(tmp_path, tick, story)


# Reports


class FakeNode:
    """Answers STATUS, or hangs."""

    def __init__(self, name: str, *, hangs: bool = False) -> None:
        self.name = name
        self.hangs = hangs
        self.asked = 0
        self.server = Server(self, me=lambda: Identity("node", name, "c1", 3))

    def on_request(self, connection: Connection, request: Request, deadline: float | None) -> None:
        assert request.op == Op.STATUS
        self.asked += 1
        if not self.hangs:
            report = NodeReport(self.name, 3, self.asked)
            connection.reply(request.id, {"role": "node", "report": report, "engine": {}})

    def on_batch_end(self, connection: Connection) -> None: ...

    def on_closed(self, connection: Connection) -> None: ...


@asynccontextmanager
async def nodes(world: Controlled, *names: str, hanging: str = "") -> AsyncIterator[dict[str, FakeNode]]:
    listening = {name: FakeNode(name, hangs=name == hanging) for name in names}
    for number, (name, node) in enumerate(listening.items()):
        port = await node.server.listen("127.0.0.1", 0)
        await world.put(f"nodes/{name}", encode_document(NodeDocument(name, "s", 3, f"127.0.0.1:{port}", number)))
    try:
        yield listening
    finally:
        for node in listening.values():
            await node.server.drain(grace_s=0)


def test_nodes_are_asked_while_the_plan_needs_it_and_a_hanging_one_holds_up_nothing(tmp_path: Path) -> None:
    core = FakeCore(lambda topology: [])
    heard = core.heard

    def every_s(topology: Topology) -> float | None:
        return 0.02 if topology.jobs else None

    async def story(world: Controlled) -> None:
        async with nodes(world, "node-1", "node-2", "node-3", hanging="node-2") as asked:
            await wait_for(lambda: len(world.view.topology.nodes) == 3)
            await asyncio.sleep(0.1)
            assert not any(node.asked for node in asked.values())
            await world.put("jobs/1", encode_document(JobDocument(1, "rebalance")))
            await wait_for(lambda: all(name in heard and heard[name].revision >= 5 for name in ("node-1", "node-3")))
            assert "node-2" not in heard
            assert asked["node-2"].asked == 1
            await world.put("nodes/node-3", None)
            await wait_for(lambda: not asked["node-3"].server.connections)
            assert asked["node-1"].server.connections
            await world.put("jobs/1", None)
            await wait_for(lambda: not asked["node-1"].server.connections)

    run(tmp_path, core, story, every_s)


def test_an_idle_cluster_is_left_in_peace_and_a_busy_one_looked_after() -> None:
    def view(*entries: tuple[str, Any]) -> Topology:
        return Topology().with_entries(1, [(key, encode_document(document)) for key, document in entries])

    manual = ("settings/controller", ControllerSettings(auto_split=False, auto_merge=False))
    assert round_s(view(manual)) == WATCHFUL_ROUND_S
    assert round_s(view(manual, ("jobs/1", JobDocument(1, "move", "done")))) == WATCHFUL_ROUND_S
    assert ControllerSettings().away_ms > 2 * WATCHFUL_ROUND_S * 1000
    assert round_s(view(manual, ("jobs/1", JobDocument(1, "move", "cancelling")))) == BUSY_ROUND_S
    assert round_s(view(manual, ("keyspaces/a", KeyspaceDocument("a", "hash", dropped=True)))) == BUSY_ROUND_S
    assert round_s(view()) == WATCHFUL_ROUND_S


# Admin


async def ask(client: MetaClient, **asked: Any) -> Any:
    return decode_any(await client._peer.call(Op.META_ADMIN, raw(asked), timeout_s=5))


def test_topology_and_jobs_are_told_to_who_asks(tmp_path: Path) -> None:
    async def story() -> None:
        async with meta_world(tmp_path / "meta") as world, meta_client(world.address) as client:
            jobs = [MetaPut(f"jobs/{n}", encode_document(JobDocument(n, "move", asked={"shard": n}))) for n in (10, 9)]
            await client.txn([], jobs)
            topology = await ask(client, verb="topology")
            assert topology["single"]["cluster"]["cluster_id"] == "c1"
            assert topology["jobs"]["9"]["asked"] == {"shard": 9}
            assert [job["id"] for job in (await ask(client, verb="jobs"))["jobs"]] == [9, 10]
            assert [job["id"] for job in (await ask(client, verb="jobs", id=10))["jobs"]] == [10]

    asyncio.run(story())


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (raw({"verb": "jobs", "id": 7}), "There is no job 7"),
        (raw({"verb": "abolish"}), "known verbs: add_node, .*, topology"),
        (raw({"id": 7}), "names no verb"),
        (raw(["jobs"]), "malformed"),
        (raw({"verb": "jobs", "more": "x" * 70_000}), "longer than"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(tmp_path: Path, asked: Any, sentence: str) -> None:
    async def story() -> None:
        async with meta_world(tmp_path / "meta") as world, meta_client(world.address) as client:
            with pytest.raises(Exception, match=sentence):
                await client._peer.call(Op.META_ADMIN, asked, timeout_s=5)
            assert (await ask(client, verb="jobs")) == {"jobs": []}

    asyncio.run(story())


def test_a_verb_can_be_added(tmp_path: Path) -> None:
    async def story() -> None:
        store = EmbeddedStore(tmp_path)
        verbs = AdminVerbs(store)

        async def count(store: Any, arguments: dict[str, Any]) -> dict[str, Any]:
            await store.txn([], [MetaPut("cluster", encode_document(cluster_document()))])
            return {"n": len((await store.read("")).entries) + arguments["plus"]}

        verbs.add("count", count)
        assert await verbs.carry_out({"verb": "count", "plus": 2}) == {"n": 3}

    asyncio.run(story())
