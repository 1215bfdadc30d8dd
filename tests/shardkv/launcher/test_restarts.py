"""When a dead process comes back: a table of deaths and what follows."""

from __future__ import annotations

import pytest

from shardkv.config import LauncherSection
from shardkv.launcher.restarts import Restarts, Verdict, exit_words

SECTION = LauncherSection(
    restart_first_ms=100, restart_most_ms=10_000, crash_loop_starts=4, crash_loop_window_ms=60_000
)


def pauses(times: list[float], *, served: bool) -> list[float]:
    restarts = Restarts(SECTION)
    verdicts = [(now, restarts.died(now, 1, served=served)) for now in times]
    return [round(verdict.restart_at - now, 3) for now, verdict in verdicts if verdict.restart_at is not None]


def test_a_process_that_never_serves_waits_twice_as_long_each_time() -> None:
    assert pauses([1, 2, 3, 4, 5, 6, 7, 8, 9], served=False) == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10]


def test_a_process_that_served_is_back_within_a_second() -> None:
    assert pauses([1, 2, 3, 4, 5, 6, 7], served=True) == [0.1, 0.2, 0.4, 0.8, 1, 1, 1]


def test_old_deaths_are_forgotten() -> None:
    assert pauses([1, 2, 3, 63.5], served=False) == [0.1, 0.2, 0.4, 0.1]


def test_many_deaths_in_a_short_time_are_a_crash_loop_and_the_trying_goes_on() -> None:
    restarts = Restarts(SECTION)
    loops = [restarts.died(now, -9, served=True) for now in (1.0, 2.0, 3.0, 4.0)]
    assert [verdict.crash_loop for verdict in loops] == [False, False, False, True]
    assert loops[-1].restart_at == 4.8
    assert restarts.count == 4


@pytest.mark.parametrize("exit_code", [2, 4])
def test_exit_codes_that_say_so_are_final(exit_code: int) -> None:
    assert Restarts(SECTION).died(1.0, exit_code, served=False) == Verdict(None, crash_loop=False)


@pytest.mark.parametrize("exit_code", [0, 1, 3, -11, None])
def test_every_other_end_is_followed_by_a_start(exit_code: int | None) -> None:
    assert Restarts(SECTION).died(1.0, exit_code, served=True).restart_at is not None


def test_endings_in_words() -> None:
    assert [exit_words(code) for code in (1, -9, None)] == [
        "ended with exit code 1",
        "was killed by signal 9",
        "ended",
    ]
