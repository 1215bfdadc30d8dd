"""`RowCache`: values that reads of one tablet found in its tables, by key, in front of memtables and tables.

A hit is one look-up in `values`, which takes no lock and asks nothing else.

Invariants:
  - what is here is what the key's newest row says: only puts without an end are held, whoever applies a write calls
    `forget` with its keys in the same step, and levels that hold other rows than before empty it;
  - so it is changed by the owner of the tablet only, and `values` may be read by any thread;
  - all row caches of a store together are charged to its `BlockCache`, and take at most a quarter of that.

The row that came first goes first. A hit leaves no trace, so a row that is read often goes too; its next read finds it
in the tables and puts it back. Rows go one at a time, each tablet in turn: no read pays for many.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable

from shardkv_node.engine.block_cache import BlockCache

SHARE = 4
"""One part of so many of the block cache may be rows."""
ROW_OVERHEAD_BYTES = 33 + 33 + 180
"""Two bytes objects and their place in an ordered dict that is being filled."""


class RowCache:
    """Made by `RowCaches.new`."""

    __slots__ = ("_shared", "blocks", "values")

    def __init__(self, shared: RowCaches) -> None:
        self._shared = shared
        self.blocks = shared.blocks
        self.values: OrderedDict[bytes, bytes] = OrderedDict()
        """To look up only. The same object for good."""

    def hold(self, key: bytes, value: bytes) -> None:
        """Keep the row, unless it is larger than all rows may be. Requires: it is not here."""
        self._shared.hold(self, key, value)

    def forget(self, keys: Iterable[bytes]) -> None:
        """These keys were written."""
        values = self.values
        for key in filter(values.__contains__, keys):
            self._shared.release(row_bytes(key, values.pop(key)))

    def clear(self) -> None:
        """The tables may say anything else now, or nobody may read here any more."""
        self._shared.release(sum(map(row_bytes, self.values.keys(), self.values.values())))
        self.values.clear()


class RowCaches:
    """Those of all tablets of a store."""

    __slots__ = ("_bytes", "_bytes_max", "_filled", "blocks")

    def __init__(self, blocks: BlockCache) -> None:
        self.blocks = blocks
        self._bytes = 0
        self._bytes_max = blocks.bytes_max // SHARE
        self._filled: deque[RowCache] = deque()
        """Every cache that holds a row, and some that held one. The first one is the next to lose a row."""

    def new(self) -> RowCache:
        return RowCache(self)

    def hold(self, cache: RowCache, key: bytes, value: bytes) -> None:
        """`RowCache.hold`: what is over the limit then goes."""
        size = row_bytes(key, value)
        if size > self._bytes_max:
            return
        if not cache.values and cache not in self._filled:
            self._filled.append(cache)
        cache.values[key] = value
        self._bytes += size
        self.blocks.charge(size)
        while self._bytes > self._bytes_max:
            self._drop_one()

    def release(self, size: int) -> None:
        """So many bytes of rows are gone."""
        self._bytes -= size
        self.blocks.charge(-size)

    def _drop_one(self) -> None:
        values = self._filled[0].values
        if values:
            self.release(row_bytes(*values.popitem(last=False)))
            self._filled.rotate(-1)
        else:
            self._filled.popleft()


def row_bytes(key: bytes, value: bytes) -> int:
    """What a row is charged."""
    return len(key) + len(value) + ROW_OVERHEAD_BYTES
