"""Whether anything is lost, undone, missed or repeated while shards move, split and merge and nodes come and go.

    python -m tests.bench.elastic_storms [--runs 50] [--seed 1000] [--seconds 15] [--no-bugs] [--json]

A run is a storm (tests/worlds/storm.py) in a cluster of its own: hash and range, embedded store and etcd, two of three
with faults. Every violation is printed with its seed, which `--runs 1 --seed SEED` repeats. Then each of three bugs is
planted in all nodes, and must be found.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.bench.report import WITHIN, heading, note, row_line
from tests.worlds.planted_bugs import BUGS, found
from tests.worlds.storm import forecast, one_storm


def storms(first: int, runs: int, seconds: float) -> tuple[Counter[str], list[str]]:
    """What was done and checked, and what was wrong."""
    counts: Counter[str] = Counter()
    violations: list[str] = []
    for seed in range(first, first + runs):
        weather = forecast(seed, seconds)
        note(f"{weather}; {len(violations)} violations so far")
        with tempfile.TemporaryDirectory() as directory:
            try:
                counts += one_storm(Path(directory) / "storm", weather)
            except Exception as error:  # noqa: BLE001 - it is told, and the next one begins
                violations.append(f"{weather}: {str(error)[:500] or error!r}")
    return counts, violations


def missed_bugs() -> list[str]:
    """Of the planted ones."""
    with tempfile.TemporaryDirectory() as directory:
        return [bug for bug in BUGS if not found(Path(directory), bug)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1000, help="of the first run")
    parser.add_argument("--seconds", type=float, default=15.0, help="of changes in a run")
    parser.add_argument("--no-bugs", action="store_true", help="plant none")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    counts, violations = storms(asked.seed, asked.runs, asked.seconds)
    missed = [] if asked.no_bugs else missed_bugs()
    if asked.json:
        print(json.dumps({"runs": asked.runs, "counts": counts, "violations": violations, "bugs_missed": missed}))
    else:
        print(heading("", ["runs"]))
        title = "writes lost, deletes undone, scans wrong in storms"
        print(row_line(title, WITHIN, 0.0, [float(len(violations))], [[float(asked.runs)]]))
        if not asked.no_bugs:
            print(row_line("planted bugs not found", WITHIN, 0.0, [float(len(missed))], [[float(len(BUGS))]]))
        print("checked: " + ", ".join(f"{number:,} {what}" for what, number in sorted(counts.items())))
        for violation in violations:
            print(violation)
    sys.exit(bool(violations or missed))


if __name__ == "__main__":
    main()
