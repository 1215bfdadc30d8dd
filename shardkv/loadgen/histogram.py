"""Latencies counted in steps, so that noting one costs next to nothing. Pure.

Invariant: a percentile is at most one step (about a microsecond) above what was measured; what is past the last
step is kept exactly.
"""

from __future__ import annotations

from collections.abc import Iterable

STEP_BITS = 10
"""A step is 1,024 ns."""
STEPS = 1 << 17
"""So many steps, about 134 ms, are counted."""


class Histogram:
    """How often each latency came. A driver in a hurry adds one to `counts[ns >> STEP_BITS]` by itself, and calls
    `note_long` when that raises IndexError."""

    __slots__ = ("_long", "counts")

    def __init__(self) -> None:
        self.counts = [0] * STEPS
        self._long: list[int] = []

    def note_long(self, ns: int) -> None:
        """Keep a latency that is past the last step."""
        self._long.append(ns)

    def percentiles_us(self, shares: Iterable[float]) -> list[float]:
        """For each of the ascending `shares` (of 1) the latency in us that so many did not exceed; 0 if none came."""
        self._long.sort()
        total = sum(self.counts) + len(self._long)
        found: list[float] = []
        passed, step = 0, -1
        for share in shares:
            rank = min(total, int(share * total) + 1)
            while passed < rank and step < STEPS - 1:
                step += 1
                passed += self.counts[step]
            if passed >= rank:
                found.append(((step + 1) << STEP_BITS) / 1000 if total else 0.0)
            else:
                found.append(self._long[rank - passed - 1] / 1000)
        return found
