"""When a process that died is started again. Pure: time is an argument.

A process that had served before it died comes back after a short pause; one that dies before it ever serves waits
twice as long each time. Deaths in a short time are a crash loop: it is reported, and the trying goes on.

Invariant: exit codes that say "starting again cannot help" are final.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from shardkv.config import LauncherSection
from shardkv.programs import EXIT_NOT_STARTABLE, EXIT_USAGE

FINAL_EXIT_CODES = (EXIT_USAGE, EXIT_NOT_STARTABLE)
SERVED_MOST_S = 1.0
"""Longest pause after the death of a process that had served."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """`restart_at`: when to start it again (the caller's clock, seconds); None: never."""

    restart_at: float | None
    crash_loop: bool


class Restarts:
    """The deaths of one process."""

    def __init__(self, section: LauncherSection) -> None:
        self._section = section
        self._deaths: deque[float] = deque()
        self.count = 0

    def died(self, now: float, exit_code: int | None, *, served: bool) -> Verdict:
        """Judge a death at `now`. `exit_code`: None when unknown, negative for a signal."""
        if exit_code in FINAL_EXIT_CODES:
            return Verdict(None, crash_loop=False)
        self.count += 1
        self._deaths.append(now)
        while self._deaths[0] < now - self._section.crash_loop_window_ms / 1000:
            self._deaths.popleft()
        recent = len(self._deaths)
        most_s = self._section.restart_most_ms / 1000
        if served:
            most_s = min(most_s, SERVED_MOST_S)
        pause_s = min(self._section.restart_first_ms / 1000 * 2 ** min(recent - 1, 30), most_s)
        return Verdict(now + pause_s, crash_loop=recent >= self._section.crash_loop_starts)


def exit_words(exit_code: int | None) -> str:
    """How a process ended, in words."""
    if exit_code is None:
        return "ended"
    if exit_code < 0:
        return f"was killed by signal {-exit_code}"
    return f"ended with exit code {exit_code}"
