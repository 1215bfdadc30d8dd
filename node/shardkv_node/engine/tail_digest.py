"""`TailDigest`: says in one number what was handed over while a tablet is moved, whatever the order.

The store a tablet is in adds every item it gave out, the store it goes to every item it took in; when the tablet is
fenced they compare (count, digest). An item is one slice of what was in memory at the pin, or one write since then.

    digest = sum of item hashes mod 2^128
    item hash = xxh3-128 of the item as msgpack

Pure. Invariant: equal items give equal hashes in every process and version: the encoding of an item never changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import xxhash

_encode = msgspec.msgpack.Encoder().encode
_hash = xxhash.xxh3_128_intdigest
_MASK = (1 << 128) - 1


def item_hash(
    versions: int | bytes,
    keys: Sequence[bytes],
    kinds: int | bytes,
    expiries: int | bytes,
    values: Sequence[bytes],
    *,
    records: bool,
) -> int:
    """The hash of rows as they were handed over: those of the tablet with `records` of tokens, or of the tablet itself.

    `versions`, `kinds`, `expiries`: one for all rows or one each, as in `Columns`, and told apart.
    """
    return _hash(_encode((records, versions, keys, kinds, expiries, values)))


class TailDigest:
    """The running sum. Two are equal when they were told the same items."""

    __slots__ = ("count", "total")

    def __init__(self) -> None:
        self.count = 0
        self.total = 0

    def add(self, hashed: int) -> None:
        """Count an item by its `item_hash`."""
        self.count += 1
        self.total = (self.total + hashed) & _MASK

    @property
    def value(self) -> tuple[int, str]:
        """What the two sides compare: how many items, and 32 hex digits."""
        return self.count, f"{self.total:032x}"
