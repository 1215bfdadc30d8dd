"""How nodes and routers make themselves known.

The number of a node's start, its incarnation, lives in two places: the node's directory and the metadata store.
The directory's is raised and made durable *before* `register_node`, so the store's is never ahead of the directory
it belongs to; if it is, the directory is an old copy and must not serve. A copy that is started again and again would
count itself past the store, so starts are known by drawn ids, too (shardkv/control/registration.py).

Invariant: a start is registered by compare-and-set on the document it replaces. When the outcome of a transaction
is not known, the next transaction on the same key settles it: a read that shows the old document settles nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from shardkv.control.registration import is_newest_directory
from shardkv.errors import DeadlineExceeded, OutcomeUnknown, StorageError, StoreMismatch, UnavailableError
from shardkv.metadata.client import Backoff, MetaClient
from shardkv.topology.documents import NODES, ROUTERS, NodeDocument, RouterDocument, decode_document, encode_document
from shardkv.wire.messages import MetaCompare, MetaPut

_NOT_REACHED = (UnavailableError, DeadlineExceeded, OutcomeUnknown, StorageError)


async def register_node(client: MetaClient, document: NodeDocument, start_ids: Sequence[str] = ()) -> None:
    """Register this start of a node, waiting for the metadata store for as long as it takes.

    Requires: `document.incarnation` is this start's own number, one above the last start's, and already durable in
    the node's directory; so are `start_ids`, those drawn since the last start known to be registered, it included.
    Raises StoreMismatch when the store knows another directory under this name or a later start of this one;
    ClusterMismatch, VersionMismatch.
    """
    key = f"{NODES}{document.name}"
    backoff = Backoff()
    while True:
        try:
            known, revision = await _known(client, key)
            if known == document:
                return
            if isinstance(known, NodeDocument):
                _check_same_directory(known, document, start_ids)
            reply = await client.txn([MetaCompare(key, revision)], [MetaPut(key, encode_document(document))])
            if reply.applied:
                return
        except StoreMismatch:
            raise
        except _NOT_REACHED:
            await backoff.pause()


async def register_router(client: MetaClient, document: RouterDocument) -> int:
    """Make a router's own address known, waiting for the metadata store for as long as it takes.

    A router owns nothing, so the newest start wins. Returns what `sign_off_router` takes.
    Raises ClusterMismatch, VersionMismatch.
    """
    backoff = Backoff()
    while True:
        try:
            reply = await client.txn([], [MetaPut(f"{ROUTERS}{document.name}", encode_document(document))])
        except _NOT_REACHED:
            await backoff.pause()
        else:
            return reply.revision


async def sign_off_router(client: MetaClient, name: str, registered: int, *, timeout_s: float) -> None:
    """Take a router's address back, unless a later start of it is listed by now. Raises ShardKVError."""
    key = f"{ROUTERS}{name}"
    await client.txn([MetaCompare(key, registered)], [MetaPut(key, None)], timeout_s=timeout_s)


async def _known(client: MetaClient, key: str) -> tuple[object, int]:
    """The document under `key` and its revision; (None, 0) when there is none."""
    for entry in (await client.read(key)).entries:
        if entry.key == key and entry.value is not None:
            return decode_document(key, entry.value), entry.revision
    return None, 0


def _check_same_directory(known: NodeDocument, mine: NodeDocument, start_ids: Sequence[str]) -> None:
    if known.store_id != mine.store_id:
        raise StoreMismatch(
            f"The cluster knows {mine.name} with the data of store {known.store_id}; this directory is "
            f"store {mine.store_id}.",
            hint="Start the node on its own directory; an empty one cannot take its place.",
        )
    if known.incarnation >= mine.incarnation or not is_newest_directory(known, mine.store_id, start_ids):
        raise StoreMismatch(
            f"This directory of {mine.name} is an old copy: it is at start {mine.incarnation}, the cluster has seen "
            f"start {known.incarnation}.",
            hint="Start the node on the directory it last ran on.",
        )
