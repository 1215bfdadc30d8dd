"""`RowCache`: values that reads of one tablet found in its tables, by key, in front of filters, indexes and blocks.

Invariants:
  - it holds puts without an end only, found in the levels as they are: `Tablet.set_levels` empties it, and memtables
    are asked before it, so what it answers is what the tables would;
  - all row caches of a store together are charged to its `BlockCache`, and take at most a quarter of that.

Two generations instead of a list of recent use: a row goes into `young`; when the young ones of the store fill half of
the share, they become the old ones and the old ones go. An old row that is read again is young again. So a hit costs
one look-up in a dict.
"""

from __future__ import annotations

from collections.abc import KeysView

from shardkv_node.engine.block_cache import BlockCache

SHARE = 4
"""One part of so many of the block cache may be rows."""
ROW_OVERHEAD_BYTES = 33 + 33 + 100
"""Two bytes objects and a slot of a dict that is being filled."""


class RowCaches:
    """Those of all tablets of a store."""

    __slots__ = ("_all", "_generation_bytes_max", "_young_bytes", "blocks")

    def __init__(self, blocks: BlockCache) -> None:
        self.blocks = blocks
        self._generation_bytes_max = blocks.bytes_max // (2 * SHARE)
        self._young_bytes = 0
        self._all: set[RowCache] = set()

    def new(self) -> RowCache:
        cache = RowCache(self)
        self._all.add(cache)
        return cache

    def discard(self, cache: RowCache) -> None:
        """Its tablet is gone."""
        cache.clear()
        self._all.discard(cache)

    def make_room(self, size: int) -> bool:
        """Charge a row that is to be young, after which the young ones may be others. False: it is too large."""
        if self._young_bytes + size > self._generation_bytes_max:
            if size > self._generation_bytes_max:
                return False
            self._young_bytes = 0
            self.blocks.charge(-sum(cache.age() for cache in self._all))
        self._young_bytes += size
        self.blocks.charge(size)
        return True

    def release(self, young_bytes: int, old_bytes: int) -> None:
        self._young_bytes -= young_bytes
        self.blocks.charge(-young_bytes - old_bytes)


class RowCache:
    """Made by `RowCaches.new`."""

    __slots__ = ("_old", "_old_bytes", "_shared", "_young_bytes", "blocks", "young")

    def __init__(self, shared: RowCaches) -> None:
        self._shared = shared
        self.blocks = shared.blocks
        self.young: dict[bytes, bytes] = {}
        """Look here first, then call `get`."""
        self._old: dict[bytes, bytes] = {}
        self._young_bytes = self._old_bytes = 0

    def get(self, key: bytes) -> bytes | None:
        """The value, which is young now; None when it is not here."""
        value = self.young.get(key)
        if value is None and self._old:
            value = self._old.pop(key, None)
            if value is not None:
                size = len(key) + len(value) + ROW_OVERHEAD_BYTES
                self._old_bytes -= size
                self._shared.release(0, size)
                self.put(key, value)
        return value

    def put(self, key: bytes, value: bytes) -> None:
        """Hold the row, unless it is larger than a generation may be. Requires: it is not here."""
        size = len(key) + len(value) + ROW_OVERHEAD_BYTES
        if self._shared.make_room(size):
            self.young[key] = value
            self._young_bytes += size

    def forget(self, keys: KeysView[bytes]) -> None:
        """Drop the rows of these keys, those of them that are here: the tables say something newer now."""
        sizes = []
        for rows in (self.young, self._old):
            found = rows.keys() & keys
            sizes.append(sum(len(key) + len(rows.pop(key)) + ROW_OVERHEAD_BYTES for key in found))
        self._young_bytes -= sizes[0]
        self._old_bytes -= sizes[1]
        self._shared.release(*sizes)

    def age(self) -> int:
        """Drop the old rows and make the young ones old. Returns the bytes dropped."""
        dropped = self._old_bytes
        self._old, self._old_bytes = self.young, self._young_bytes
        self.young, self._young_bytes = {}, 0
        return dropped

    def clear(self) -> None:
        """The tables say something else now, nobody knows what."""
        self._shared.release(self._young_bytes, self._old_bytes)
        self.young, self._old = {}, {}
        self._young_bytes = self._old_bytes = 0
