"""`Backpressure`: when writers must wait for flush and compaction, how long, and how long they did.

Two steps. Slow: from `l0_slow_tables` flushed tables on, a group costs its bytes at a rate that falls with every
further table, so that writers feel a compaction that is behind before they meet the wall. Stalled: no group is taken
until a flush or compaction has ended. Both are counted and timed; below the first step nothing is measured at all.
"""

from __future__ import annotations

from collections.abc import Callable

from shardkv_node.engine.options import MIB, Options

SLOW_BYTES_PER_S = 16 * MIB
"""Rate at the first slow table; it is divided by the number of tables past the threshold."""
DELAY_MIN_S = 0.001
"""Shorter waits are saved up: no clock of a loop or a thread is finer."""


class Backpressure:
    """`monotonic`: seconds that never go back."""

    __slots__ = ("_free_at", "_monotonic", "_options", "_stalled_at", "_stalled_s", "slowdowns", "slowed_s", "stalls")

    def __init__(self, options: Options, monotonic: Callable[[], float]) -> None:
        self._options = options
        self._monotonic = monotonic
        self._free_at = 0.0
        self._stalled_at: float | None = None
        self._stalled_s = 0.0
        self.stalls = 0
        """How often writers were stopped."""
        self.slowdowns = 0
        """Groups that had to be paid for by waiting."""
        self.slowed_s = 0.0
        """Time those groups cost."""

    @property
    def stalled_s(self) -> float:
        """Time writers were stopped, a stall that goes on included."""
        running = 0.0 if self._stalled_at is None else self._monotonic() - self._stalled_at
        return self._stalled_s + running

    @property
    def stalling(self) -> bool:
        """A stall was noted and its end was not."""
        return self._stalled_at is not None

    def note_stall(self, *, stalled: bool) -> None:
        """Whether writers must stop now; call it whenever that is looked at."""
        if stalled and self._stalled_at is None:
            self.stalls += 1
            self._stalled_at = self._monotonic()
        elif not stalled and self._stalled_at is not None:
            self._stalled_s += self._monotonic() - self._stalled_at
            self._stalled_at = None

    def note_group(self, size_bytes: int, level0_tables: int) -> None:
        """A group of so many bytes was logged while so many flushed tables wait."""
        excess = level0_tables - self._options.l0_slow_tables + 1
        if excess > 0:
            cost_s = size_bytes * excess / SLOW_BYTES_PER_S
            self._free_at = max(self._free_at, self._monotonic()) + cost_s
            self.slowdowns += 1
            self.slowed_s += cost_s

    def delay_s(self, level0_tables: int) -> float:
        """How long to wait before the next group."""
        if level0_tables < self._options.l0_slow_tables:
            return 0.0
        delay_s = self._free_at - self._monotonic()
        return delay_s if delay_s >= DELAY_MIN_S else 0.0
