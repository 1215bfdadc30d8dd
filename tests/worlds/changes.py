"""Changes of shards in a running cluster: begun as the controller does it, watched in the metadata store.

Each is given a job, as the controller ends changes that have none: one that waits for a node that never joins, so that
the controller begins nothing by itself.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec

from shardkv.control import changes
from shardkv.control.draft import Draft
from shardkv.metadata.client import MetaClient
from shardkv.topology.documents import JobDocument, ShardDocument, TopologyBound
from shardkv.topology.view import Topology
from shardkv.transport.peer import Peer
from shardkv.wire.hello import Identity
from shardkv.wire.messages import NOTHING, MetaTxn, Op, decode_any
from tests.worlds.cluster import until
from tests.worlds.history import Writer, check_scan
from tests.worlds.hot_keys import HotKeys, check_versions
from tests.worlds.linearizability import Register, check
from tests.worlds.wired_cluster import WiredCluster

T = TypeVar("T")
TIMEOUT_S = 20.0
ROWS = 3_000
WRITERS = 4
KEYS = [b"0hot", b"a hot", b"hot", b"last hot", b"very hot", b"~"]
"""Hot ones, spread over the shards in both modes."""
SMALL = """
[engine]
memtable_bytes_max = 262144
block_cache_bytes = 1048576
table_bytes_max = 131072
"""
"""A configuration under which a few thousand rows already flush and compact."""


class Meta:
    """The metadata store at one address, asked by a person."""

    def __init__(self, address: str) -> None:
        self.address = address

    def topology(self) -> Topology:
        return self._with(_topology)

    def shard(self, number: int) -> ShardDocument:
        return self.topology().shards[number]

    def transact(self, build: Callable[[Topology], MetaTxn]) -> None:
        """Apply what `build` makes of the topology; again where somebody else was quicker."""

        async def run(client: MetaClient) -> None:
            while True:
                txn = build(await _topology(client))
                if (await client.txn(txn.compares, txn.puts)).applied:
                    return

        self._with(run)

    def _with(self, call: Callable[[MetaClient], Awaitable[T]]) -> T:
        async def run() -> T:
            client = MetaClient([self.address], me=lambda: Identity("client", "person"))
            client.start()
            try:
                return await call(client)
            finally:
                await client.close()

        return asyncio.run(run())

    # Changes

    def move(self, shard: int, target: str, *, rate_bytes_s: int = 0) -> str:
        """Begin a move; the id of the change."""

        def draft(draft: Draft, job: int, change: str) -> None:
            changes.begin_move(
                draft, draft.topology.shards[shard], target, job=job, change=change, rate_bytes_s=rate_bytes_s
            )

        return self._begin(draft, rate_bytes_s)

    def split(self, shard: int, at: TopologyBound) -> str:
        def draft(draft: Draft, job: int, change: str) -> None:
            changes.begin_split(draft, draft.topology.shards[shard], at, job=job, change=change)

        return self._begin(draft)

    def merge(self, left: int, right: int) -> str:
        def draft(draft: Draft, job: int, change: str) -> None:
            shards = draft.topology.shards
            changes.begin_merge(draft, shards[left], shards[right], job=job, change=change)

        return self._begin(draft)

    def _begin(self, add: Callable[[Draft, int, str], None], rate_bytes_s: int = 0) -> str:
        change = secrets.token_hex(8)

        def build(topology: Topology) -> MetaTxn:
            draft = Draft(topology)
            job = max(topology.jobs, default=1_000_000) + 1
            draft.put(f"jobs/{job}", JobDocument(job, "add", asked={"node": "nobody"}, rate_bytes_s=rate_bytes_s))
            add(draft, job, change)
            return draft.txn()

        self.transact(build)
        return change

    def abort(self, shard: int, change: str) -> None:
        self.transact(lambda topology: changes.abort(topology, shard, change, "A person wanted so.") or MetaTxn([], []))

    def adjust(self, shard: int, *, paused: bool = False, rate_bytes_s: int = 0) -> None:
        """Pause the change of a shard, let it go on, or give it another rate; the controller hands it on."""

        def build(topology: Topology) -> MetaTxn:
            change = topology.shards[shard].change
            assert change is not None
            job = msgspec.structs.replace(
                topology.jobs[change.job], state="paused" if paused else "planned", rate_bytes_s=rate_bytes_s
            )
            draft = Draft(topology)
            draft.put(f"jobs/{job.id}", job)
            return draft.txn()

        self.transact(build)

        def adjusted() -> bool:
            change = self.shard(shard).change
            return change is None or (change.paused, change.rate_bytes_s) == (paused, rate_bytes_s)

        until(adjusted, what="the controller hands it on")

    def wait_over(self, shard: int, change: str, *, timeout_s: float = TIMEOUT_S) -> ShardDocument | None:
        """Until a change is over; then the document of the shard, if there still is one."""
        end = time.monotonic() + timeout_s
        while True:
            document = self.topology().shards.get(shard)
            if document is None or document.change is None or document.change.id != change:
                return document
            assert time.monotonic() < end, f"not over within {timeout_s} s: {document}"
            time.sleep(0.01)


async def _topology(client: MetaClient) -> Topology:
    found = await client.read("")
    return Topology().with_entries(found.revision, [(one.key, one.value, one.revision) for one in found.entries])


def status_of(address: str) -> dict[str, Any]:
    """The status of a process."""

    async def ask() -> dict[str, Any]:
        peer = Peer([address], me=lambda: Identity("client", "person"))
        peer.start()
        try:
            found: dict[str, Any] = decode_any(await peer.call(Op.STATUS, NOTHING, timeout_s=10))
            return found
        finally:
            await peer.close()

    return asyncio.run(ask())


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
        address = world.proxies[node].address
        until(lambda: _has_only_its_own(status_of(address)), what=f"{node} has no tablet left over")  # noqa: B023
        status = status_of(address)
        assert {one[0] for one in status["report"]["shards"]} == status["shards"].keys()
        assert (status["report"]["changes"], status["report"]["kept"], status["missing"]) == ([], [], {})


def _has_only_its_own(status: dict[str, Any]) -> bool:
    return bool(status["engine"]["tablets"] == len(status["shards"]))


class Load:
    """Writers, clients on hot keys, and scans over rows that nobody changes: all at once, until `stop`."""

    def __init__(self, world: WiredCluster, *, seed: int) -> None:
        self._world = world
        self.rows = still_rows()
        with world.client(timeout=20) as db:
            db.put_many(self.rows)
        self.writers = [Writer(number, world.addresses, seed=seed) for number in range(WRITERS)]
        self._hot = HotKeys(world.addresses, KEYS, seed=seed, threads=6, tasks=6)
        self.scans = Scans(world, self.rows)

    def start(self) -> None:
        for one in (*self.writers, self._hot, self.scans):
            one.start()

    def stop(self) -> None:
        """End it, and compare all that was told with what is there."""
        self.scans.stop()
        for writer in self.writers:
            writer.stop()
        for writer in self.writers:
            writer.join(30)
            assert not writer.surprises, writer.surprises
        self._hot.stop()
        assert not self._hot.surprises, self._hot.surprises
        check_versions(self._hot.versions)
        check(self._hot.operations, Register())
        with self._world.client(timeout=20) as db:
            assert sum(writer.check(db) for writer in self.writers)
            found = dict(db.scan())
            assert {key: value for key, value in found.items() if b"-still-" in key} == self.rows
            for key in [*KEYS, *self.rows]:
                db.delete(key)
            check_scan(db, self.writers)
