"""`Write`, one write request on its way through the store, and `Group`, the writes that share one log group.

A write passes stages: sequenced and logged (`Store.log_group`), synced (the caller's syncer), applied
(`Store.apply_group`); only then may it be acknowledged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shardkv_node.engine.entries import Token
from shardkv_node.engine.tablet import Tablet


@dataclass(slots=True, eq=False)
class Write:
    """Operations on one tablet, applied in order and atomically. The caller has checked keys and values."""

    tablet: int
    keys: list[bytes]
    kinds: int | bytes
    """columns.PUT or columns.DELETE: one for all operations, or one byte each."""
    values: list[bytes]
    """One per key; b"" where the kind is DELETE."""
    token: Token | None = None
    want_existed: bool = False
    done: Callable[[Write], None] | None = None
    """Called once the outcome is known: applied, or refused with `error`."""

    version: int = 0
    """Given at sequencing; 0 before."""
    existed: list[bool] | None = None
    """With `want_existed`: for each operation, whether its key existed just before it."""
    applied: bool = False
    """It is visible, and as durable as the options ask."""
    error: Exception | None = None


@dataclass(slots=True, eq=False)
class Group:
    """Writes logged together. `accepted` leaves out those that were refused at sequencing."""

    writes: Sequence[Write]
    accepted: list[tuple[Write, Tablet]]
    end_offset: int
    """Of the group in its segment: synced up to here means durable."""
