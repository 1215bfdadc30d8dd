"""What all connections of one server cost together, and when a process says no.

Invariants: while the process holds more than `process_requests_in_flight_max` or `process_bytes_in_flight_max`, only
connections within their fair share may add to it, so one peer's flood is refused and another's single request is
not; every refusal says when to come back. The load is counted about every LOOK_INTERVAL_S, not with each request:
what comes in between is bounded by what a process can read in that time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from shardkv.errors import Overloaded
from shardkv.limits import Limits

LOOK_INTERVAL_S = 0.02
LOOK_SHARE = 0.02
"""With so many connections that counting takes more than this share of the time, they are counted less often."""
RATE_WINDOW_S = 0.5
"""How far back the rate of answers reaches, about."""
RETRY_FIRST_S = 0.02
RETRY_MOST_S = 5.0
"""Bounds of what a refusal tells the peer to wait."""


class Load(NamedTuple):
    """What one connection holds in memory and keeps busy."""

    requests: int
    """Unanswered ones."""
    bytes: int
    """Of requests, unfinished frames and replies nobody has read."""
    unread: int
    """Bytes of replies alone."""


NO_LOAD = Load(0, 0, 0)


class Admission:
    """Judges the load of a server; `look` keeps it up to date. Time is an argument, in seconds."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.total = NO_LOAD
        self.crowded = False
        """Connections above their fair share are refused."""
        self._busy = 1
        self._rate = 0.0
        self._looked_at: float | None = None

    def look(self, loads: Sequence[Load], answered: int, now: float) -> None:
        """Take note of the connections' loads and of how many requests were answered since the last look."""
        requests, held, unread = map(sum, zip(*loads, strict=True)) if loads else NO_LOAD
        self.total = Load(requests, held, unread)
        self._busy = max(1, sum(load.bytes > 0 or load.requests > 0 for load in loads))
        self.crowded = (
            requests >= self._limits.process_requests_in_flight_max or held >= self._limits.process_bytes_in_flight_max
        )
        if self._looked_at is not None and now > self._looked_at:
            passed_s = now - self._looked_at
            self._rate += (answered / passed_s - self._rate) * min(1.0, passed_s / RATE_WINDOW_S)
        self._looked_at = now

    def over_share(self, load: Load) -> bool:
        """Whether a connection holds more than an equal share of what the process may hold."""
        return (
            load.requests * self._busy >= self._limits.process_requests_in_flight_max
            or load.bytes * self._busy >= self._limits.process_bytes_in_flight_max
        )

    @property
    def unread_too_much(self) -> bool:
        """So much is left unread, though over-full connections are refused, that only closing one makes room."""
        return self.total.unread >= 2 * self._limits.process_bytes_in_flight_max

    def refusal_of(self, load: Load) -> Overloaded | None:
        """What requests of a connection with this load are told while the process is crowded; None: come in."""
        if not self.over_share(load):
            return None
        requests, held, _ = self.total
        return overloaded(
            f"This process has {requests} requests and {held} bytes in flight, its limit, and this connection has "
            "more than its share of them.",
            retry_after_s=requests / 2 / self._rate if self._rate else RETRY_MOST_S,
        )


def overloaded(message: str, *, retry_after_s: float) -> Overloaded:
    """A refusal that says when to come back: `detail["retry_after_ms"]`, at least 20 ms and at most 5 s."""
    wait_s = min(max(retry_after_s, RETRY_FIRST_S), RETRY_MOST_S)
    detail = {"retry_after_ms": round(wait_s * 1000)}
    return Overloaded(message, detail=detail, hint=f"Retry after {wait_s:.2g} s.")
