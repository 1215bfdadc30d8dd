"""What nodes report of themselves, as far as the controller decides by it. Hints: nothing is safe because of them."""

from __future__ import annotations

import msgspec

from shardkv.topology.documents import TopologyBound


class ShardReport(msgspec.Struct, frozen=True, array_like=True):
    """One shard that a node serves."""

    shard: int
    bytes: int
    """Of its tables and memtables."""
    ops_s: float = 0.0
    """Requested keys a second, over the last while."""
    middle: TopologyBound | None = None
    """A token that halves its bytes; None: not known."""


class ChangeReport(msgspec.Struct, frozen=True):
    """How far a node is with a change."""

    id: str
    shard: int
    phase: str
    """ship, tail, fence, commit."""
    bytes_done: int = 0
    bytes_total: int = 0
    bytes_s: float = 0.0
    lag: int = 0
    """Log entries that are still to be applied."""


class NodeReport(msgspec.Struct, frozen=True):
    """A node at one time."""

    name: str
    incarnation: int
    revision: int
    """Of the topology it has carried out."""
    shards: list[ShardReport] = []
    changes: list[ChangeReport] = []
    kept: list[int] = []
    """Shards it has tablets of and does not serve; stagings not counted."""
    fenced: list[int] = []
    """Shards it owns, or owned, and answers nothing for until their epoch moves on."""
    missing: list[int] = []
    """Shards it owns and has no tablet of, though it had."""
    free_bytes: int | None = None
    """Room on its disk."""
