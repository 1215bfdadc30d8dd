"""How long to pause before trying again: exponential with jitter, so that clients do not come back in step.

Source: "Exponential Backoff And Jitter", AWS Architecture Blog, 2015. Randomness is an argument; nothing sleeps here.
"""

from __future__ import annotations

FIRST_S = 0.01
MOST_S = 0.5
TOO_LATE_S = 0.005
"""With less than this left, another try is pointless."""


def pause_s(attempt: int, chance: float, left_s: float) -> float | None:
    """Seconds to wait after the `attempt`-th failure (0 for the first); None: give up.

    `chance` is a random number in [0, 1). `left_s` until the deadline: at most half of it is waited, so that the
    time a caller granted is used to its end.
    """
    if left_s < TOO_LATE_S:
        return None
    ceiling: float = min(MOST_S, FIRST_S * 2 ** min(attempt, 16))
    return min(ceiling * (0.25 + 0.75 * chance), left_s / 2)
