"""The metadata process: one store, its lock, its service and the controller, until it is told to stop.

It ends with one of the exit codes of `shardkv.programs`.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from dataclasses import dataclass
from pathlib import Path

import msgspec

from shardkv.directory_lock import DirectoryLock
from shardkv.limits import Limits
from shardkv.logs import event
from shardkv.metadata.controller import check_shape, plan_cluster
from shardkv.metadata.embedded import EmbeddedStore
from shardkv.metadata.service import MetaService
from shardkv.programs import EXIT_FAILED, EXIT_OK, port_problem
from shardkv.topology.documents import CLUSTER_KEY, ClusterDocument, decode_document
from shardkv.transport.address import format_address
from shardkv.transport.loop import run_program
from shardkv.transport.server import Server
from shardkv.wire.hello import Identity

log = logging.getLogger(__name__)

NAME = "meta"
LOCK_FILE = "LOCK"
DRAIN_GRACE_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MetaOptions:
    """`asked` is the shape of a new cluster; an existing one must have it. Its cluster_id is not looked at."""

    data_dir: Path
    bind: str
    port: int
    asked: ClusterDocument
    limits: Limits


def run_meta(options: MetaOptions) -> int:
    """Run until SIGTERM; returns the exit code. What went wrong is one sentence on standard error."""
    return run_program(lambda stop: _serve(options, stop))


async def _serve(options: MetaOptions, stop: asyncio.Event) -> int:
    lock = DirectoryLock(options.data_dir / LOCK_FILE)
    try:
        store = EmbeddedStore(options.data_dir)
        try:
            return await _serve_store(store, options, stop)
        finally:
            store.close()
    finally:
        lock.release()


async def _serve_store(store: EmbeddedStore, options: MetaOptions, stop: asyncio.Event) -> int:
    cluster = _open_cluster(store, options.asked)
    identity = Identity("meta", NAME, cluster.cluster_id)
    poisoned = asyncio.Event()

    def on_poisoned() -> None:
        poisoned.set()
        stop.set()

    service = MetaService(store, me=lambda: identity, on_poisoned=on_poisoned)
    server = Server(service, me=lambda: identity, limits=options.limits)
    try:
        port = await server.listen(options.bind, options.port)
    except OSError as error:
        raise port_problem(error, options.bind, options.port) from error
    address = format_address(options.bind, port)
    log.info(event("meta_serving", address=address, cluster=cluster.cluster_id, revision=store.revision))
    await stop.wait()
    service.close()
    await server.drain(grace_s=DRAIN_GRACE_S)
    log.info(event("meta_stopped", revision=store.revision, poisoned=poisoned.is_set()))
    return EXIT_FAILED if poisoned.is_set() else EXIT_OK


def _open_cluster(store: EmbeddedStore, asked: ClusterDocument) -> ClusterDocument:
    """The cluster's document, made at the first start. Raises StoreMismatch when the shape asked for is another."""
    entry = store.get(CLUSTER_KEY)
    if entry is None or entry.value is None:
        made = msgspec.structs.replace(asked, cluster_id=str(uuid.uuid4()))
        txn = plan_cluster(made)
        store.txn(txn.compares, txn.puts)
        log.info(event("cluster_made", cluster=made.cluster_id, partition=made.partition, shards=made.shards))
        return made
    made_before = decode_document(CLUSTER_KEY, entry.value)
    assert isinstance(made_before, ClusterDocument)
    check_shape(made_before, asked)
    return made_before
