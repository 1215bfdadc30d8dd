"""Logs of real processes: lines, rotation, and raw output that lands in the same file."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from shardkv.logs import event

PROGRAM = """
import logging, os, pathlib, sys
from shardkv.logs import configure_logging, event
configure_logging("node-1", log_file=pathlib.Path(sys.argv[1]), bytes_max=4096, files_kept=2)
for number in range(int(sys.argv[2])):
    logging.info(event("tick", number=number, text="two words"))
os.write(2, b"raw words of a C library\\n")
print("printed", flush=True)
raise SystemError("the last words")
"""


def run_program(log_file: Path, lines: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(log_file), str(lines)], capture_output=True, timeout=20, check=False
    )
    assert (done.stdout, done.stderr) == (b"", b"")


def test_lines_and_raw_output_share_the_file(tmp_path: Path) -> None:
    run_program(tmp_path / "logs" / "a.log", 1)
    first, *rest = (tmp_path / "logs" / "a.log").read_text().splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO node-1 tick number=0 text='two words'", first)
    assert rest[0] == "raw words of a C library"
    assert "printed" in rest
    assert rest[-1] == "SystemError: the last words"


def test_a_full_file_is_put_aside_and_the_oldest_goes(tmp_path: Path) -> None:
    log_file = tmp_path / "a.log"
    run_program(log_file, 500)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["a.log", "a.log.1", "a.log.2"]
    assert all(path.stat().st_size <= 4096 + 1000 for path in tmp_path.iterdir())
    assert "SystemError: the last words" in log_file.read_text()
    kept = "".join((tmp_path / name).read_text() for name in ("a.log.2", "a.log.1", "a.log"))
    numbers = [int(number) for number in re.findall(r"number=(\d+)", kept)]
    assert numbers == list(range(numbers[0], 500))


def test_an_event_quotes_what_would_be_misread() -> None:
    assert event("up", port=1, name="a b", empty="", odd="x=y") == "up port=1 name='a b' empty='' odd='x=y'"
