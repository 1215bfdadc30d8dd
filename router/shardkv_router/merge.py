"""Merging the pages of several nodes into one: pure.

Invariant: the merged page covers exactly what every page covers, never more: rows past the frontier (the key up to
which all nodes have spoken) are left for the next page, so no key is missed and none comes twice.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from operator import add, itemgetter

from shardkv.wire.messages import Page


def merge_pages(pages: Sequence[Page], *, reverse: bool, limit: int, bytes_max: int, keys_only: bool) -> Page:
    """One page of at most `limit` rows, in the scan's order. The pages' keys are distinct (shards are disjoint).

    It ends before the row that would take it over `bytes_max`, but holds at least one row when there is one.
    Forward, a page covers up to (not including) its frontier; in reverse, down to (and including) it.
    """
    frontier = _common_frontier([page.frontier for page in pages], reverse=reverse)
    keys: list[bytes] = []
    values: list[bytes] = []
    for page in pages:
        count = len(page.keys) if frontier is None else _covered(page.keys, frontier, reverse=reverse)
        keys += page.keys[:count]
        if not keys_only:
            values += (page.values or ())[:count]
    order = sorted(range(len(keys)), key=keys.__getitem__, reverse=reverse)
    keys, values = _pick(keys, order), _pick(values, order)
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
    sizes = map(add, map(len, keys), map(len, values)) if values else map(len, keys)
    return max(1, bisect_right(list(accumulate(sizes)), bytes_max))


def _common_frontier(frontiers: list[bytes | None], *, reverse: bool) -> bytes | None:
    """The nearest of them; None (everything is covered) only when all are None."""
    known = [frontier for frontier in frontiers if frontier is not None]
    if not known:
        return None
    return max(known) if reverse else min(known)


def _covered(keys: list[bytes], frontier: bytes, *, reverse: bool) -> int:
    """How many of the first keys of a page lie before the frontier."""
    return bisect_left(keys, 1, key=frontier.__gt__) if reverse else bisect_left(keys, frontier)


def _pick(column: list[bytes], order: list[int]) -> list[bytes]:
    """The items of a column in this order; of an empty one none."""
    return list(itemgetter(*order)(column)) if len(column) > 1 else column
