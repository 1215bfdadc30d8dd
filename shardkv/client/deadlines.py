"""`Deadlines`: one timer for all calls of a client that wait for their answers.

Nearly every call is answered long before its deadline, so a timer of its own would be made for nothing. The one timer
is due at the earliest deadline there was when it was set; then all that wait are looked at.

Invariant: nothing is timed out early, and nothing later than a microsecond for each call that waits: so far apart are
two looks at least, lest looking at many calls, each with another deadline, takes all the time there is.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

LOOK_S_EACH = 1e-6
_NEVER = float("inf")


class Waiting(Protocol):
    """Something with a deadline. Hashable; told once at most."""

    def time_out(self) -> None:
        """The deadline came."""


class Deadlines:
    """Of calls of one event loop, whose `time()` they are given in."""

    __slots__ = ("_due", "_ends", "_timer")

    def __init__(self) -> None:
        self._ends: dict[Waiting, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._due = _NEVER

    def watch(self, waiting: Waiting, deadline: float) -> None:
        """Call its `time_out` at `deadline`, unless it is forgotten before."""
        self._ends[waiting] = deadline
        if deadline < self._due:
            self._set_timer(deadline)

    def forget(self, waiting: Waiting) -> None:
        """It waits no more."""
        self._ends.pop(waiting, None)

    def close(self) -> None:
        """Nothing waits any more: leave no timer behind."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._due = None, _NEVER

    def _set_timer(self, due: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._due = due
        self._timer = asyncio.get_running_loop().call_at(due, self._look)

    def _look(self) -> None:
        now = asyncio.get_running_loop().time()
        self._timer, self._due = None, _NEVER
        for waiting in [one for one, deadline in self._ends.items() if deadline <= now]:
            del self._ends[waiting]
            waiting.time_out()
        if self._ends:
            self._set_timer(max(min(self._ends.values()), now + LOOK_S_EACH * len(self._ends)))
