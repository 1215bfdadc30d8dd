"""Storms in clusters whose nodes all have a bug (tests/worlds/buggy_node.py): what finds it, and after how long."""

from __future__ import annotations

import re
from pathlib import Path

from tests.worlds.storm import Weather, one_storm

ATTEMPTS = 5
SECONDS = 6.0
APART = ("source apart",)
"""Who does not hear of a commit is where reads of a fenced shard are stale."""
STALE = "had been seen before|not linearizable|read before written|rows that nobody changes"
LOST = f"{STALE}|acknowledged was|a scan misses|applied by half|still there|were deleted"
TWICE = "made twice, or lost|was written again"
BUGS: dict[str, tuple[tuple[str, ...], str]] = {
    "reads-while-fenced": (APART, STALE),
    "drops-a-batch": ((), f"{LOST}|{TWICE}"),
    "no-records": ((), TWICE),
}
"""Faults that bring each to light, and what a check then says."""


def found(directory: Path, bug: str) -> str:
    """What a check said of it; empty when none did. An AssertionError that says something else is raised."""
    faults, told = BUGS[bug]
    for seed in range(ATTEMPTS):
        weather = Weather(seed, faults=bool(faults), seconds=SECONDS, bug=bug, only_moves=True, fault_kinds=faults)
        try:
            one_storm(directory / f"{bug}-{seed}", weather)
        except AssertionError as error:
            if re.search(told, str(error)) is None:
                raise
            return f"seed {seed}: {str(error)[:300]}"
    return ""
