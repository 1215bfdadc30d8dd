"""Merging the pages of several nodes into one: pure.

Invariant: the merged page covers exactly what every page covers, never more: rows past the frontier (the key up to
which all nodes have spoken) are left for the next page, so no key is missed and none comes twice.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from shardkv.wire.messages import Page


def merge_pages(pages: Sequence[Page], *, reverse: bool, limit: int, bytes_max: int, keys_only: bool) -> Page:
    """One page of at most `limit` rows, in the scan's order. The pages' keys are distinct (shards are disjoint).

    It ends before the row that would take it over `bytes_max`, but holds at least one row when there is one.
    Forward, a page covers up to (not including) its frontier; in reverse, down to (and including) it.
    """
    frontier = _common_frontier([page.frontier for page in pages], reverse=reverse)
    rows: dict[bytes, bytes] = {}
    for page in pages:
        rows.update(zip(page.keys, page.keys if page.values is None else page.values, strict=True))
    keys = sorted(rows, reverse=reverse)
    if frontier is not None:
        keys = _covered(keys, frontier, reverse=reverse)
    values = [] if keys_only else list(map(rows.__getitem__, keys))
    fitting = min(limit, _rows_within(keys, values, bytes_max))
    if fitting < len(keys):
        keys, values = keys[:fitting], values[:fitting]
        frontier = frontier_after(keys[-1], reverse=reverse)
    return Page(keys, None if keys_only else values, frontier, None, [])


def frontier_after(key: bytes, *, reverse: bool) -> bytes:
    """The frontier of a page whose last row is `key`."""
    return key if reverse else key + b"\x00"


def _rows_within(keys: list[bytes], values: list[bytes], bytes_max: int) -> int:
    """How many of the first rows fit into `bytes_max`; at least one."""
    sizes = list(map(len, keys))
    if values:
        sizes = [key + value for key, value in zip(sizes, map(len, values), strict=True)]
    return max(1, bisect_right(list(accumulate(sizes)), bytes_max))


def _common_frontier(frontiers: list[bytes | None], *, reverse: bool) -> bytes | None:
    """The nearest of them; None (everything is covered) only when all are None."""
    known = [frontier for frontier in frontiers if frontier is not None]
    if not known:
        return None
    return max(known) if reverse else min(known)


def _covered(keys: list[bytes], frontier: bytes, *, reverse: bool) -> list[bytes]:
    return [key for key in keys if key >= frontier] if reverse else [key for key in keys if key < frontier]
