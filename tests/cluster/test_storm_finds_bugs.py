"""The checks of a storm find what they are for: each of three bugs, planted in all nodes, is caught."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.worlds.storm import Weather, one_storm

ATTEMPTS = 4
SECONDS = 6.0
APART = ("apart from meta",)
"""Who does not hear of a commit is where reads of a fenced shard are stale."""


@pytest.mark.parametrize(
    ("bug", "faults", "told"),
    [
        ("reads-while-fenced", APART, "had been seen before|not linearizable|rows that nobody changes"),
        ("drops-a-batch", (), "acknowledged was|not linearizable|had been seen before|made twice, or lost"),
        ("no-records", (), "made twice, or lost"),
    ],
)
@pytest.mark.timeout(240)
def test_a_planted_bug_is_caught(tmp_path: Path, bug: str, faults: tuple[str, ...], told: str) -> None:
    for seed in range(ATTEMPTS):
        weather = Weather(seed, faults=bool(faults), seconds=SECONDS, bug=bug, only_moves=True, fault_kinds=faults)
        try:
            counts = one_storm(tmp_path / str(seed), weather)
        except AssertionError as error:
            with pytest.raises(AssertionError, match=told):
                raise
            print(f"\n{bug}, seed {seed}: {str(error)[:400]}")
            return
        print(f"\n{bug}, seed {seed}, not found by {dict(counts)}")
    pytest.fail(f"{bug} was not found in {ATTEMPTS} storms")
