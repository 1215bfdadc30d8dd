"""Serves a metadata store to nodes, routers and the launcher.

A watch is answered when something is newer than the revision it names, or after the time it is ready to wait. It is
answered from this process's own view of the store. A watch from beyond the view comes from somebody who was told more
by another process, so the view is brought up to date first; if the store itself is not that far, the asker knows
another store's future, is answered at once and must start again from 0.

Invariant: what this process tells never goes back behind what any other has told of the same store. While the store
cannot be reached, watches are refused instead of left waiting, so that who has another process to ask can ask it.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec

from shardkv.errors import InvalidArgument, MetadataUnavailable, ShardKVError, StorePoisoned
from shardkv.metadata.admin import AdminVerbs
from shardkv.metadata.asking import Asking
from shardkv.metadata.client import Backoff
from shardkv.metadata.leading import LEADER_KEY
from shardkv.metadata.store import Changes, MetaStore
from shardkv.metadata.view import StoreView
from shardkv.topology.view import Topology
from shardkv.transport.server import Connection, unknown_operation
from shardkv.wire.hello import Identity
from shardkv.wire.messages import (
    MetaEntries,
    MetaTxn,
    MetaTxnReply,
    Op,
    Request,
    decode_admin,
    decode_meta_read,
    decode_meta_txn,
    decode_meta_watch,
)

log = logging.getLogger(__name__)

WATCH_WAIT_MS_MAX = 60_000
REVISION_MAX = 2**63 - 1

Watch = tuple[Connection, int]
"""A connection and the id of the request that waits on it."""


class MetaService:
    """A `Service` over one store. `on_poisoned` is called once when the store can take no more changes."""

    def __init__(self, store: MetaStore, *, me: Callable[[], Identity], on_poisoned: Callable[[], None]) -> None:
        self._store = store
        self.me = me
        self._on_poisoned = on_poisoned
        self._watches: dict[Watch, asyncio.TimerHandle] = {}
        self._since: dict[Watch, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._catching_up: asyncio.Task[int] | None = None
        self._cut_off: MetadataUnavailable | None = None
        """Why the store cannot be followed now."""
        self.view = StoreView()
        self.view.observe(self._wake)
        self.admin = AdminVerbs(store)
        self._asking = Asking(self.view, apply=self.apply, caught_up=self._caught_up, me=me)
        self._asking.register(self.admin)
        self.txns = 0

    @property
    def topology(self) -> Topology:
        return self.view.topology

    async def follow(self) -> None:
        """Keep the view up to date, until cancelled. Raises StorageError, ClusterMismatch."""
        backoff = Backoff()
        while True:
            try:
                await self._store.follow(max(self.view.revision, 0), self._take)
            except MetadataUnavailable as error:
                if self._cut_off is None:
                    log.warning("store_cut_off reason=%r", error.message)
                    backoff = Backoff()
                self._refuse_watches(error)
                await backoff.pause()

    def _take(self, changes: Changes) -> None:
        self._cut_off = None
        self.view.take(changes)

    async def apply(self, txn: MetaTxn) -> MetaTxnReply:
        """Carry out a transaction. Raises OutcomeUnknown, MetadataUnavailable, InvalidArgument, StorageError."""
        _check_documents(txn)
        self.txns += 1
        try:
            return await self._store.txn(txn.compares, txn.puts)
        except StorePoisoned:
            self._on_poisoned()
            raise

    def close(self) -> None:
        """Answer every waiting watch with what there is, and ask nodes nothing any more."""
        self._asking.close()
        for watch in list(self._watches):
            self._answer(watch)

    # Service

    def on_request(self, connection: Connection, request: Request, deadline: float | None) -> None:
        match request.op:
            case Op.META_READ:
                prefix = decode_meta_read(request.payload).prefix
                self._later(connection, request.id, self._store.read(prefix))
            case Op.META_TXN:
                self._later(connection, request.id, self.apply(decode_meta_txn(request.payload)))
            case Op.META_WATCH:
                self._watch(connection, request)
            case Op.META_ADMIN:
                self._later(connection, request.id, self.admin.carry_out(decode_admin(request.payload)))
            case Op.STATUS:
                connection.reply(request.id, self.status())
            case _:
                raise unknown_operation(request.op)

    def on_batch_end(self, connection: Connection) -> None:
        """Every request was answered, or waits."""

    def on_closed(self, connection: Connection) -> None:
        for watch in [watch for watch in self._watches if watch[0] is connection]:
            self._forget(watch)

    def _later(self, connection: Connection, request_id: int, answer: Coroutine[Any, Any, Any]) -> None:
        """Reply with what `answer` comes to."""

        async def tell() -> None:
            try:
                reply = await answer
            except ShardKVError as error:
                connection.fail(request_id, error)
            else:
                connection.reply(request_id, reply)

        self._spawn(tell())

    def _spawn(self, job: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(job)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def status(self) -> dict[str, Any]:
        """What this process is and knows, for people and for the launcher."""
        me = self.me()
        return {
            "role": me.role,
            "name": me.name,
            "cluster_id": me.cluster_id,
            "pid": os.getpid(),
            "store": self._store.label,
            "store_reached": self._cut_off is None,
            "leader": self._leader(),
            "revision": self.view.revision,
            "transactions": self.txns,
            "watches": len(self._watches),
            "nodes": {name: msgspec.structs.asdict(node) for name, node in self.topology.nodes.items()},
            "routers": {name: msgspec.structs.asdict(router) for name, router in self.topology.routers.items()},
            "keyspaces": {
                name: {"partition": view.partition, "shards": len(view.shards)}
                for name, view in self.topology.keyspaces.items()
            },
        }

    def _leader(self) -> dict[str, Any] | None:
        """The metadata process that controls the cluster, as far as is known here."""
        entry = self.view.get(LEADER_KEY)
        return None if entry is None or entry.value is None else msgspec.msgpack.decode(entry.value)

    # Watches

    def _watch(self, connection: Connection, request: Request) -> None:
        asked = decode_meta_watch(request.payload)
        since = min(asked.since, REVISION_MAX)
        if self._cut_off is not None:
            raise self._cut_off
        watch = (connection, request.id)
        wait_s = min(max(asked.wait_ms, 0), WATCH_WAIT_MS_MAX) / 1000
        self._since[watch] = since
        self._watches[watch] = asyncio.get_running_loop().call_later(wait_s, self._answer, watch)
        if since < self.view.revision:
            self._answer(watch)
        elif since > self.view.revision:
            self._spawn(self._catch_up_with(watch, since))

    async def _catch_up_with(self, watch: Watch, since: int) -> None:
        """Bring the view to where an asker is; one that is beyond the store itself is answered."""
        try:
            revision = await self._caught_up()
            if revision < since:
                revision = await self._caught_up()
        except ShardKVError as error:
            if watch in self._watches:
                self._forget(watch)
                watch[0].fail(watch[1], error)
            return
        if watch in self._watches and revision < since:
            self._forget(watch)
            watch[0].reply(watch[1], MetaEntries(revision, []))

    async def _caught_up(self) -> int:
        """The store's revision, with the view no further behind. Askers share one reading, and who joins one that
        was under way may have come too late for it: ask a second time."""
        if self._catching_up is None or self._catching_up.done():
            self._catching_up = asyncio.get_running_loop().create_task(self._catch_up())
        return await asyncio.shield(self._catching_up)

    async def _catch_up(self) -> int:
        everything = await self._store.read("")
        changes = Changes(everything.revision, everything.entries, whole=True, deletes_since=everything.revision)
        self.view.take(changes)
        return everything.revision

    def _wake(self) -> None:
        for watch, since in list(self._since.items()):
            if since < self.view.revision:
                self._answer(watch)

    def _answer(self, watch: Watch) -> None:
        connection, request_id = watch
        since = self._forget(watch)
        if since <= self.view.revision:
            connection.reply(request_id, self.view.since(since))
        else:
            connection.reply(request_id, MetaEntries(since, []))

    def _refuse_watches(self, error: MetadataUnavailable) -> None:
        self._cut_off = error
        for watch in list(self._watches):
            self._forget(watch)
            watch[0].fail(watch[1], error)

    def _forget(self, watch: Watch) -> int:
        self._watches.pop(watch).cancel()
        return self._since.pop(watch)


def _check_documents(txn: MetaTxn) -> None:
    """Raises InvalidArgument for a document that no process of the cluster could read back."""
    try:
        Topology().with_entries(0, [(put.key, put.value) for put in txn.puts])
    except (msgspec.MsgspecError, ValueError) as error:
        raise InvalidArgument(f"The transaction holds a document that cannot be read: {error}.") from error
