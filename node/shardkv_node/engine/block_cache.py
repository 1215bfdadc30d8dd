"""`BlockCache`: decoded blocks of tables, least recently used out first, bounded in bytes.

Invariant: `charged_bytes` is the sum of the charges of what is held, and is at most `bytes_max` after every `put`.

A charge is what a block costs once decoded (Python objects included), several times its size on disk; callers
compute it with `columns_charge` and `index_charge`. Not thread-safe: it belongs to the owner of the store.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

# A bytes object has 33 bytes of header and padding to 16, and a list 8 for each reference: 48 each on average.
_OBJECT_BYTES = 48
_BLOCK_BYTES = 600
_INT_BYTES = 40


def columns_charge(rows: int, raw_bytes: int) -> int:
    """Memory of a decoded data block with this many rows, whose encoded body had `raw_bytes`."""
    return _BLOCK_BYTES + raw_bytes + 2 * _OBJECT_BYTES * rows


def index_charge(entries: int, raw_bytes: int) -> int:
    """Memory of a decoded partition block that points at this many data blocks."""
    return _BLOCK_BYTES + raw_bytes + (_OBJECT_BYTES + 2 * _INT_BYTES) * entries


class BlockCache:
    """Blocks by an int key. A table takes a base for its keys from `new_base` and adds the block's offset."""

    __slots__ = ("_blocks", "_next_base", "bytes_max", "charged_bytes", "hits", "misses")

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.charged_bytes = 0
        self.hits = 0
        self.misses = 0
        self._blocks: OrderedDict[int, tuple[Any, int]] = OrderedDict()
        self._next_base = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def new_base(self) -> int:
        """A base that no other table has; offsets are below 2**48."""
        self._next_base += 1 << 48
        return self._next_base

    def get(self, key: int) -> Any:
        """The block, now the most recently used, or None."""
        held = self._blocks.get(key)
        if held is None:
            self.misses += 1
            return None
        self.hits += 1
        self._blocks.move_to_end(key)
        return held[0]

    def put(self, key: int, block: object, charge: int) -> None:
        """Hold the block. One larger than the whole cache is not held."""
        blocks = self._blocks
        replaced = blocks.pop(key, None)
        if replaced is not None:
            self.charged_bytes -= replaced[1]
        if charge > self.bytes_max:
            return
        blocks[key] = (block, charge)
        self.charged_bytes += charge
        while self.charged_bytes > self.bytes_max:
            self.charged_bytes -= blocks.popitem(last=False)[1][1]

    def forget(self, base: int, offsets: Sequence[int]) -> None:
        """Drop the blocks of one table at these offsets."""
        for offset in offsets:
            dropped = self._blocks.pop(base + offset, None)
            if dropped is not None:
                self.charged_bytes -= dropped[1]
