"""Merging runs of rows: `merge_newest` for flush and compaction, `merge_page` for scans.

Invariant: of all rows with a key, only the one of the newest source is seen; a delete hides what is older. Sources are
always given oldest first.

How: rows of several runs are put one after the other, a dict made of the keys keeps for each its last position,
`sorted` merges what are already runs (timsort), and `itemgetter` picks the columns: a few calls into C for any
number of rows.
Chunks of any size are merged in rounds: a round takes from every source what lies up to the first end of a chunk.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, compress, pairwise
from operator import add, itemgetter

from shardkv.errors import InvalidArgument
from shardkv_node.engine.columns import (
    DELETE,
    EMPTY,
    PUT,
    PUT_EXPIRING,
    Columns,
    concat,
    expand_u64,
    pack_u64,
)
from shardkv_node.engine.expiry import end_expired
from shardkv_node.engine.source import Page, Source

ROWS_EXAMINED_MAX = 16 * 1024
"""A page ends after about this many rows, live or not: so a desert of deletes never holds up the caller."""

_LIVE = bytes(kind in (PUT, PUT_EXPIRING) for kind in range(256))
_DEAD = bytes(not live for live in _LIVE)
_NOT_DELETED = bytes(kind != DELETE for kind in range(256))


def take(columns: Columns, rows: Sequence[int], keys: list[bytes] | None = None) -> Columns:
    """These rows, in this order. `keys`: their keys, when the caller has them already."""
    if not rows:
        return EMPTY
    if len(rows) == 1:
        return columns.slice(rows[0], rows[0] + 1)
    pick, n = itemgetter(*rows), len(columns)
    kinds, versions, expiries = columns.kinds, columns.versions, columns.expiries
    return Columns(
        list(pick(columns.keys)) if keys is None else keys,
        kinds if isinstance(kinds, int) else bytes(pick(kinds)),
        versions if isinstance(versions, int) else pack_u64(pick(expand_u64(versions, n))),
        expiries if isinstance(expiries, int) else pack_u64(pick(expand_u64(expiries, n))),
        list(pick(columns.values)),
    )


def merge_newest(runs: Sequence[Columns], *, drop_tombstones: bool, now_ms: int = 0) -> Columns:
    """One row per key of all runs (oldest first), ascending: the newest one. What ended by `now_ms` becomes a delete.

    `drop_tombstones`: leave deletes out; right only when no older row of these keys can be anywhere else.
    """
    runs = [run for run in runs if run.keys]
    if not runs:
        return EMPTY
    merged = end_expired(runs[0] if len(runs) == 1 else _merge_runs(runs), now_ms)
    return without_tombstones(merged) if drop_tombstones else merged


def newest_rows(keys: Sequence[bytes]) -> tuple[list[bytes], list[int]]:
    """The distinct keys ascending, and for each the last position at which it stands in `keys`."""
    position = dict(zip(keys, range(len(keys)), strict=True))
    ordered = sorted(position)
    return ordered, list(map(position.__getitem__, ordered))


def without_tombstones(columns: Columns) -> Columns:
    kinds = columns.kinds
    if isinstance(kinds, int):
        return EMPTY if kinds == DELETE else columns
    if DELETE not in kinds:
        return columns
    return take(columns, list(compress(range(len(columns)), kinds.translate(_NOT_DELETED))))


def _merge_runs(runs: list[Columns]) -> Columns:
    ascending = sorted(runs, key=_first_key)
    if all(one.keys[-1] < two.keys[0] for one, two in pairwise(ascending)):
        return concat(ascending)
    whole = concat(runs)
    ordered, rows = newest_rows(whole.keys)
    return take(whole, rows, ordered)


def _first_key(run: Columns) -> bytes:
    return run.keys[0]


class _Feed:
    """One source of a merge: the rows [low, high) of `buffer` are not merged yet."""

    __slots__ = ("buffer", "chunks", "gather_bytes", "high", "low")

    def __init__(self, chunks: Iterator[Columns], gather_bytes: int) -> None:
        self.chunks = chunks
        self.gather_bytes = gather_bytes
        self.buffer = EMPTY
        self.low = self.high = 0

    def refill(self, *, reverse: bool) -> bool:
        """Get rows when there are none left. False: the source has ended."""
        if self.low < self.high:
            return True
        parts: list[Columns] = []
        missing_bytes = self.gather_bytes
        for chunk in self.chunks:
            if chunk.keys:
                parts.append(chunk)
                if missing_bytes > 0:
                    missing_bytes -= sum(map(len, chunk.keys)) + sum(map(len, chunk.values))
                if missing_bytes <= 0:
                    break
        if not parts:
            return False
        self.buffer = concat(parts[::-1] if reverse else parts)
        self.low, self.high = 0, len(self.buffer.keys)
        return True

    def take_upto(self, edge: bytes) -> Columns:
        """Take the rows with keys <= edge."""
        end = bisect_right(self.buffer.keys, edge, self.low, self.high)
        rows = self._slice(self.low, end)
        self.low = end
        return rows

    def take_from(self, edge: bytes) -> Columns:
        """Take the rows with keys >= edge."""
        first = bisect_left(self.buffer.keys, edge, self.low, self.high)
        rows = self._slice(first, self.high)
        self.high = first
        return rows

    def take_rest(self) -> Columns:
        """Take all rows there are."""
        rows = self._slice(self.low, self.high)
        self.low = self.high
        return rows

    def _slice(self, low: int, high: int) -> Columns:
        whole = low == 0 and high == len(self.buffer.keys)
        return self.buffer if whole else self.buffer.slice(low, high)


def merge_rounds(
    sources: Sequence[Source], start: bytes, stop: bytes | None, *, reverse: bool, gather_bytes: int = 0
) -> Iterator[list[Columns]]:
    """Rows of [start, stop) in rounds: every round holds all rows of one stretch of keys, oldest source first.

    The parts of a round are not empty, each ascends, and no key of a round is in another one. Stretches ascend, or
    descend when `reverse`. `gather_bytes`: gather chunks of a source up to so many bytes of keys and values before a
    round (larger rounds: less work per row, more memory); 0: a chunk at a time.
    """
    if len(sources) == 1 and not gather_bytes:
        for chunk in sources[0].chunks(start, stop, reverse=reverse):
            if chunk.keys:
                yield [chunk]
        return
    feeds = [_Feed(iter(source.chunks(start, stop, reverse=reverse)), gather_bytes) for source in sources]
    while feeds := [feed for feed in feeds if feed.refill(reverse=reverse)]:
        if len(feeds) == 1:
            parts = [feeds[0].take_rest()]
        elif reverse:
            edge = max(feed.buffer.keys[feed.low] for feed in feeds)
            parts = [feed.take_from(edge) for feed in feeds]
        else:
            edge = min(feed.buffer.keys[feed.high - 1] for feed in feeds)
            parts = [feed.take_upto(edge) for feed in feeds]
        yield [part for part in parts if part.keys]


def merge_page(
    sources: Sequence[Source],
    start: bytes,
    stop: bytes | None,
    *,
    reverse: bool,
    limit: int | None,
    bytes_max: int,
    keys_only: bool,
    now_ms: int = 0,
) -> Page:
    """The next live rows of [start, stop), newest first wins, and the frontier up to which they are all (see `Page`).

    `sources`: oldest first. `limit`: at most so many rows (None: no limit). `bytes_max`: the page ends before the row
    that would take keys and values over it, but holds at least one row. It also ends, maybe empty, after
    `ROWS_EXAMINED_MAX` rows. With `keys_only` values are neither returned nor counted. In a reverse page keys descend.
    Rows that ended by `now_ms` are not live.
    """
    page = Page([], [], None)
    if limit is not None and limit < 1:
        raise InvalidArgument(f"A page of {limit} rows would never get anywhere; ask for at least one.")
    if stop is not None and start >= stop:
        return page
    room_bytes, examined = bytes_max, 0
    for parts in merge_rounds(sources, start, stop, reverse=reverse):
        parts = [end_expired(part, now_ms) if part.expiries else part for part in parts]
        keys, values = _live_rows(parts, reverse=reverse, keys_only=keys_only)
        found = len(keys)
        if limit is not None and found > limit - len(page.keys):
            keys, values = keys[: limit - len(page.keys)], values[: limit - len(page.keys)]
        size = sum(map(len, keys)) + sum(map(len, values))
        if size > room_bytes:
            # A page always makes progress, even if its first row is larger than a page may be.
            fitting = max(_fitting(keys, values, room_bytes), 0 if page.keys else 1)
            keys, values = keys[:fitting], values[:fitting]
        page.keys += keys
        page.values += values
        if len(keys) < found:
            # When nothing of this round fitted, coverage still ends after the last row of the rounds before.
            page.frontier = _frontier_after(page.keys[-1], start, stop, reverse=reverse)
            return page
        room_bytes -= size
        examined += sum(map(len, parts))
        if len(page.keys) == limit or examined >= ROWS_EXAMINED_MAX:
            edge = min(part.keys[0] for part in parts) if reverse else max(part.keys[-1] for part in parts)
            page.frontier = _frontier_after(edge, start, stop, reverse=reverse)
            return page
    return page


def _fitting(keys: list[bytes], values: list[bytes], room_bytes: int) -> int:
    """How many of the first rows take at most so many bytes. `values` may be empty: keys only."""
    sizes = map(add, map(len, keys), map(len, values)) if values else map(len, keys)
    return bisect_right(list(accumulate(sizes)), room_bytes)


def _frontier_after(edge: bytes, start: bytes, stop: bytes | None, *, reverse: bool) -> bytes | None:
    """Where the next page begins (or, in reverse, stops) once all keys up to and with `edge` are covered."""
    if reverse:
        return edge if edge > start else None
    successor = edge + b"\0"
    return successor if stop is None or successor < stop else None


def _live_rows(parts: list[Columns], *, reverse: bool, keys_only: bool) -> tuple[list[bytes], list[bytes]]:
    """Keys and values of the live rows of one round, in the order of the page. May return lists of a part itself."""
    if len(parts) == 1:
        keys, values = _living(parts[0])[:2]
    else:
        newest = _newest_living(parts, keys_only=keys_only)
        keys = sorted(newest)
        values = [] if keys_only else list(map(newest.__getitem__, keys))
    if keys_only:
        values = []
    return (keys[::-1], values[::-1]) if reverse else (keys, values)


def _newest_living(parts: list[Columns], *, keys_only: bool) -> dict[bytes, bytes]:
    """The value of each key whose newest row is live; something else in its place with `keys_only`."""
    newest: dict[bytes, bytes] = {}
    for part in parts:
        keys, values, dead = _living(part)
        newest.update(zip(keys, keys if keys_only else values, strict=True))
        if dead:
            ended = newest.keys() & dead
            if len(ended) == len(newest):
                newest.clear()
            else:
                for key in ended:
                    del newest[key]
    return newest


def _living(part: Columns) -> tuple[list[bytes], list[bytes], list[bytes]]:
    """Keys and values of the rows that are live, and the keys of the others."""
    keys, values, kinds = part.keys, part.values, part.kinds
    if isinstance(kinds, int):
        return (keys, values, []) if _LIVE[kinds] else ([], [], keys)
    live = kinds.translate(_LIVE)
    if 0 not in live:
        return keys, values, []
    return list(compress(keys, live)), list(compress(values, live)), list(compress(keys, kinds.translate(_DEAD)))
