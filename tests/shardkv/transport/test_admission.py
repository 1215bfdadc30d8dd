"""What a process takes on: who is refused when it is full, and what a refusal says."""

from __future__ import annotations

import pytest

from shardkv.limits import Limits
from shardkv.transport.admission import RETRY_FIRST_S, RETRY_MOST_S, Admission, Load, overloaded

LIMITS = Limits(process_requests_in_flight_max=100, process_bytes_in_flight_max=1_000_000)
IDLE = Load(0, 0, 0)


def looked(*loads: Load, answered: int = 0) -> Admission:
    admission = Admission(LIMITS)
    admission.look(loads, 0, 10.0)
    admission.look(loads, answered, 11.0)
    return admission


def test_nobody_is_refused_before_the_process_is_full() -> None:
    assert not looked(Load(99, 0, 0)).crowded
    assert not looked(Load(1, 999_999, 0)).crowded
    assert not looked().crowded


@pytest.mark.parametrize("hog", [Load(96, 1, 0), Load(1, 996_000, 0)])
def test_only_those_above_an_equal_share_are_refused(hog: Load) -> None:
    modest = Load(4, 4_000, 0)
    admission = looked(hog, modest, IDLE, IDLE)
    assert admission.crowded
    assert admission.refusal_of(hog) is not None
    assert admission.refusal_of(modest) is None
    assert admission.refusal_of(IDLE) is None


def test_idle_connections_take_no_share() -> None:
    half = Load(49, 1, 0)
    assert looked(half, Load(51, 1, 0), *[IDLE] * 1000).refusal_of(half) is None
    assert looked(half, Load(51, 1, 0), *[Load(1, 1, 0)] * 1000).refusal_of(half) is not None


def test_a_refusal_says_when_half_of_what_is_in_flight_will_be_answered() -> None:
    refusal = looked(Load(200, 1, 0), answered=400).refusal_of(Load(200, 1, 0))
    assert refusal is not None
    assert refusal.detail["retry_after_ms"] == 250
    assert refusal.retriable
    assert "200 requests" in refusal.message


@pytest.mark.parametrize(("asked_s", "told_s"), [(0.0, RETRY_FIRST_S), (3600.0, RETRY_MOST_S), (0.5, 0.5)])
def test_the_wait_is_bounded(asked_s: float, told_s: float) -> None:
    assert overloaded("Full.", retry_after_s=asked_s).detail == {"retry_after_ms": told_s * 1000}


def test_a_process_that_answers_nothing_asks_for_the_longest_wait() -> None:
    refusal = looked(Load(200, 1, 0)).refusal_of(Load(200, 1, 0))
    assert refusal is not None
    assert refusal.detail["retry_after_ms"] == RETRY_MOST_S * 1000
