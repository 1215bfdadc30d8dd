"""The metadata store of several machines: an etcd cluster, through its JSON gateway.

Every key of a cluster is kept under `shardkv/<name>/`, so that one etcd can serve several clusters, and others. A
transaction is one etcd transaction, an entry's revision is its mod_revision.

Invariant: a follower is never left on an endpoint that fell silent: while it follows, the endpoint is asked now and
then for something only a member of the majority can answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from base64 import b64encode
from collections.abc import Coroutine, Sequence
from typing import Any

from shardkv.errors import MetadataUnavailable
from shardkv.metadata.etcd_gateway import (
    EtcdGateway,
    Event,
    KeptAlive,
    KeyValue,
    LeaseNotFound,
    LeaseReply,
    RangeReply,
    Reply,
    TxnReply,
)
from shardkv.metadata.store import NO_LEASE, Changes, OnChanges
from shardkv.transport.address import Address, format_address
from shardkv.wire.messages import MetaCompare, MetaEntries, MetaEntry, MetaPut, MetaTxnReply

log = logging.getLogger(__name__)

PROBE_S = 2.0
"""How often the endpoint of a follower is asked whether it still is in touch with the majority."""
PAGE_ENTRIES = 5_000
OPERATIONS_PER_LEVEL = 40
"""etcd takes 128 operations in a transaction, those of nested ones in it counted level by level: three levels of 40
hold 64,000."""


class _Compacted(Exception):
    """The history asked for is not kept any more."""


class EtcdStore:
    """A MetaStore under `shardkv/<name>/` of the etcd cluster at `endpoints`. Use inside a running event loop."""

    def __init__(self, endpoints: Sequence[Address], name: str) -> None:
        self.label = f"etcd://{','.join(format_address(*endpoint) for endpoint in endpoints)}/{name}"
        self._prefix = f"shardkv/{name}/".encode()
        self._gateway = EtcdGateway(endpoints)

    async def aclose(self) -> None:
        await self._gateway.close()

    # Reading

    async def get(self, key: str) -> MetaEntry | None:
        reply = await self._gateway.ask("/v3/kv/range", {"key": self._key(key)}, RangeReply)
        return self._entry(reply.kvs[0]) if reply.kvs else None

    async def read(self, prefix: str) -> MetaEntries:
        revision = 0
        entries: list[MetaEntry] = []
        start, stop = self._prefix + prefix.encode(), _after(self._prefix + prefix.encode())
        while True:
            asked = {"key": _text(start), "range_end": _text(stop), "limit": PAGE_ENTRIES, "revision": revision}
            page = await self._gateway.ask("/v3/kv/range", asked, RangeReply)
            revision = revision or page.header.revision
            entries += map(self._entry, page.kvs)
            if not page.more:
                return MetaEntries(revision, entries)
            start = page.kvs[-1].key + b"\0"

    async def follow(self, since: int, on_changes: OnChanges) -> None:
        while True:
            if since == 0:
                whole = await self.read("")
                since = whole.revision
                on_changes(Changes(since, whole.entries, whole=True, deletes_since=since))
            else:
                await self._gateway.ask("/v3/kv/range", self._sign_of_life(), RangeReply)
                on_changes(Changes(since, []))
            url = self._gateway.first
            try:
                await _until_one_ends(self._watch(url, since, on_changes), self._probe(url))
            except _Compacted:
                log.warning("etcd_history_compacted since=%d", since)
                since = 0
            except MetadataUnavailable:
                self._gateway.pass_over(url)
                raise

    async def _watch(self, url: str, since: int, on_changes: OnChanges) -> None:
        stop = _after(self._prefix)
        create = {"key": _text(self._prefix), "range_end": _text(stop), "start_revision": since + 1}
        async with contextlib.aclosing(self._gateway.watch({"create_request": create}, url=url)) as told:
            async for reply in told:
                if reply.compact_revision:
                    raise _Compacted
                if reply.canceled:
                    raise MetadataUnavailable(f"etcd at {url} ended a watch: {reply.cancel_reason}.")
                if reply.events:
                    on_changes(self._changes(reply.events))

    async def _probe(self, url: str) -> None:
        while True:
            await asyncio.sleep(PROBE_S)
            await self._gateway.ask("/v3/kv/range", self._sign_of_life(), RangeReply, only=url)

    def _sign_of_life(self) -> dict[str, Any]:
        """A question that only a member in touch with the majority answers."""
        return {"key": _text(self._prefix), "count_only": True}

    def _changes(self, events: Sequence[Event]) -> Changes:
        """Events carry their own revisions; that of the header may be further than they are."""
        newest = {event.kv.key: self._entry(event.kv, deleted=event.type == "DELETE") for event in events}
        return Changes(max(event.kv.mod_revision for event in events), list(newest.values()))

    # Writing

    async def txn(
        self, compares: Sequence[MetaCompare], puts: Sequence[MetaPut], *, lease: int = NO_LEASE
    ) -> MetaTxnReply:
        body = {
            "compare": [
                {"key": self._key(compare.key), "target": "MOD", "result": "EQUAL", "mod_revision": compare.revision}
                for compare in compares
            ],
            "success": _nested([self._operation(put, lease) for put in puts]),
        }
        try:
            reply = await self._gateway.ask_once("/v3/kv/txn", body, TxnReply)
        except LeaseNotFound:
            nothing = await self.read("/")
            return MetaTxnReply(applied=False, revision=nothing.revision)
        return MetaTxnReply(applied=reply.succeeded, revision=reply.header.revision)

    def _operation(self, put: MetaPut, lease: int) -> dict[str, Any]:
        key = self._key(put.key)
        if put.value is None:
            return {"request_delete_range": {"key": key}}
        return {"request_put": {"key": key, "value": _text(put.value), "lease": lease}}

    # Leases

    async def grant(self, ttl_s: float) -> int:
        reply = await self._gateway.ask("/v3/lease/grant", {"TTL": math.ceil(ttl_s)}, LeaseReply)
        return reply.id

    async def keep_alive(self, lease: int) -> float:
        reply = await self._gateway.ask("/v3/lease/keepalive", {"ID": lease}, KeptAlive)
        return float(reply.result.ttl)

    async def revoke(self, lease: int) -> None:
        with contextlib.suppress(LeaseNotFound):
            await self._gateway.ask("/v3/lease/revoke", {"ID": lease}, Reply)

    # Keys

    def _key(self, key: str) -> str:
        return _text(self._prefix + key.encode())

    def _entry(self, found: KeyValue, *, deleted: bool = False) -> MetaEntry:
        key = found.key[len(self._prefix) :].decode()
        return MetaEntry(key, None if deleted else found.value, found.mod_revision)


def _text(value: bytes) -> str:
    return b64encode(value).decode()


def _after(prefix: bytes) -> bytes:
    """The first key after all those that start with `prefix`; keys are UTF-8, so its last byte is below 0xff."""
    return prefix[:-1] + bytes([prefix[-1] + 1])


def _nested(operations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same operations, many of them as transactions inside the transaction: still all or none."""
    while len(operations) > OPERATIONS_PER_LEVEL:
        cuts = range(0, len(operations), OPERATIONS_PER_LEVEL)
        operations = [{"request_txn": {"success": operations[cut : cut + OPERATIONS_PER_LEVEL]}} for cut in cuts]
    return operations


async def _until_one_ends(*jobs: Coroutine[Any, Any, None]) -> None:
    """Run all jobs until one of them ends; then cancel the others. Raises what it raised."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
