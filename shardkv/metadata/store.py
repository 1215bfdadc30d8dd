"""What a metadata store can do, whatever keeps it: the seam between the cluster and its back ends.

Invariants every back end holds: a transaction is atomic and durable before it is answered; the revision rises by one
with each applied transaction and never otherwise; an entry carries the revision of the transaction that last wrote
it; a deleted key stays visible to `changes_since`, so that nobody who watches misses a delete.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from shardkv.wire.messages import MetaCompare, MetaEntries, MetaEntry, MetaPut, MetaTxnReply


class MetaStore(Protocol):
    """A small ordered map of text keys to documents."""

    @property
    def revision(self) -> int:
        """The revision of the newest applied transaction; 0 for an empty store."""

    def get(self, key: str) -> MetaEntry | None:
        """The entry of `key`; None when there is none."""

    def read(self, prefix: str) -> MetaEntries:
        """The entries whose key starts with `prefix`, in key order, deleted ones left out."""

    def changes_since(self, revision: int) -> MetaEntries:
        """The entries written after `revision`, in key order; a deleted one has no value."""

    def txn(self, compares: Sequence[MetaCompare], puts: Sequence[MetaPut]) -> MetaTxnReply:
        """Apply all `puts` if every one of `compares` holds, else none of them.

        `applied` says which; `revision` is the store's revision afterwards.
        Raises DiskFull (nothing was applied), StorageError (the store is then poisoned: reopen it).
        """

    def close(self) -> None:
        """Give up the files; the store cannot be used afterwards."""
