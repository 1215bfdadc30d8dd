"""Coverage: of which keys a record of a token tells, after the tablets of two shards were merged.

Before a merge a record tells of every key of its tablet: coverage None. Afterwards it tells of the keys its own tablet
had: those below the boundary, or those from it on. Parts of one request to both shards have the same token, so without
this a part that was never made would pass for the other one, which was.

    coverage = [[low, high]...]     half-open, ascending, apart; low and high are keys (bytes) where tablets are merged
                                    by key, hash tokens (int) where by token; None: no bound at this end

A tablet and those made of it are split and merged in one of the two ways only: records of one way cannot be cut in the
other, and such a merge fails.

Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

from shardkv.topology.documents import HASH_TOKENS
from shardkv.topology.tokens import hash_token

Bound = bytes | int
Interval = tuple[Bound | None, Bound | None]
Coverage = list[Interval]

_TOKEN_MAX = HASH_TOKENS - 1


def narrowed(coverage: Coverage | None, low: Bound | None, high: Bound | None) -> Coverage:
    """What of it lies in [low, high); where that is nothing, an interval without extent: it tells keys from tokens."""
    if coverage is None:
        return [(low, high)]
    found: Coverage = []
    for start, stop in coverage:
        start = start if low is None else low if start is None else max(start, low)
        stop = stop if high is None else high if stop is None else min(stop, high)
        if start is None or stop is None or start < stop:  # type: ignore[operator]
            found.append((start, stop))
    nowhere = low if low is not None else high
    return found or [(nowhere, nowhere)]


def joined(one: Coverage | None, other: Coverage | None) -> Coverage | None:
    """Both together; None when that is everything."""
    if one is None or other is None:
        return None
    found: Coverage = []
    for start, stop in sorted([*one, *other], key=_place):
        if found and (found[-1][1] is None or (start is not None and start <= found[-1][1])):  # type: ignore[operator]
            last = found.pop()
            start, stop = last[0], None if stop is None or last[1] is None else max(stop, last[1])
        found.append((start, stop))
    return None if found == [(None, None)] else found


def _place(interval: Interval) -> tuple[bool, Bound]:
    low = interval[0]
    return (False, 0) if low is None else (True, low)


def covered(coverage: Coverage, keys: Sequence[bytes]) -> list[bool]:
    """Of each key, whether it is covered."""
    by_token = _by_token(coverage)
    points: Sequence[Bound] = [hash_token(key) for key in keys] if by_token else keys
    return [
        any((low is None or low <= point) and (high is None or point < high) for low, high in coverage)  # type: ignore[operator]
        for point in points
    ]


def coverage_of(keys: Sequence[bytes], like: Coverage) -> Coverage:
    """Of just these keys, by key or by token as the other one is."""
    if _by_token(like):
        return [(token, token + 1 if token < _TOKEN_MAX else None) for token in sorted(set(map(hash_token, keys)))]
    return [(key, key + b"\0") for key in sorted(set(keys))]


def _by_token(coverage: Coverage) -> bool:
    return any(isinstance(bound, int) for interval in coverage for bound in interval)
