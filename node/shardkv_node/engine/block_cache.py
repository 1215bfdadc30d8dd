"""`BlockCache`: decoded blocks of tables, least recently used out first, bounded in bytes.

Invariant: `charged_bytes` is the sum of the charges of what is held, and is at most `bytes_max` after every `put`.
What others keep, but must fit into the same bound, is charged here too: rows (row_cache.py), and what tables reserve.

A charge is what a block costs once decoded (Python objects included), several times its size on disk; callers
compute it with `columns_charge` and `index_charge`. Not thread-safe: it belongs to the owner of the store.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

# A bytes object has 33 bytes of header and padding to 16, and a list 8 for each reference: 48 each on average.
_OBJECT_BYTES = 48
_BLOCK_BYTES = 600
_INT_BYTES = 40

RESERVED_SHARE = 4
"""One part of so many of the cache may be reserved."""
ROOM_SHARE = 4
"""There is room while at least one part of so many is free."""

_OFFSET_BITS = 48
_BASE_MASK = -1 << _OFFSET_BITS


def columns_charge(rows: int, raw_bytes: int) -> int:
    """Memory of a decoded data block with this many rows, whose encoded body had `raw_bytes`."""
    return _BLOCK_BYTES + raw_bytes + 2 * _OBJECT_BYTES * rows


def index_charge(entries: int, raw_bytes: int) -> int:
    """Memory of a decoded partition block that points at this many data blocks."""
    return _BLOCK_BYTES + raw_bytes + (_OBJECT_BYTES + 2 * _INT_BYTES) * entries


def keys_charge(keys: int, raw_bytes: int) -> int:
    """Memory of a list of so many keys with `raw_bytes` in all."""
    return _BLOCK_BYTES + raw_bytes + _OBJECT_BYTES * keys


class BlockCache:
    """Blocks by an int key. A table takes a base for its keys from `new_base` and adds the block's offset."""

    __slots__ = ("_blocks", "_keys", "_next_base", "bytes_max", "charged_bytes", "hits", "misses", "reserved_bytes")

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.charged_bytes = 0
        self.reserved_bytes = 0
        self.hits = 0
        self.misses = 0
        self._blocks: OrderedDict[int, tuple[Any, int]] = OrderedDict()
        self._keys: dict[int, set[int]] = {}
        """Per table, the keys of its blocks that are held."""
        self._next_base = 0

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def has_room(self) -> bool:
        """Nothing has to go soon."""
        return self.charged_bytes < self.bytes_max - self.bytes_max // ROOM_SHARE

    def __contains__(self, key: int) -> bool:
        """Whether the block is held; that is no use of it."""
        return key in self._blocks

    def new_base(self) -> int:
        """A base that no other table has; offsets are below 2**48."""
        self._next_base += 1 << _OFFSET_BITS
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

    def drop(self, key: int) -> None:
        """Hold the block no more, if it is held."""
        held = self._blocks.pop(key, None)
        if held is not None:
            self.charged_bytes -= held[1]
            self._unlist(key)

    def put(self, key: int, block: object, charge: int) -> None:
        """Hold the block. One larger than the whole cache is not held."""
        blocks = self._blocks
        if key in blocks:
            self.drop(key)
        if charge > self.bytes_max:
            return
        blocks[key] = block, charge
        keys = self._keys.get(key & _BASE_MASK)
        if keys is None:
            keys = self._keys[key & _BASE_MASK] = set()
        keys.add(key)
        self.charged_bytes += charge
        if self.charged_bytes > self.bytes_max:
            self._evict()

    def reserve(self, size: int) -> bool:
        """Charge what its owner keeps until `release`. False: all together would be too much of the cache."""
        if self.reserved_bytes + size > self.bytes_max // RESERVED_SHARE:
            return False
        self.reserved_bytes += size
        self.charge(size)
        return True

    def release(self, size: int) -> None:
        """Undo what was reserved."""
        self.reserved_bytes -= size
        self.charge(-size)

    def charge(self, size: int) -> None:
        """Count so many bytes more, or fewer, as used; blocks go until all fits, the one used longest ago first."""
        self.charged_bytes += size
        if self.charged_bytes > self.bytes_max:
            self._evict()

    def forget(self, base: int) -> list[Any]:
        """Drop all blocks of the table with this base: its file is closed or gone. Returns them: freeing takes time."""
        dropped = [self._blocks.pop(key) for key in self._keys.pop(base, ())]
        self.charged_bytes -= sum(charge for _, charge in dropped)
        return dropped

    def _evict(self) -> None:
        while self.charged_bytes > self.bytes_max and self._blocks:
            oldest, held = self._blocks.popitem(last=False)
            self.charged_bytes -= held[1]
            self._unlist(oldest)

    def _unlist(self, key: int) -> None:
        keys = self._keys[key & _BASE_MASK]
        keys.discard(key)
        if not keys:
            del self._keys[key & _BASE_MASK]
