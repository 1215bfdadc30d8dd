"""`Site`: what every part of a node's changes works with, and two ways to wait for its store and its threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from shardkv.control.labels import owned_label
from shardkv.errors import ShardUnavailable
from shardkv.limits import Limits
from shardkv.wire.hello import Identity
from shardkv_node.changes.fences import FenceFile
from shardkv_node.changes.settling import Settler
from shardkv_node.changes.views import Views
from shardkv_node.committer import Committer
from shardkv_node.engine.store import Store
from shardkv_node.ownership import Ownership

T = TypeVar("T")

THREADS = 4


@dataclass(kw_only=True)
class Site:
    """One node's. Belongs to its event loop."""

    me: Callable[[], Identity]
    store: Store
    ownership: Ownership
    committer: Committer
    fences: FenceFile
    views: Views
    settler: Settler
    limits: Limits
    incoming: str
    """Directory where files of tablets that are fetched are put."""
    fence_abort_s: float
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(THREADS, "changes"))
    _in_threads: set[asyncio.Future[Any]] = field(default_factory=set)
    """What runs there now, or waits for its turn; also when its caller was cancelled."""

    def tablet_of_shard(self, shard: int) -> int:
        """The tablet of a shard that this node owns, served or fenced. Raises ShardUnavailable."""
        document = self.views.newest.shards.get(shard)
        label = owned_label(shard, document.owned_since) if document is not None else b""
        numbers = self.store.tablets_labelled(label)
        if not numbers:
            raise ShardUnavailable(f"Node {self.me().name} has no tablet of shard {shard}.")
        return numbers[-1]

    async def between_groups(self, call: Callable[[], T], *, unless: Callable[[], bool] = lambda: False) -> T:
        """What `call` returns, or raises, run while no group of writes is in flight.

        `unless`: when this is so by then, it is not run, and this is cancelled.
        """
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def run() -> None:
            if unless() or done.cancelled():
                done.cancel()
                return
            try:
                done.set_result(call())
            except Exception as error:  # noqa: BLE001 - it is raised where it is waited for
                done.set_exception(error)

        self.store.between_groups(run)
        return await done

    async def in_thread(self, call: Callable[[], T], *, clean_up: Callable[[], None] | None = None) -> T:
        """What `call` returns, run in a thread. When the caller is cancelled meanwhile, `clean_up` runs after it."""
        running = asyncio.get_running_loop().run_in_executor(self.threads, call)
        self._in_threads.add(running)
        running.add_done_callback(self._in_threads.discard)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            if clean_up is not None:
                running.add_done_callback(lambda ended: _ended(ended, clean_up))
            raise

    async def after_threads(self, call: Callable[[], None]) -> None:
        """Run `call` in a thread when all that was begun there before has ended, callers cancelled or not."""
        if self._in_threads:
            await asyncio.wait(set(self._in_threads))
        await self.in_thread(call)

    async def synced(self) -> None:
        """Until all that was logged so far is on disk. Raises StorageError."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def told(error: Exception | None) -> None:
            if done.done():
                return
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(None)

        self.store.sync_log(told)
        await done

    async def drained(self) -> None:
        """Until every write that was accepted before now has been answered."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.committer.barrier(lambda: None if done.done() else done.set_result(None))
        await done


def _ended(ended: asyncio.Future[T], clean_up: Callable[[], None]) -> None:
    if not ended.cancelled():
        ended.exception()
    clean_up()
