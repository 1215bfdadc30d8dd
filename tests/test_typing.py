"""What users' type checkers see of the clients: `mypy --strict` accepts what is right and finds what is wrong."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PROGRAMS = Path(__file__).parent / "typing"


def checked(program: str, directory: Path) -> tuple[int, str]:
    """Exit code and output of mypy for a copy of the program outside of this tree, with nobody's configuration."""
    copy = directory / program
    copy.write_text((PROGRAMS / program).read_text())
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={directory}", copy.name]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stdout + done.stderr


def test_a_strictly_typed_program_has_no_errors(tmp_path: Path) -> None:
    code, output = checked("right.py", tmp_path)
    assert code == 0, output


def test_every_mistake_is_found(tmp_path: Path) -> None:
    code, output = checked("wrong.py", tmp_path)
    lines = (PROGRAMS / "wrong.py").read_text().splitlines()
    marked = {number for number, line in enumerate(lines, 1) if line.endswith("# wrong")}
    found = {int(number) for number in re.findall(r"^wrong\.py:(\d+): error:", output, re.M)}
    assert code == 1
    assert found == marked, output
