"""The turn of an event loop: what is put off until everything that came in together was looked at.

Requests that come together are decoded together, writes are logged together, messages leave together: whoever has more
to gain from waiting than from acting at once calls `defer`. What was deferred runs at the end of the loop's turn; what
that defers runs right after it, STEPS times, without asking the network in between: requests are heard, their writes
become a group, its replies leave.

A process that is asked one thing at a time has nothing to gain from waiting for the turn's end. While no two *events*
(something was received) come close together, what an event defers runs as soon as that event was dealt with.

Invariant: what is deferred runs once, in order, soon; never inside the call that defers it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from time import monotonic
from weakref import WeakKeyDictionary

log = logging.getLogger(__name__)

STEPS = 4
"""So many steps follow one another before others, and the network, are asked again."""
QUIET_S = 10e-6
"""Events that come within so short a time have come together."""

Call = Callable[[], object]


class Turn:
    """Of one event loop: `turn_of` gives it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._call_soon = loop.call_soon
        self._deferred: list[Call] = []
        self._due = False
        """The end of the turn is to come, by itself or by `leave`."""
        self._quiet = True
        """Events come one at a time."""
        self._events = 0
        """Since the end of the last turn."""
        self._ended_at = 0.0

    def defer(self, call: Call) -> None:
        """Have this called at the end of the turn. It must not block."""
        self._deferred.append(call)
        if not self._due:
            self._due = True
            self._call_soon(self._end)

    def enter(self) -> bool:
        """An event has come. True: the caller is to say `leave` once it was dealt with."""
        self._events += 1
        if self._due or not self._quiet:
            return False
        if monotonic() - self._ended_at < QUIET_S:
            self._quiet = False
            return False
        self._due = True
        return True

    def leave(self) -> None:
        """The event was dealt with, and nothing else has come: the turn ends here."""
        self._run()
        self._events = 0
        self._ended_at = monotonic()

    def _end(self) -> None:
        self._quiet = self._events <= 1
        self._events = 0
        self._run()
        self._ended_at = monotonic()

    def _run(self) -> None:
        for _ in range(STEPS):
            calls, self._deferred = self._deferred, []
            for call in calls:
                try:
                    call()
                except Exception:
                    log.exception("deferred_call_failed call=%r", call)
            if not self._deferred:
                self._due = False
                return
        self._call_soon(self._end)


_turns: WeakKeyDictionary[asyncio.AbstractEventLoop, Turn] = WeakKeyDictionary()


def turn_of(loop: asyncio.AbstractEventLoop) -> Turn:
    """The one turn of this loop."""
    turn = _turns.get(loop)
    if turn is None:
        turn = _turns[loop] = Turn(loop)
    return turn
