"""`Reads`: what can be read of a store, the same for the store as it is now and for a `StoreSnapshot` of it.

Whoever reads is the owner of the store. Nothing here changes what is stored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from shardkv_node.engine.merge import merge_page
from shardkv_node.engine.source import Page
from shardkv_node.engine.tablet import Tablet


class Reads(ABC):
    """Tablets are named by their number; `InvalidArgument` for one that is not there, `StoreClosed` after the end."""

    @abstractmethod
    def _tablet(self, number: int) -> Tablet: ...

    @abstractmethod
    def time_ms(self) -> int:
        """Milliseconds since 1970, by the clock that expiries are judged by."""

    def get(self, tablet: int, key: bytes) -> bytes | None:
        """The value, or None when the key does not exist."""
        return self._tablet(tablet).get(key)

    def get_many(self, tablet: int, keys: Sequence[bytes]) -> list[bytes | None]:
        """A value or None for each key, in the order asked."""
        return self._tablet(tablet).get_many(keys)

    def get_versioned(self, tablet: int, key: bytes) -> tuple[bytes, int] | None:
        """(value, version), or None when the key does not exist."""
        return self._tablet(tablet).get_versioned(key)

    def ready_to_scan(self, tablets: Sequence[int]) -> bool:
        """Whether `scan_page` will take no longer than a page does: the first scan of a memtable wants its keys sorted.

        Does a few milliseconds of that work when there is some: call it again, with others served in between, until
        it returns True. A page read earlier is right too, but may take half a second.
        """
        for number in tablets:
            for memtable in self._tablet(number).memtables():
                if not memtable.feed_order():
                    return False
        return True

    def scan_page(
        self,
        tablets: Sequence[int],
        start: bytes,
        stop: bytes | None,
        *,
        reverse: bool = False,
        limit: int | None = None,
        bytes_max: int = 256 * 1024,
        keys_only: bool = False,
    ) -> Page:
        """The next live rows of [start, stop) over all these tablets, merged, and how far they cover it (`Page`)."""
        sources = [source for number in tablets for source in self._tablet(number).sources()]
        return merge_page(
            sources,
            start,
            stop,
            reverse=reverse,
            limit=limit,
            bytes_max=bytes_max,
            keys_only=keys_only,
            now_ms=self.time_ms(),
        )
