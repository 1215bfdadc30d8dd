"""How long to pause before trying again: exponential with jitter, so that clients do not come back in step.

Source: "Exponential Backoff And Jitter", AWS Architecture Blog, 2015. Randomness is an argument; nothing sleeps here.
"""

from __future__ import annotations

from collections.abc import Iterable

from shardkv.errors import ShardKVError

FIRST_S = 0.01
MOST_S = 0.5
CONNECT_NEEDS_S = 0.005
ANSWER_NEEDS_S = 0.2
"""A request sent with less than this left may not be answered in time, and an unknown outcome is worse than a refusal
that is known."""


def pause_s(attempt: int, chance: float, *, left_s: float, needed_s: float, retry_after_s: float = 0.0) -> float | None:
    """Seconds to wait after the `attempt`-th failure (0 for the first); None: give up.

    `chance` is a random number in [0, 1). `left_s` until the deadline, `needed_s` of it for the next try itself; at
    most half of what can be waited is waited, so that the time a caller granted is used to its end. `retry_after_s`:
    the least the other side asked for; up to half as much again is waited, lest all who were told the same come back
    at once.
    """
    spare_s = left_s - needed_s
    if spare_s <= 0:
        return None
    ceiling: float = min(MOST_S, FIRST_S * 2 ** min(attempt, 16))
    pause = max(ceiling * (0.25 + 0.75 * chance), retry_after_s * (1 + chance / 2))
    return min(pause, max(spare_s / 2, 0.001))


def retry_after_s(errors: Iterable[ShardKVError | None]) -> float:
    """The longest wait that any of these errors asks for in its `detail`, in seconds; 0 when none does."""
    asked = [error.detail.get("retry_after_ms") for error in errors if error is not None]
    return max((ms for ms in asked if isinstance(ms, int)), default=0) / 1000


def answer_needs_s(timeout_s: float) -> float:
    """The `needed_s` of sending a request again, in a call that may take `timeout_s`."""
    return min(ANSWER_NEEDS_S, timeout_s / 2)
