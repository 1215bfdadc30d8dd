"""The simulated cluster keeps its promises, and the checks notice when a rule of CHANGES.md is not kept.

A failure names its seed; `python -m tests.shardkv.control.sim SEED` runs it again. The long battery runs thousands.
"""

from __future__ import annotations

from collections import Counter

import pytest

from tests.shardkv.control.removals import BACKED_UP, NOTICED_AT, REMOVALS, Removal, without
from tests.shardkv.control.sim import run

SEEDS_FOR_A_REMOVAL = 60


@pytest.mark.parametrize("seed", range(8))
def test_a_storm_loses_nothing(seed: int) -> None:
    run(seed)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("first", range(10_000, 13_000, 100))
def test_many_storms_lose_nothing(first: int) -> None:
    total: Counter[str] = Counter()
    for seed in range(first, first + 100):
        try:
            total += run(seed)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
    print(dict(total))


@pytest.mark.parametrize("name", REMOVALS)
def test_a_rule_that_is_not_kept_is_noticed(name: str) -> None:
    """Seeds that noticed it before come first; when the code changes, others do."""
    known = NOTICED_AT.get(name, ())
    assert any(_is_noticed(REMOVALS[name], seed) for seed in [*known, *range(SEEDS_FOR_A_REMOVAL)]), name


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", BACKED_UP)
def test_a_rule_that_another_one_backs_up_is_not_missed(name: str) -> None:
    assert not any(_is_noticed(BACKED_UP[name], seed) for seed in range(100))


def _is_noticed(removal: Removal, seed: int) -> bool:
    with without(removal) as removed:
        try:
            run(seed, removed, tilt=removal.tilt)
        except AssertionError:
            return True
    return False
