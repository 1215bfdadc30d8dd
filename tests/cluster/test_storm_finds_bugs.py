"""The checks of a storm find what they are for: each of three bugs, planted in all nodes, is caught."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.worlds.planted_bugs import BUGS, found


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.timeout(240)
def test_a_planted_bug_is_caught(tmp_path: Path, bug: str) -> None:
    told = found(tmp_path, bug)
    assert told, f"no storm found {bug}"
    print(f"\n{bug}: {told}")
