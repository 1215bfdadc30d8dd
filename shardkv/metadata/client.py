"""The metadata store as nodes, routers and the launcher reach it: over a connection that mends itself.

With several addresses, a process that cannot be reached, or cannot reach the store itself, is left for another one.

Invariants: a follower never shows a view of another cluster, and never one put together from two stores: if the
store's revision went back, the view starts again from nothing. The outcome of a transaction is never guessed.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import msgspec

from shardkv.errors import (
    ClusterMismatch,
    DeadlineExceeded,
    MetadataUnavailable,
    OutcomeUnknown,
    ShardKVError,
    StorageError,
    UnavailableError,
    VersionMismatch,
)
from shardkv.limits import DEFAULT_LIMITS, Limits
from shardkv.topology.view import Topology
from shardkv.transport.peer import Peer
from shardkv.wire.hello import Identity
from shardkv.wire.messages import (
    Message,
    MetaCompare,
    MetaEntries,
    MetaPut,
    MetaRead,
    MetaTxn,
    MetaTxnReply,
    MetaWatch,
    Op,
    decode_meta_entries,
    decode_meta_txn_reply,
)

log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 5.0
WATCH_WAIT_MS = 20_000
WATCH_GRACE_S = 5.0
"""How much longer than its wait a watch may take to be answered."""
SILENCE_MS = 3_000
"""With several addresses one that says nothing for so long is left for another, if it is not to be left sooner."""
REFUSAL_CHECK_S = 0.2
RETRY_FIRST_S = 0.02
RETRY_MOST_S = 1.0


class Backoff:
    """Growing, jittered pauses between attempts."""

    def __init__(self) -> None:
        self._pause_s = RETRY_FIRST_S

    async def pause(self) -> None:
        await asyncio.sleep(self._pause_s * random.uniform(0.5, 1.0))
        self._pause_s = min(self._pause_s * 1.6, RETRY_MOST_S)


class MetaClient:
    """A connection to the metadata store at any of `addresses`. Use inside a running event loop."""

    def __init__(
        self, addresses: Sequence[str], *, me: Callable[[], Identity], limits: Limits = DEFAULT_LIMITS
    ) -> None:
        self._me = me
        self._addresses = addresses
        self._limits = limits
        if len(addresses) > 1:
            self._limits = replace(limits, silence_timeout_ms=min(limits.silence_timeout_ms, SILENCE_MS))
        self._peer = self._new_peer()

    def _new_peer(self) -> Peer:
        """A connection to one of the addresses, by chance."""
        return Peer(self._addresses, me=self._me, expected=Identity("meta", ""), limits=self._limits)

    def start(self) -> None:
        """Connect, and keep connected until `close`."""
        self._peer.start()

    async def close(self) -> None:
        await self._peer.close()

    @property
    def connected(self) -> bool:
        return self._peer.connected

    async def read(self, prefix: str, *, timeout_s: float = CALL_TIMEOUT_S) -> MetaEntries:
        """The entries under `prefix`. Raises UnavailableError, DeadlineExceeded, ClusterMismatch, VersionMismatch."""
        try:
            payload = await self._call(Op.META_READ, MetaRead(prefix), timeout_s)
        except OutcomeUnknown as error:
            raise UnavailableError(error.message) from error
        entries: MetaEntries = decode_meta_entries(payload)
        return entries

    async def txn(
        self, compares: Sequence[MetaCompare], puts: Sequence[MetaPut], *, timeout_s: float = CALL_TIMEOUT_S
    ) -> MetaTxnReply:
        """Apply all `puts` if all `compares` hold.

        Raises UnavailableError (not applied), OutcomeUnknown (settle it by another transaction on the same keys),
        ClusterMismatch, VersionMismatch, StorageError.
        """
        txn = MetaTxn(list(compares), list(puts))
        try:
            payload = await self._call(Op.META_TXN, txn, timeout_s)
        except DeadlineExceeded as error:
            raise OutcomeUnknown(f"A metadata transaction may or may not have been applied: {error.message}") from error
        reply: MetaTxnReply = decode_meta_txn_reply(payload)
        return reply

    async def admin(self, asked: msgspec.Raw, *, timeout_s: float = CALL_TIMEOUT_S) -> msgspec.Raw:
        """Hand on what somebody asks of the cluster as a whole, a META_ADMIN payload; what is answered, as it comes.

        Raises what is answered, UnavailableError (nothing was asked), OutcomeUnknown, DeadlineExceeded.
        """
        return await self._call(Op.META_ADMIN, asked, timeout_s)

    async def follow(self, on_topology: Callable[[Topology], None]) -> None:
        """Call `on_topology` with every newer view, the first as soon as there is one. Runs until cancelled.

        An unreachable store is waited for; views then stay as they are. Raises ClusterMismatch, VersionMismatch.
        """
        topology = Topology()
        backoff = Backoff()
        while True:
            try:
                delta = await self._watch(topology.revision)
            except (UnavailableError, OutcomeUnknown, DeadlineExceeded, StorageError) as error:
                log.debug("metadata_not_reached reason=%r", error.message)
                await backoff.pause()
                continue
            backoff = Backoff()
            if delta.revision < topology.revision:
                log.warning("metadata_went_back from=%d to=%d", topology.revision, delta.revision)
                topology = Topology()
            elif delta.revision > topology.revision:
                entries = [(entry.key, entry.value, entry.revision) for entry in delta.entries]
                topology = topology.with_entries(delta.revision, entries)
                self._check_cluster(topology)
                on_topology(topology)

    async def _watch(self, since: int) -> MetaEntries:
        timeout_s = WATCH_WAIT_MS / 1000 + WATCH_GRACE_S
        payload = await self._call(Op.META_WATCH, MetaWatch(since, WATCH_WAIT_MS), timeout_s)
        delta: MetaEntries = decode_meta_entries(payload)
        return delta

    async def _call(self, op: Op, message: Message | msgspec.Raw, timeout_s: float) -> msgspec.Raw:
        """As Peer.call, but a store that refuses this process for good is reported at once."""
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        while not self._peer.connected:
            if isinstance(self._peer.last_problem, ClusterMismatch | VersionMismatch):
                raise self._peer.last_problem
            if loop.time() >= end:
                raise UnavailableError(f"The metadata store was not reached: {self._peer.last_problem.message}")
            with suppress(ShardKVError):
                await self._peer.wait_connected(min(REFUSAL_CHECK_S, end - loop.time()))
        peer = self._peer
        try:
            return await peer.call(op, message, timeout_s=end - loop.time())
        except MetadataUnavailable:
            await self._leave(peer)
            raise

    async def _leave(self, peer: Peer) -> None:
        """Connect to another process, if there are several, since this one cannot reach the store."""
        if len(self._addresses) > 1 and peer is self._peer:
            self._peer = self._new_peer()
            self._peer.start()
            await peer.close()

    def _check_cluster(self, topology: Topology) -> None:
        mine = self._me().cluster_id
        theirs = topology.cluster.cluster_id if topology.cluster else None
        if mine and theirs and mine != theirs:
            raise ClusterMismatch(
                f"The metadata store at {self._peer.label} is of cluster {theirs}, this process belongs to {mine}.",
                hint="Check the address and the data directory.",
            )
