"""A hybrid logical clock: wall time that never goes back and orders what messages connect.

A reading is one unsigned 64-bit int: milliseconds since 1970 in the upper 48 bits, a counter in the lower 16.
Source: Kulkarni and others, "Logical Physical Clocks", 2014. Time is an argument; this file reads no clock.

Invariant: readings of one clock strictly rise, and are above every reading it has `observed`.
"""

from __future__ import annotations

COUNTER_BITS = 16
DRIFT_MS_MAX = 60_000
"""A peer's reading further ahead than this is not followed: one wrong clock must not drag all others along."""


class HybridClock:
    """One per process."""

    __slots__ = ("_last",)

    def __init__(self, last: int = 0) -> None:
        self._last = last

    def tick(self, now_ms: int) -> int:
        """A new reading at wall time `now_ms`."""
        reading, now = self._last + 1, now_ms << COUNTER_BITS
        self._last = reading = now if now > reading else reading  # each put ticks, and max() costs twice as much
        return reading

    def time_ms(self, now_ms: int) -> int:
        """Milliseconds since 1970 at wall time `now_ms`, never less than in any reading before."""
        self._last = max(self._last, now_ms << COUNTER_BITS)
        return self._last >> COUNTER_BITS

    def observe(self, reading: int, now_ms: int) -> None:
        """Take note of a peer's reading: later ticks are above it."""
        if self._last < reading <= (now_ms + DRIFT_MS_MAX) << COUNTER_BITS:
            self._last = reading
