"""`Progress`: how far this node is with one change, as the controller and people are told."""

from __future__ import annotations

from time import monotonic

from shardkv.control.reports import ChangeReport

RATE_OVER_S = 1.0
"""Bytes a second are told of about the last second."""


class Progress:
    """Numbers that others change as they go."""

    def __init__(self, change: str, shard: int, phase: str) -> None:
        self.change = change
        self.shard = shard
        self.phase = phase
        """ship, tail, fence, commit."""
        self.bytes_done = 0
        self.bytes_total = 0
        self.lag = 0
        """Writes that are still to be applied."""
        self.rounds = 0
        self._looked_at = monotonic()
        self._looked_bytes = 0
        self._bytes_s = 0.0

    def add(self, size: int) -> None:
        """So many bytes have arrived."""
        self.bytes_done += size
        self._look()

    def report(self) -> ChangeReport:
        self._look()
        return ChangeReport(
            id=self.change,
            shard=self.shard,
            phase=self.phase,
            bytes_done=self.bytes_done,
            bytes_total=self.bytes_total,
            bytes_s=self._bytes_s,
            lag=self.lag,
        )

    def _look(self) -> None:
        now = monotonic()
        passed = now - self._looked_at
        if passed >= RATE_OVER_S:
            self._bytes_s = (self.bytes_done - self._looked_bytes) / passed
            self._looked_at, self._looked_bytes = now, self.bytes_done
