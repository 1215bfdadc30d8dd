"""Pauses between tries: they grow, they differ, they honour what an overloaded process asks for, they fit the time."""

from __future__ import annotations

import pytest

from shardkv.client.backoff import FIRST_S, MOST_S, pause_s, retry_after_s
from shardkv.errors import Draining, Overloaded


def test_pauses_grow_up_to_the_most_and_differ() -> None:
    longest = [pause_s(attempt, 1.0, left_s=100, needed_s=0) for attempt in range(20)]
    assert longest[0] == FIRST_S
    assert longest == sorted(longest, key=lambda pause: pause or 0)
    assert longest[-1] == MOST_S
    assert pause_s(3, 0.0, left_s=100, needed_s=0) != pause_s(3, 0.9, left_s=100, needed_s=0)


@pytest.mark.parametrize("chance", [0.0, 0.5, 0.99])
def test_what_was_asked_for_is_waited_and_not_by_all_alike(chance: float) -> None:
    pause = pause_s(0, chance, left_s=100, needed_s=0, retry_after_s=2.0)
    assert pause == 2.0 * (1 + chance / 2)


def test_a_shorter_wait_than_the_usual_one_shortens_nothing() -> None:
    assert pause_s(10, 1.0, left_s=100, needed_s=0, retry_after_s=0.02) == MOST_S


def test_no_wait_goes_past_half_of_what_is_left() -> None:
    assert pause_s(0, 0.5, left_s=1.2, needed_s=0.2, retry_after_s=5.0) == 0.5
    assert pause_s(0, 0.5, left_s=0.2, needed_s=0.2, retry_after_s=5.0) is None


def test_the_longest_wait_of_several_refusals_counts() -> None:
    errors = [
        None,
        Draining("Away."),
        Overloaded("Full.", detail={"retry_after_ms": 250}),
        Overloaded("Fuller.", detail={"retry_after_ms": 1500, "shard": 3}),
        Overloaded("Odd.", detail={"retry_after_ms": "soon"}),
    ]
    assert retry_after_s(errors) == 1.5
    assert retry_after_s([Draining("Away.")]) == 0
    assert retry_after_s([]) == 0
