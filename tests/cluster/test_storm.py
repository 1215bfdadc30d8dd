"""The topology changes all the time under mixed load, with and without faults: nothing is lost, undone or repeated.

A seed is repeated by `SHARDKV_STORM_SEED=<seed> SHARDKV_STORM_RUNS=1 pytest -m long tests/cluster/test_storm.py`.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from tests.worlds.storm import Weather, forecast, one_storm

SECONDS = float(os.environ.get("SHARDKV_STORM_SECONDS", "15"))
SEED = int(os.environ.get("SHARDKV_STORM_SEED", "1000"))
RUNS = int(os.environ.get("SHARDKV_STORM_RUNS", "50"))

SHORT = [
    Weather(1, "hash", seconds=4),
    Weather(2, "range", faults=True, seconds=5),
    Weather(3, "hash", "etcd", faults=True, seconds=5, two_controllers=True),
]


def told(counts: Counter[str]) -> str:
    return ", ".join(f"{number} {what}" for what, number in sorted(counts.items()))


@pytest.mark.parametrize("weather", SHORT, ids=str)
def test_a_storm_loses_undoes_and_repeats_nothing(tmp_path: Path, weather: Weather) -> None:
    print(f"\n{weather}: {told(one_storm(tmp_path, weather))}")


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", range(SEED, SEED + RUNS))
def test_many_storms_lose_undo_and_repeat_nothing(tmp_path: Path, seed: int) -> None:
    weather = forecast(seed, SECONDS)
    print(f"\n{weather}: {told(one_storm(tmp_path, weather))}")
