"""Which metadata processes serve a store: each lists its address while it is wanted, for people who start a node or
router elsewhere.

Invariant: nothing rests on the list. A process that was killed stays listed until it starts again under its name.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

import msgspec

from shardkv.errors import DiskFull, OutcomeUnknown, ShardKVError, UnavailableError
from shardkv.metadata.client import Backoff
from shardkv.metadata.store import MetaStore
from shardkv.metadata.view import StoreView
from shardkv.wire.messages import MetaCompare, MetaPut

METAS = "metas/"
STRIKE_TIMEOUT_S = 0.5


class Listing:
    """Of one process, by its name."""

    def __init__(self, store: MetaStore, name: str) -> None:
        self._store = store
        self._key = f"{METAS}{name}"
        self._revision: int | None = None

    async def begin(self, address: str) -> None:
        """List the process, waiting for the store for as long as it takes. Raises StorageError."""
        put = MetaPut(self._key, msgspec.msgpack.encode({"address": address}))
        backoff = Backoff()
        while self._revision is None:
            try:
                self._revision = (await self._store.txn([], [put])).revision
            except (UnavailableError, OutcomeUnknown, DiskFull):
                await backoff.pause()

    async def end(self) -> None:
        """Strike it, unless a later start is listed by now; when the store is away it stays listed."""
        if self._revision is None:
            return
        with suppress(ShardKVError, TimeoutError):
            async with asyncio.timeout(STRIKE_TIMEOUT_S):
                await self._store.txn([MetaCompare(self._key, self._revision)], [MetaPut(self._key, None)])


def listed(view: StoreView) -> list[str]:
    """The addresses of all that are listed, in the order of their names."""
    found = {entry.key: entry.value for entry in view.entries(METAS)}
    return [msgspec.msgpack.decode(value)["address"] for _, value in sorted(found.items()) if value is not None]
