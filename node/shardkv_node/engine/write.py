"""`Write`, one write request on its way through the store, and `Group`, the writes that share one log group. Many plain
puts go as one `Puts` instead.

A write passes stages: sequenced and logged (`Store.log_group`), synced (the caller's syncer), applied
(`Store.apply_group`); only then may it be acknowledged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shardkv.errors import ShardKVError
from shardkv_node.engine.columns import NO_EXPIRY
from shardkv_node.engine.entries import Token
from shardkv_node.engine.puts import Puts
from shardkv_node.engine.tablet import Tablet


@dataclass(slots=True, eq=False)
class Write:
    """Operations on one tablet, applied in order and atomically. The caller has checked keys and values.

    A write refused at sequencing gets its `error` together with the acknowledgements of its group, not before: what
    it was refused for may be in the same group, and must not be told before it is durable.
    """

    tablet: int
    keys: list[bytes]
    kinds: int | bytes
    """columns.PUT, PUT_EXPIRING or DELETE: one for all operations, or one byte each."""
    values: list[bytes]
    """One per key; b"" where the kind is DELETE."""
    expiries: int | bytes = NO_EXPIRY
    """As in `Columns`: when each PUT_EXPIRING ends, `NO_EXPIRY` for all other kinds."""
    conditions: Sequence[tuple[bytes, int]] = ()
    """(key, version) pairs: the write is refused with `ConditionFailed` unless each of these keys has this version
    just before it; 0: unless the key does not exist. The keys need not be among those written."""
    token: Token | None = None
    """Its lane and its number there: a write with the same one is not made again, but gets the outcome of the first."""
    again: bool = False
    """With a token: it may have been sent before, so that a refusal for good is recorded as well."""
    want_existed: bool = False
    add: int | None = None
    """The write is one PUT, whose value is made at sequencing: the number its key has then (0 for none), plus this.
    With an expiry of its own it ends then; else when the key would have ended. Needs `want_existed`, by which the
    store knows without a look at this field that there is something to judge."""
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
    """Writes logged together."""

    writes: Sequence[Write | Puts]
    accepted: list[tuple[Write, Tablet] | Puts]
    """Those that were logged; behind them the writes of records, which nobody asked for."""
    refused: list[tuple[Write, ShardKVError]]
    """Those that were not logged, and why."""
    repeated: list[Write]
    """Those that were not logged because they were made before: by their token the outcome is known."""
    end_offset: int
    """Of the group in its segment: synced up to here means durable."""
