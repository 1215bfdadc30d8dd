"""`Reader`: reading as users do it, str or bytes in and bytes out, from many threads: of an `Engine` or a `Snapshot`.

Invariant: the store is touched only under the mutex, and by a scan for one page at a time. Values of its row cache are
looked up without: they may be gone at any moment, but are never wrong.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, Literal, overload

from shardkv.write_batch import Text
from shardkv_node.engine.arguments import check_limit, pack_bounds, pack_key, pack_keys
from shardkv_node.engine.reads import Reads
from shardkv_node.engine.source import Page

PAGE_BYTES = 256 * 1024
"""What a scan reads at a time."""
FIRST_PAGE_BYTES = 64 * 1024
"""The same, the first time: maybe no more is wanted."""
FIRST_ROWS_MOST = 1000
"""A scan limited to so many rows reads them at once, if they fit into the first page."""


class Reader(ABC):
    """Whoever inherits sets the fields and says when it cannot be used."""

    _mutex: threading.RLock
    _reads: Reads
    _tablet: int
    _key_bytes_max: int
    _known: Callable[[Any], bytes | None]
    """Values that need no search, by key; none once nothing can be read any more."""

    @abstractmethod
    def _check_usable(self) -> None:
        """Raise `StoreClosed` if nothing can be read any more."""

    def get(self, key: Text) -> bytes | None:
        """The value, or None when the key does not exist."""
        try:
            value = self._known(key)
        except (TypeError, ValueError):  # what may change, like a bytearray, has no hash
            value = None
        if value is not None:
            return value
        packed = key if type(key) is bytes and 0 < len(key) <= self._key_bytes_max else self._pack(key)
        self._check_usable()
        with self._mutex:
            return self._reads.get(self._tablet, packed)

    def get_versioned(self, key: Text) -> tuple[bytes, int] | None:
        """(value, version), or None when the key does not exist.

        A version is a whole number above 0. Each write has one, the same for all keys of a batch; later writes have
        greater ones. Give it to `put`, `delete` or `write` to write only if nobody else has meanwhile.
        """
        packed = self._pack(key)
        self._check_usable()
        with self._mutex:
            return self._reads.get_versioned(self._tablet, packed)

    def get_many(self, keys: Iterable[Text]) -> list[bytes | None]:
        """A value or None for each key, in the order asked; all from one moment."""
        packed = pack_keys(keys, self._key_bytes_max)
        self._check_usable()
        with self._mutex:
            return self._reads.get_many(self._tablet, packed)

    def count(self, start: Text = b"", stop: Text | None = None, *, prefix: Text | None = None) -> int:
        """How many keys exist in [start, stop), counted as `scan` reads them."""
        low, high = pack_bounds(start, stop, prefix)
        self._check_usable()
        return sum(len(page.keys) for page in self._pages(low, high, None, reverse=False, keys_only=True))

    @overload
    def scan(
        self,
        start: Text = b"",
        stop: Text | None = None,
        *,
        prefix: Text | None = None,
        limit: int | None = None,
        reverse: bool = False,
        keys_only: Literal[False] = False,
    ) -> Iterator[tuple[bytes, bytes]]: ...

    @overload
    def scan(
        self,
        start: Text = b"",
        stop: Text | None = None,
        *,
        prefix: Text | None = None,
        limit: int | None = None,
        reverse: bool = False,
        keys_only: Literal[True],
    ) -> Iterator[bytes]: ...

    def scan(
        self,
        start: Text = b"",
        stop: Text | None = None,
        *,
        prefix: Text | None = None,
        limit: int | None = None,
        reverse: bool = False,
        keys_only: bool = False,
    ) -> Iterator[tuple[bytes, bytes]] | Iterator[bytes]:
        """(key, value) pairs, or keys, of [start, stop) in key order; `prefix` narrows it, `limit` bounds the count.

        Read in pages. Of an engine, a key that exists for the whole scan is given exactly once, one that is written
        meanwhile may or may not be; of a snapshot, all pages show the same moment.
        Raises `InvalidRange` when `stop` is before `start`.
        """
        low, high = pack_bounds(start, stop, prefix)
        check_limit(limit)
        self._check_usable()
        if limit is not None and 0 < limit <= FIRST_ROWS_MOST:
            # Short scans are most of all scans: theirs is read at once, and no generator stands between.
            page = self._page(low, high, limit, FIRST_PAGE_BYTES, reverse=reverse, keys_only=keys_only)
            if page.frontier is None or len(page.keys) == limit:
                return iter(page.keys) if keys_only else zip(page.keys, page.values, strict=True)
        pages = self._pages(low, high, limit, reverse=reverse, keys_only=keys_only)
        if keys_only:
            return chain.from_iterable(page.keys for page in pages)
        return chain.from_iterable(zip(page.keys, page.values, strict=True) for page in pages)

    def _pages(
        self, start: bytes, stop: bytes | None, limit: int | None, *, reverse: bool, keys_only: bool
    ) -> Iterator[Page]:
        bytes_max = FIRST_PAGE_BYTES
        while limit is None or limit > 0:
            page = self._page(start, stop, limit, bytes_max, reverse=reverse, keys_only=keys_only)
            yield page
            if page.frontier is None:
                return
            limit = None if limit is None else limit - len(page.keys)
            start, stop = (start, page.frontier) if reverse else (page.frontier, stop)
            bytes_max = PAGE_BYTES

    def _page(
        self, start: bytes, stop: bytes | None, limit: int | None, bytes_max: int, *, reverse: bool, keys_only: bool
    ) -> Page:
        self._check_usable()
        reads, tablets = self._reads, (self._tablet,)
        while True:
            with self._mutex:  # let go of between the steps, for others to be served
                if reads.ready_to_scan(tablets):
                    return reads.scan_page(
                        tablets, start, stop, reverse=reverse, limit=limit, bytes_max=bytes_max, keys_only=keys_only
                    )

    def _pack(self, key: Text) -> bytes:
        return pack_key(key, self._key_bytes_max)
