"""`KeyRuns`: distinct keys in order, fed piece by piece, no piece of work longer than a few milliseconds.

Keys arrive unordered. They gather in one young run; a full one is closed, and two closed runs of one size become one
of the next size (timsort merges them in C), up to `RUN_KEYS * 2 ** SIZE_MAX` keys. So a key is moved a few times, and
a scan merges a handful of runs. At most one merge is done for each run that is closed, the smallest one that is due:
that is enough to keep up, and bounds what one call takes.

Invariants: every run ascends; no key is in two runs; closed runs stand in order of age, their sizes never rise.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Sequence

RUN_KEYS = 4096
"""A young run is closed at this many keys; more should not be given to `add` at once."""
SIZE_MAX = 3
"""Runs of RUN_KEYS * 2 ** SIZE_MAX keys are merged no further: comparing keys far apart in memory takes 0.15 us."""

CHUNK_KEYS_FIRST = 32
CHUNK_KEYS_MOST = 512
"""Chunks grow from the first to the second, so that a scan of a few rows does not pay for hundreds."""
_SHARE_KEYS_LEAST = 4
_FEW = 16
"""A key is inserted into the young run by itself when the run is this much longer than what is added."""


class KeyRuns:
    """Owned by one thread at a time."""

    __slots__ = ("_closed", "_sizes", "_young")

    def __init__(self) -> None:
        self._closed: list[list[bytes]] = []
        self._sizes: list[int] = []
        self._young: list[bytes] = []

    def __len__(self) -> int:
        return sum(map(len, self._closed)) + len(self._young)

    def add(self, keys: Sequence[bytes]) -> None:
        """Take keys none of which is here yet, in any order; at most `RUN_KEYS`."""
        young = self._young
        if len(keys) * _FEW < len(young):
            for key in keys:
                insort(young, key)
        else:
            young += keys
            young.sort()
        if len(young) >= RUN_KEYS:
            self._close(young)

    def _close(self, run: list[bytes]) -> None:
        self._young = []
        closed, sizes = self._closed, self._sizes
        closed.append(run)
        sizes.append(0)
        for younger in range(len(sizes) - 1, 0, -1):
            size = sizes[younger]
            if size == SIZE_MAX:
                return
            if sizes[younger - 1] == size:
                merged = closed[younger - 1] + closed[younger]
                merged.sort()
                closed[younger - 1 : younger + 1] = [merged]
                sizes[younger - 1 : younger + 1] = [size + 1]
                return

    def chunks(self, start: bytes, stop: bytes | None, *, reverse: bool) -> Iterator[list[bytes]]:
        """The keys of [start, stop), each chunk ascending, the chunks ascending, or descending when `reverse`.

        Nothing may be added meanwhile.
        """
        spans = []
        for run in (*self._closed, self._young):
            low = bisect_left(run, start)
            high = len(run) if stop is None else bisect_left(run, stop, low)
            if low < high:
                spans.append((run, low, high))
        rows = CHUNK_KEYS_FIRST
        while spans:
            share = max(rows // len(spans), _SHARE_KEYS_LEAST)
            keys, spans = _take_last(spans, share) if reverse else _take_first(spans, share)
            yield keys
            rows = min(4 * rows, CHUNK_KEYS_MOST)

    def drop_run(self) -> bool:
        """Free one run, in some milliseconds. False: there is none left."""
        if self._closed:
            self._closed.pop()
            self._sizes.pop()
        else:
            self._young = []
        return bool(self._closed)


_Span = tuple[list[bytes], int, int]
"""The part [low, high) of a run; never empty."""


def _take_first(spans: list[_Span], share: int) -> tuple[list[bytes], list[_Span]]:
    """The first keys of all spans, at most `share` of each, ascending; and what is left of the spans."""
    edges = [run[low + share - 1] for run, low, high in spans if low + share < high]
    edge = min(edges) if edges else None
    keys: list[bytes] = []
    left = []
    for run, low, high in spans:
        # Up to the edge no span has more than its share, so nothing below it is left behind.
        end = high if edge is None else bisect_right(run, edge, low, min(low + share, high))
        keys += run[low:end]
        if end < high:
            left.append((run, end, high))
    if len(spans) > 1:
        keys.sort()
    return keys, left


def _take_last(spans: list[_Span], share: int) -> tuple[list[bytes], list[_Span]]:
    """The last keys of all spans, as `_take_first`; also ascending."""
    edges = [run[high - share] for run, low, high in spans if high - share > low]
    edge = max(edges) if edges else None
    keys: list[bytes] = []
    left = []
    for run, low, high in spans:
        first = low if edge is None else bisect_left(run, edge, max(low, high - share), high)
        keys += run[first:high]
        if low < first:
            left.append((run, low, first))
    if len(spans) > 1:
        keys.sort()
    return keys, left
