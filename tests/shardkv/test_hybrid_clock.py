import itertools

from hypothesis import given
from hypothesis import strategies as st

from shardkv.hybrid_clock import DRIFT_MS_MAX, HybridClock


@given(st.lists(st.integers(0, 10**12), min_size=1))
def test_readings_rise_whatever_the_wall_clock_does(walls: list[int]) -> None:
    clock = HybridClock()
    readings = [clock.tick(wall) for wall in walls]
    assert all(a < b for a, b in itertools.pairwise(readings))


def test_a_reading_is_above_what_was_observed() -> None:
    clock = HybridClock()
    ahead = (1_000_000 + 500) << 16
    clock.observe(ahead, 1_000_000)
    assert clock.tick(1_000_000) > ahead


def test_a_peer_with_a_mad_clock_is_not_followed() -> None:
    clock = HybridClock()
    clock.observe((1_000_000 + DRIFT_MS_MAX + 1) << 16, 1_000_000)
    assert clock.tick(1_000_000) == 1_000_000 << 16
