"""How long to pause before trying again: exponential with full jitter, so that clients do not come back in step.

Source: "Exponential Backoff And Jitter", AWS Architecture Blog, 2015. Randomness is an argument; nothing sleeps here.
"""

from __future__ import annotations

FIRST_S = 0.01
MOST_S = 0.5


def pause_s(attempt: int, chance: float) -> float:
    """Seconds to wait after the `attempt`-th failure (0 for the first); `chance` is a random number in [0, 1)."""
    ceiling: float = min(MOST_S, FIRST_S * 2 ** min(attempt, 16))
    return ceiling * (0.25 + 0.75 * chance)
