"""What a metadata store can do, whatever keeps it: the seam between the cluster and its back ends.

Invariants every back end holds: a transaction is atomic and durable before it is answered; a revision rises with
each applied transaction, is that of its puts, and is never used again; an entry carries the revision of the
transaction that last wrote it; who follows misses no change, deletes included.

A transaction whose outcome is not known is settled by another one that is applied, or refused, on one of its keys;
never by a read, because it may still be on its way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from shardkv.wire.messages import MetaCompare, MetaEntries, MetaEntry, MetaPut, MetaTxnReply

NO_LEASE = 0


@dataclass(frozen=True, slots=True)
class Changes:
    """What is newer than what was told before, up to `revision`; a deleted entry has no value.

    `whole`: the entries are all there are, and what is not among them is gone. Every delete after
    `deletes_since` is among them.
    """

    revision: int
    entries: list[MetaEntry]
    whole: bool = False
    deletes_since: int = 0


OnChanges = Callable[[Changes], None]


class MetaStore(Protocol):
    """A small ordered map of text keys to documents. Used inside one event loop."""

    @property
    def label(self) -> str:
        """What to call it in messages and in status."""

    async def get(self, key: str) -> MetaEntry | None:
        """The entry of `key` as of now; None when there is none. Raises MetadataUnavailable, StorageError."""

    async def read(self, prefix: str) -> MetaEntries:
        """The entries whose key starts with `prefix` as of one moment after the call, in key order.

        Raises MetadataUnavailable, StorageError.
        """

    async def txn(
        self, compares: Sequence[MetaCompare], puts: Sequence[MetaPut], *, lease: int = NO_LEASE
    ) -> MetaTxnReply:
        """Apply all `puts` if every one of `compares` holds, else none of them. No key is put twice.

        With `lease` the keys vanish when that lease ends; when it has ended, nothing is applied.
        `applied` says which; `revision` is the store's revision afterwards.
        Raises OutcomeUnknown; and, when nothing was applied: InvalidArgument, MetadataUnavailable, DiskFull,
        StorageError (an embedded store is then poisoned: reopen it).
        """

    async def follow(self, since: int, on_changes: OnChanges) -> None:
        """Tell everything newer than `since` and then every change as it is made, revision after revision.

        The first telling says that the store was reached, whether it holds news or not. With `since` 0, or when the
        history since then is lost, it is `whole`. Runs until it is cancelled.
        Raises MetadataUnavailable when the store cannot be reached; what was told till then holds.
        """

    async def grant(self, ttl_s: float) -> int:
        """A new lease that ends `ttl_s` from now (a back end may round up). Raises MetadataUnavailable."""

    async def keep_alive(self, lease: int) -> float:
        """Let the lease begin anew. Returns for how many seconds, counted from the call; 0: it has ended.

        Raises MetadataUnavailable.
        """

    async def revoke(self, lease: int) -> None:
        """End the lease and delete what is attached to it. Raises MetadataUnavailable, OutcomeUnknown."""

    async def aclose(self) -> None:
        """Give up files and connections; the store cannot be used afterwards."""
