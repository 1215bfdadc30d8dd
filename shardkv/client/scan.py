"""Pages of an ordered scan, without I/O: the request for the next page from what the last one covered.

Invariants: every page moves the bound that is left, so a scan always ends; no key is asked for twice, and a cursor
begins right after the last key that was handed out.
Ranges are half-open [start, stop); a prefix is the range [prefix, next_prefix(prefix)).
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import length_hint

from shardkv.client.calls import PageCall
from shardkv.client.cursor import Cursor, decode_cursor, encode_cursor
from shardkv.client.missing import Missing, add_missing, missing_of, wants_partial
from shardkv.errors import InvalidArgument, RemoteProtocolError
from shardkv.limits import KIB, MIB, Limits
from shardkv.wire.checks import check_range
from shardkv.wire.messages import Page, Scan
from shardkv.write_batch import Text, pack_text

PAGE_ROWS = 10_000
PAGE_BYTES_FIRST = 64 * KIB
PAGE_BYTES_MOST = 1 * MIB
"""Pages grow from the first size to the last: the first row comes soon, a long scan in few round trips."""


_Range = tuple[bytes, bytes | None]
"""[start, stop), stop None for no end."""


def next_prefix(prefix: bytes) -> bytes | None:
    """The smallest key above all keys that begin with `prefix`; None when there is none."""
    kept = prefix.rstrip(b"\xff")
    return kept[:-1] + bytes((kept[-1] + 1,)) if kept else None


class ScanPlan:
    """What of a scan is still to be read. `call()` asks for the next page, `take(page)` notes what it covered."""

    __slots__ = (
        "_before",
        "_keys",
        "_keys_only",
        "_keyspace",
        "_left",
        "_page_bytes",
        "_partial",
        "_rest",
        "_reverse",
        "missing",
        "unread",
    )

    def __init__(
        self,
        start: bytes,
        stop: bytes | None,
        *,
        limit: int | None,
        reverse: bool,
        keys_only: bool,
        keyspace: str,
        partial: bool = False,
    ) -> None:
        self._rest = _not_empty((start, stop))
        """What no page has covered."""
        self._left = limit
        self._reverse = reverse
        self._keys_only = keys_only
        self._keyspace = keyspace
        self._partial = partial
        self._page_bytes = PAGE_BYTES_FIRST
        self._before = self._rest
        """What was not covered before the last page."""
        self._keys: list[bytes] = []
        """Those of the last page."""
        self.unread: Iterator[bytes] = iter(())
        """Those of them that were not handed out; whoever hands one out takes it from here."""
        self.missing: list[Missing] = []
        """What partial pages lacked."""

    @property
    def finished(self) -> bool:
        """No page is to be read any more."""
        return self._rest is None or self._left == 0

    @property
    def cursor(self) -> str | None:
        """What is left after the last key handed out, for a later scan; None when that is nothing."""
        unread = length_hint(self.unread)
        if not unread:
            rest = self._rest
        elif unread == len(self._keys):
            rest = self._before
        else:
            rest = self._after(self._keys[-unread - 1], self._before)
        return None if rest is None else encode_cursor(Cursor(self._keyspace, self._reverse, *rest))

    def call(self) -> PageCall:
        """The request for the next page. Requires: not finished."""
        assert self._rest is not None
        start, stop = self._rest
        rows = PAGE_ROWS if self._left is None else min(self._left, PAGE_ROWS)
        return PageCall(Scan(start, stop, self._reverse, self._keys_only, rows, self._page_bytes, None, self._partial))

    def take(self, page: Page) -> None:
        """Note what `page` covered; `unread` gives its keys, cut to the limit.

        Raises RemoteProtocolError when the page covered nothing of what was asked.
        """
        self._page_bytes = min(self._page_bytes * 4, PAGE_BYTES_MOST)
        if not self._keys_only and (page.values is None or len(page.values) < len(page.keys)):
            raise RemoteProtocolError("A page of a scan has keys without values.")
        self._before, self._rest = self._rest, self._uncovered(page)
        if self._left is not None:
            if len(page.keys) > self._left:
                del page.keys[self._left :]
                self._rest = self._after(page.keys[-1], self._before)
            self._left -= len(page.keys)
        for problem in page.problems:
            add_missing(self.missing, missing_of(problem, *self._covered()))
        self._keys = page.keys
        self.unread = iter(page.keys)

    def _uncovered(self, page: Page) -> _Range | None:
        """What is left once the page has covered its part."""
        frontier, rest = page.frontier, self._rest
        if frontier is None or rest is None:
            return None
        start, stop = rest
        if (stop is not None and frontier >= stop) if self._reverse else frontier <= start:
            raise RemoteProtocolError(f"A page of a scan covered nothing: its frontier is {frontier[:40]!r}.")
        return _not_empty((start, frontier) if self._reverse else (frontier, stop))

    def _covered(self) -> _Range:
        """What the last page covered."""
        assert self._before is not None
        start, stop = self._before
        if self._rest is None:
            return start, stop
        return (self._rest[1] or b"", stop) if self._reverse else (start, self._rest[0])

    def _after(self, key: bytes, rest: _Range | None) -> _Range | None:
        """What is left of `rest` once all up to and with `key` has been read."""
        if rest is None:
            return None
        start, stop = rest
        return _not_empty((start, key) if self._reverse else (key + b"\0", stop))


def _not_empty(rest: _Range) -> _Range | None:
    start, stop = rest
    return rest if stop is None or start < stop else None


def plan_scan(
    start: Text,
    stop: Text | None,
    *,
    prefix: Text | None,
    limit: int | None,
    reverse: bool,
    keys_only: bool,
    cursor: str | None,
    on_shard_error: str,
    keyspace: str,
    limits: Limits,
) -> ScanPlan:
    """The plan of `scan`: [start, stop), within `prefix` when given, or what is left as `cursor` says.

    Raises InvalidRange, InvalidArgument.
    """
    left, partial = check_limit(limit), wants_partial(on_shard_error)
    if cursor is not None:
        if start not in (b"", "") or stop is not None or prefix is not None or reverse:
            raise InvalidArgument(
                "A cursor says by itself what is left to read, and in which direction.",
                hint="Leave out start, stop, prefix and reverse; limit and keys_only may change.",
            )
        rest = decode_cursor(cursor, keyspace=keyspace)
        low, high, reverse = rest.start, rest.stop, rest.reverse
    else:
        low, high = to_bounds(start, stop, prefix, limits)
    return ScanPlan(
        low, high, limit=left, reverse=bool(reverse), keys_only=bool(keys_only), keyspace=keyspace, partial=partial
    )


def to_bounds(start: Text, stop: Text | None, prefix: Text | None, limits: Limits) -> tuple[bytes, bytes | None]:
    """[start, stop), within `prefix` when given; empty when its end is not after its start. Raises InvalidRange."""
    low = pack_text(start, "range start")
    high = None if stop is None else pack_text(stop, "range stop")
    check_range(low, high, limits)
    if prefix is not None:
        within = pack_text(prefix, "prefix")
        check_range(within, None, limits)
        end = next_prefix(within)
        low = max(low, within)
        high = end if high is None else high if end is None else min(high, end)
    return low, high


def plan_range(
    start: Text, last: Text, *, limit: int | None, reverse: bool, keys_only: bool, keyspace: str, limits: Limits
) -> ScanPlan:
    """The plan of `get_range`: from `start` to `last`, both included."""
    low, high = pack_text(start, "range start"), pack_text(last, "range end")
    check_range(low, high, limits)
    left = check_limit(limit)
    return ScanPlan(low, high + b"\0", limit=left, reverse=bool(reverse), keys_only=bool(keys_only), keyspace=keyspace)


def check_limit(limit: int | None) -> int | None:
    """Raises InvalidArgument for what is no number of rows."""
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 0):
        raise InvalidArgument(f"A limit must be a whole number of rows, at least 0, not {limit!r}.")
    return limit
