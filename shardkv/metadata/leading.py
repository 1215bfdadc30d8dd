"""One leader at a time among any number of processes on one metadata store, by a key attached to a lease.

Invariant: whoever leads knows the revision at which its key was made, and compares it in every transaction it does as
a leader. So the store itself refuses what a leader of the past, stopped in mid-step, still sends; that leading ends
in good time (`Term.held`) only saves the attempt. The lease says who should act; it is not why acting is safe.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress

from shardkv.errors import DiskFull, OutcomeUnknown, ShardKVError, UnavailableError
from shardkv.metadata.client import Backoff
from shardkv.metadata.store import MetaStore
from shardkv.metadata.view import StoreView
from shardkv.wire.messages import MetaCompare, MetaPut

log = logging.getLogger(__name__)

LEADER_KEY = "leader/controller"
LEASE_S = 5.0
KEEP_ALIVES_PER_LEASE = 3
RESIGN_TIMEOUT_S = 1.0
RETRY_S = 0.3


class Term:
    """A time of leading: from when the key was made until it is lost."""

    def __init__(self, lease: int, compare: MetaCompare, until: float) -> None:
        self.lease = lease
        self.compare = compare
        """What every transaction of this leader compares."""
        self.until = until
        """As `loop.time()`: till then the lease lasts for sure, unless it is kept alive."""

    @property
    def held(self) -> bool:
        """Whether the lease lasts, as far as this process can tell without asking."""
        return asyncio.get_running_loop().time() < self.until


class Leading:
    """Stands for leader again and again; `lead(term)` runs while this process leads and is cancelled when it ends."""

    def __init__(self, store: MetaStore, view: StoreView, document: bytes, *, lease_s: float = LEASE_S) -> None:
        self._store = store
        self._view = view
        self._document = document
        self._lease_s = lease_s
        self.term: Term | None = None

    async def run(self, lead: Callable[[Term], Awaitable[None]]) -> None:
        """Until cancelled. Raises what `lead` raises, and StorageError."""
        while True:
            term = self.term = await self._won()
            log.info("leading_began lease=%d", term.lease)
            try:
                await self._while_held(term, lead)
            finally:
                self.term = None
                await self._end(term.lease)
            log.warning("leading_ended lease=%d", term.lease)

    # Becoming the leader

    async def _won(self) -> Term:
        """Stand until elected."""
        backoff = Backoff()
        while True:
            try:
                if (term := await self._stand()) is not None:
                    return term
                await self._vacant()
                backoff = Backoff()
            except (UnavailableError, DiskFull) as error:
                log.debug("leading_put_off reason=%r", error.message)
                await backoff.pause()

    async def _stand(self) -> Term | None:
        """One attempt; None when somebody else leads. Whatever becomes of it, no key of a lost attempt stays."""
        since = asyncio.get_running_loop().time()
        lease = await self._store.grant(self._lease_s)
        try:
            reply = await self._store.txn(
                [MetaCompare(LEADER_KEY, 0)], [MetaPut(LEADER_KEY, self._document)], lease=lease
            )
        except OutcomeUnknown as error:
            await self._end(lease)
            raise UnavailableError(error.message) from error
        except ShardKVError:
            await self._end(lease)
            raise
        if not reply.applied:
            await self._end(lease)
            return None
        return Term(lease, MetaCompare(LEADER_KEY, reply.revision), since + self._lease_s)

    async def _vacant(self) -> None:
        """Until the leader's key is gone, as far as the view knows; or for a lease's time, should the view be old."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self._lease_s * random.uniform(1.0, 1.3)
        await self._view.moved(0.1)
        while self._view.get(LEADER_KEY) is not None and loop.time() < end:
            await self._view.moved(end - loop.time())

    # Being the leader

    async def _while_held(self, term: Term, lead: Callable[[Term], Awaitable[None]]) -> None:
        """Lead until the lease is lost, or `lead` ends."""
        leading = asyncio.ensure_future(lead(term))
        keeping = asyncio.ensure_future(self._keep(term))
        try:
            await asyncio.wait([leading, keeping], return_when=asyncio.FIRST_COMPLETED)
            for task in (leading, keeping):
                if task.done():
                    task.result()
        finally:
            leading.cancel()
            keeping.cancel()
            await asyncio.gather(leading, keeping, return_exceptions=True)

    async def _keep(self, term: Term) -> None:
        """Keep the lease alive until it is lost."""
        loop = asyncio.get_running_loop()
        pause_s = self._lease_s / KEEP_ALIVES_PER_LEASE
        while term.held:
            await asyncio.sleep(min(pause_s, max(0.0, term.until - loop.time())))
            since = loop.time()
            try:
                async with asyncio.timeout_at(term.until):
                    lasts_s = await self._store.keep_alive(term.lease)
            except (UnavailableError, TimeoutError):
                pause_s = RETRY_S
            else:
                pause_s = self._lease_s / KEEP_ALIVES_PER_LEASE
                term.until = since + min(lasts_s, self._lease_s) if lasts_s > 0 else 0.0

    async def _end(self, lease: int) -> None:
        """Give up a lease so that another can stand at once; if that fails, it ends by itself."""
        with suppress(ShardKVError, TimeoutError):
            async with asyncio.timeout(RESIGN_TIMEOUT_S):
                await self._store.revoke(lease)
