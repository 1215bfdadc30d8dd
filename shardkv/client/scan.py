"""Pages of an ordered scan, without I/O: the request for the next page from what the last one covered.

Invariants: every page moves the bound that is left, so a scan always ends; no key is asked for twice.
Ranges are half-open [start, stop); a prefix is the range [prefix, next_prefix(prefix)).
"""

from __future__ import annotations

from shardkv.client.calls import PageCall
from shardkv.errors import InvalidArgument, RemoteProtocolError
from shardkv.limits import KIB, MIB, Limits
from shardkv.wire.checks import check_range
from shardkv.wire.messages import Page, Scan
from shardkv.write_batch import Text, pack_text

PAGE_ROWS = 10_000
PAGE_BYTES_FIRST = 64 * KIB
PAGE_BYTES_MOST = 1 * MIB
"""Pages grow from the first size to the last: the first row comes soon, a long scan in few round trips."""


def next_prefix(prefix: bytes) -> bytes | None:
    """The smallest key above all keys that begin with `prefix`; None when there is none."""
    kept = prefix.rstrip(b"\xff")
    return kept[:-1] + bytes((kept[-1] + 1,)) if kept else None


class ScanPlan:
    """What of a scan is still to be read. `call()` asks for the next page, `take(page)` notes what it covered."""

    __slots__ = ("_keys_only", "_left", "_page_bytes", "_reverse", "_start", "_stop", "finished")

    def __init__(self, start: bytes, stop: bytes | None, *, limit: int | None, reverse: bool, keys_only: bool) -> None:
        self._start = start
        self._stop = stop
        self._left = limit
        self._reverse = reverse
        self._keys_only = keys_only
        self._page_bytes = PAGE_BYTES_FIRST
        self.finished = limit == 0 or (stop is not None and start >= stop)

    def call(self) -> PageCall:
        """The request for the next page. Requires: not finished."""
        rows = PAGE_ROWS if self._left is None else min(self._left, PAGE_ROWS)
        request = Scan(self._start, self._stop, self._reverse, self._keys_only, rows, self._page_bytes, None)
        return PageCall(request)

    def take(self, page: Page) -> None:
        """Note what `page` covered. Raises RemoteProtocolError when it covered nothing of what was asked."""
        self._page_bytes = min(self._page_bytes * 4, PAGE_BYTES_MOST)
        if self._left is not None:
            del page.keys[self._left :]
            self._left -= len(page.keys)
        if not self._keys_only and (page.values is None or len(page.values) < len(page.keys)):
            raise RemoteProtocolError("A page of a scan has keys without values.")
        if page.frontier is None or self._left == 0:
            self.finished = True
        elif self._reverse:
            if self._stop is not None and page.frontier >= self._stop:
                raise _stuck(page.frontier)
            self._stop = page.frontier
            self.finished = self._stop <= self._start
        else:
            if page.frontier <= self._start:
                raise _stuck(page.frontier)
            self._start = page.frontier
            self.finished = self._stop is not None and self._start >= self._stop


def _stuck(frontier: bytes) -> RemoteProtocolError:
    return RemoteProtocolError(f"A page of a scan covered nothing: its frontier is {frontier[:40]!r}.")


def plan_scan(
    start: Text,
    stop: Text | None,
    *,
    prefix: Text | None,
    limit: int | None,
    reverse: bool,
    keys_only: bool,
    limits: Limits,
) -> ScanPlan:
    """The plan of `scan`: [start, stop), within `prefix` when given. Raises InvalidRange, InvalidArgument."""
    low = pack_text(start, "range start")
    high = None if stop is None else pack_text(stop, "range stop")
    check_range(low, high, limits)
    if prefix is not None:
        within = pack_text(prefix, "prefix")
        check_range(within, None, limits)
        end = next_prefix(within)
        low = max(low, within)
        high = end if high is None else high if end is None else min(high, end)
    return ScanPlan(low, high, limit=_check_limit(limit), reverse=bool(reverse), keys_only=bool(keys_only))


def plan_range(
    start: Text, last: Text, *, limit: int | None, reverse: bool, keys_only: bool, limits: Limits
) -> ScanPlan:
    """The plan of `get_range`: from `start` to `last`, both included."""
    low, high = pack_text(start, "range start"), pack_text(last, "range end")
    check_range(low, high, limits)
    return ScanPlan(low, high + b"\0", limit=_check_limit(limit), reverse=bool(reverse), keys_only=bool(keys_only))


def _check_limit(limit: int | None) -> int | None:
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 0):
        raise InvalidArgument(f"A limit must be a whole number of rows, at least 0, not {limit!r}.")
    return limit
