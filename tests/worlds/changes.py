"""Changes of shards in a running cluster: begun as the controller does it, watched in the metadata store.

Each is given a job that wants it, as changes without one are ended by the controller.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from shardkv.control import changes
from shardkv.control.draft import Draft
from shardkv.metadata.client import MetaClient
from shardkv.topology.documents import JobDocument, ShardDocument, TopologyBound
from shardkv.topology.view import Topology
from shardkv.transport.peer import Peer
from shardkv.wire.hello import Identity
from shardkv.wire.messages import NOTHING, MetaTxn, Op, decode_any

T = TypeVar("T")
TIMEOUT_S = 20.0


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

    def move(self, shard: int, target: str, **options: Any) -> str:
        """Begin a move; the id of the change."""

        def draft(draft: Draft, job: int, change: str) -> None:
            changes.begin_move(draft, draft.topology.shards[shard], target, job=job, change=change, **options)

        return self._begin("move", {"shard": shard, "node": target}, draft)

    def split(self, shard: int, at: TopologyBound) -> str:
        def draft(draft: Draft, job: int, change: str) -> None:
            changes.begin_split(draft, draft.topology.shards[shard], at, job=job, change=change)

        return self._begin("split", {"shard": shard, "at": at}, draft)

    def merge(self, left: int, right: int) -> str:
        def draft(draft: Draft, job: int, change: str) -> None:
            shards = draft.topology.shards
            changes.begin_merge(draft, shards[left], shards[right], job=job, change=change)

        return self._begin("merge", {"left": left, "right": right}, draft)

    def _begin(self, kind: Any, asked: dict[str, Any], add: Callable[[Draft, int, str], None]) -> str:
        change = secrets.token_hex(8)

        def build(topology: Topology) -> MetaTxn:
            draft = Draft(topology)
            job = max(topology.jobs, default=1_000_000) + 1
            draft.put(f"jobs/{job}", JobDocument(job, kind, "running", asked))
            add(draft, job, change)
            return draft.txn()

        self.transact(build)
        return change

    def abort(self, shard: int, change: str) -> None:
        self.transact(lambda topology: changes.abort(topology, shard, change, "A person wanted so.") or MetaTxn([], []))

    def adjust(self, shard: int, change: str, *, paused: bool = False, rate_bytes_s: int = 0) -> None:
        """Pause a change, let it go on, or give it another rate."""

        def build(topology: Topology) -> MetaTxn:
            draft = Draft(topology)
            carrying = changes.carriers(topology, shard, change)
            changes.adjust(draft, carrying, paused=paused, rate_bytes_s=rate_bytes_s)
            return draft.txn()

        self.transact(build)

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
