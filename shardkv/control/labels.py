"""Labels of tablets: which shard's data a tablet of a node's store holds, and as what.

    b"7"               shard 7, owned since the first epoch (it was placed here, empty)
    b"7@4"             shard 7, owned since epoch 4
    b"7/c0ffee@812"    a staging: shard 7 as the change c0ffee brings it; begun when the topology was at revision 812

Invariant: a label is written by one manifest edit, together with the tablet or in place of a staging's label.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardkv.topology.documents import FIRST_EPOCH


@dataclass(frozen=True, slots=True, order=True)
class Label:
    """A label, parsed. `since`: the epoch of the ownership; of a staging the store revision it was begun at."""

    shard: int
    change: str
    since: int

    @property
    def is_staging(self) -> bool:
        return bool(self.change)

    def encode(self) -> bytes:
        name = f"{self.shard}/{self.change}" if self.change else str(self.shard)
        plain = self.since == (0 if self.change else FIRST_EPOCH)
        return (name if plain else f"{name}@{self.since}").encode()


def owned_label(shard: int, since: int) -> bytes:
    """The label of the tablet of a shard that its node owns since epoch `since`."""
    return Label(shard, "", since).encode()


def staging_label(shard: int, change: str, revision: int) -> bytes:
    """The label of a tablet that a change fills; `revision` is the topology's at that time."""
    return Label(shard, change, revision).encode()


def parse_label(label: bytes) -> Label | None:
    """None for a label that is none of these: such a tablet is left alone."""
    name, _, since = label.partition(b"@")
    shard, slash, change = name.partition(b"/")
    if not shard.isdigit() or (b"@" in label and not since.isdigit()) or (slash and not change.isalnum()):
        return None
    default = 0 if change else FIRST_EPOCH
    return Label(int(shard), change.decode(), int(since) if since else default)
