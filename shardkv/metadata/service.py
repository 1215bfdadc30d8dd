"""Serves a metadata store to nodes, routers and the launcher.

A watch is answered when something is newer than the revision it names, or after the time it is ready to wait. A
watch from beyond the store's revision is answered at once: the asker knows another store's future and must start
again from 0.

Invariant: after every applied transaction the controller has had its say before anybody is told, so one delta
carries a change and what follows from it. When the disk has no room for that, the change alone is told, and what
follows is tried again: a transaction that was applied is never answered as if it was not.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from typing import Any

import msgspec

from shardkv.errors import DiskFull, InvalidArgument, StorePoisoned
from shardkv.metadata.controller import plan_next
from shardkv.metadata.store import MetaStore
from shardkv.topology.view import Topology
from shardkv.transport.server import Connection, unknown_operation
from shardkv.wire.hello import Identity
from shardkv.wire.messages import (
    MetaTxn,
    MetaTxnReply,
    Op,
    Request,
    decode_meta_read,
    decode_meta_txn,
    decode_meta_watch,
)

log = logging.getLogger(__name__)

WATCH_WAIT_MS_MAX = 60_000
PLAN_RETRY_S = 1.0
REVISION_MAX = 2**63 - 1

Watch = tuple[Connection, int]
"""A connection and the id of the request that waits on it."""


class MetaService:
    """A `Service` over one store. `on_poisoned` is called once when the store can take no more changes."""

    def __init__(self, store: MetaStore, *, me: Callable[[], Identity], on_poisoned: Callable[[], None]) -> None:
        self._store = store
        self._me = me
        self._on_poisoned = on_poisoned
        self._watches: dict[Watch, asyncio.TimerHandle] = {}
        self._since: dict[Watch, int] = {}
        self._retry: asyncio.TimerHandle | None = None
        self.topology = Topology()
        self.txns = 0
        self._catch_up()

    def apply(self, txn: MetaTxn) -> MetaTxnReply:
        """Carry out a transaction and all that follows from it. Raises StorageError."""
        self.txns += 1
        try:
            reply = self._store.txn(txn.compares, txn.puts)
            self._catch_up()
        except StorePoisoned:
            self._on_poisoned()
            raise
        return reply

    def _catch_up(self) -> None:
        self._follow()
        while (txn := plan_next(self.topology)) is not None and self._carried_out(txn):
            self._follow()
        self._wake()

    def _carried_out(self, txn: MetaTxn) -> bool:
        try:
            return self._store.txn(txn.compares, txn.puts).applied
        except DiskFull as error:
            log.warning("plan_put_off reason=%r", error.message)
            if self._retry is None:
                self._retry = asyncio.get_running_loop().call_later(PLAN_RETRY_S, self._try_again)
            return False

    def _follow(self) -> None:
        """Bring the view to the store's revision."""
        if self.topology.revision != self._store.revision:
            delta = self._store.changes_since(self.topology.revision)
            entries = [(entry.key, entry.value, entry.revision) for entry in delta.entries]
            self.topology = self.topology.with_entries(delta.revision, entries)

    def _try_again(self) -> None:
        self._retry = None
        try:
            self._catch_up()
        except StorePoisoned:
            self._on_poisoned()

    def close(self) -> None:
        """Answer every waiting watch with what there is, and plan no more."""
        if self._retry is not None:
            self._retry.cancel()
        for watch in list(self._watches):
            self._answer(watch)

    # Service

    def on_request(self, connection: Connection, request: Request, deadline: float | None) -> None:
        match request.op:
            case Op.META_READ:
                connection.reply(request.id, self._store.read(decode_meta_read(request.payload).prefix))
            case Op.META_TXN:
                txn: MetaTxn = decode_meta_txn(request.payload)
                _check_documents(txn)
                connection.reply(request.id, self.apply(txn))
            case Op.META_WATCH:
                self._watch(connection, request)
            case Op.STATUS:
                connection.reply(request.id, self.status())
            case _:
                raise unknown_operation(request.op)

    def on_batch_end(self, connection: Connection) -> None:
        """Every request was answered, or waits as a watch."""

    def on_closed(self, connection: Connection) -> None:
        for watch in [watch for watch in self._watches if watch[0] is connection]:
            self._forget(watch)

    def status(self) -> dict[str, Any]:
        """What this process is and knows, for people and for the launcher."""
        me = self._me()
        return {
            "role": me.role,
            "name": me.name,
            "cluster_id": me.cluster_id,
            "pid": os.getpid(),
            "revision": self._store.revision,
            "transactions": self.txns,
            "watches": len(self._watches),
            "nodes": {name: msgspec.structs.asdict(node) for name, node in self.topology.nodes.items()},
            "routers": {name: msgspec.structs.asdict(router) for name, router in self.topology.routers.items()},
            "keyspaces": {
                name: {"partition": view.partition, "shards": len(view.shards)}
                for name, view in self.topology.keyspaces.items()
            },
        }

    # Watches

    def _watch(self, connection: Connection, request: Request) -> None:
        asked = decode_meta_watch(request.payload)
        since = min(asked.since, REVISION_MAX)
        watch = (connection, request.id)
        wait_s = min(max(asked.wait_ms, 0), WATCH_WAIT_MS_MAX) / 1000
        self._since[watch] = since
        self._watches[watch] = asyncio.get_running_loop().call_later(wait_s, self._answer, watch)
        if since != self._store.revision:
            self._answer(watch)

    def _wake(self) -> None:
        for watch, since in list(self._since.items()):
            if since != self._store.revision:
                self._answer(watch)

    def _answer(self, watch: Watch) -> None:
        connection, request_id = watch
        connection.reply(request_id, self._store.changes_since(self._forget(watch)))

    def _forget(self, watch: Watch) -> int:
        self._watches.pop(watch).cancel()
        return self._since.pop(watch)


def _check_documents(txn: MetaTxn) -> None:
    """Raises InvalidArgument for a document that no process of the cluster could read back."""
    try:
        Topology().with_entries(0, [(put.key, put.value) for put in txn.puts])
    except (msgspec.MsgspecError, ValueError) as error:
        raise InvalidArgument(f"The transaction holds a document that cannot be read: {error}.") from error
