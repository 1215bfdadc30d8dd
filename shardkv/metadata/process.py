"""The metadata process: a store, its service and the controller, until it is told to stop.

It ends with one of the exit codes of `shardkv.programs`. A store that cannot be reached is waited for.
"""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from shardkv.errors import MetadataUnavailable, OutcomeUnknown
from shardkv.limits import Limits
from shardkv.logs import event
from shardkv.metadata.client import Backoff
from shardkv.metadata.controller import check_shape, plan_cluster
from shardkv.metadata.controlling import ControlLoop
from shardkv.metadata.leading import Leading
from shardkv.metadata.listing import Listing
from shardkv.metadata.service import MetaService
from shardkv.metadata.store import MetaStore
from shardkv.metadata.stores import StoreChoice, open_store
from shardkv.programs import EXIT_FAILED, EXIT_OK, advertised, port_problem
from shardkv.topology.documents import CLUSTER_KEY, ClusterDocument, decode_document
from shardkv.transport.loop import run_program, run_until
from shardkv.transport.server import Server
from shardkv.wire.hello import Identity

log = logging.getLogger(__name__)

DRAIN_GRACE_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MetaOptions:
    """`asked` is the shape of a new cluster; an existing one must have it. Its cluster_id is not looked at."""

    name: str
    store: StoreChoice
    data_dir: Path | None
    bind: str
    port: int
    advertise: str | None = None
    asked: ClusterDocument
    lease_s: float
    limits: Limits


def run_meta(options: MetaOptions) -> int:
    """Run until SIGTERM; returns the exit code. What went wrong is one sentence on standard error."""
    return run_program(lambda stop: _serve(options, stop))


async def _serve(options: MetaOptions, stop: asyncio.Event) -> int:
    async with open_store(options.store, options.data_dir) as store:
        cluster = await _unless_stopped(open_cluster(store, options.asked), stop)
        return EXIT_OK if cluster is None else await _serve_cluster(store, cluster, options, stop)


async def _serve_cluster(store: MetaStore, cluster: ClusterDocument, options: MetaOptions, stop: asyncio.Event) -> int:
    identity = Identity("meta", options.name, cluster.cluster_id)
    poisoned = asyncio.Event()

    def on_poisoned() -> None:
        poisoned.set()
        stop.set()

    service = MetaService(store, me=lambda: identity, on_poisoned=on_poisoned)
    server = Server(service, me=lambda: identity, limits=options.limits)
    listing = Listing(store, options.name)

    async def listen() -> None:
        await service.view.reached(0)
        try:
            port = await server.listen(options.bind, options.port)
        except OSError as error:
            raise port_problem(error, options.bind, options.port) from error
        address = advertised(options.bind, port, options.advertise)
        revision = service.view.revision
        log.info(event("meta_serving", address=address, cluster=cluster.cluster_id, revision=revision))
        await listing.begin(address)
        await lead(store, service, options.lease_s, name=options.name, address=address)

    await run_until(stop, service.follow(), listen())
    await listing.end()
    service.close()
    await server.drain(grace_s=DRAIN_GRACE_S)
    log.info(event("meta_stopped", revision=service.view.revision, poisoned=poisoned.is_set()))
    return EXIT_FAILED if poisoned.is_set() else EXIT_OK


async def lead(store: MetaStore, service: MetaService, lease_s: float, *, name: str, address: str) -> None:
    """Control the cluster whenever no other metadata process does, until cancelled. Raises StorageError."""
    document = msgspec.msgpack.encode({"name": name, "address": address, "pid": os.getpid()})
    control = ControlLoop(store, service.view, me=service.me)
    await Leading(store, service.view, document, lease_s=lease_s).run(control.run)


async def open_cluster(store: MetaStore, asked: ClusterDocument) -> ClusterDocument:
    """The cluster's document, made at the first start, once the store is reached.

    Raises StoreMismatch when the shape asked for is another.
    """
    backoff = Backoff()
    made = msgspec.structs.replace(asked, cluster_id=str(uuid.uuid4()))
    while True:
        try:
            entry = await store.get(CLUSTER_KEY)
            if entry is not None and entry.value is not None:
                return _made_before(entry.value, made)
            txn = plan_cluster(made)
            if (await store.txn(txn.compares, txn.puts)).applied:
                log.info(event("cluster_made", cluster=made.cluster_id, partition=made.partition, shards=made.shards))
                return made
        except (MetadataUnavailable, OutcomeUnknown) as error:
            log.warning(event("store_not_reached", store=store.label, reason=error.message))
            await backoff.pause()


def _made_before(value: bytes, asked: ClusterDocument) -> ClusterDocument:
    known = decode_document(CLUSTER_KEY, value)
    assert isinstance(known, ClusterDocument)
    check_shape(known, asked)
    return known


async def _unless_stopped(opening: Coroutine[Any, Any, ClusterDocument], stop: asyncio.Event) -> ClusterDocument | None:
    """What `opening` comes to; None when `stop` was set first."""
    opened = asyncio.ensure_future(opening)
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([opened, stopping], return_when=asyncio.FIRST_COMPLETED)
        return opened.result() if opened.done() else None
    finally:
        opened.cancel()
        stopping.cancel()
        await asyncio.gather(opened, stopping, return_exceptions=True)
