"""kill -9 in a loop, under load, with flushes and compactions under way: 20 rounds, and 200 in the long battery."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shardkv_node.engine import Engine
from tests.node.engine.embedded_writer import KEYS, operations


@pytest.mark.parametrize("rounds", [20, pytest.param(200, marks=[pytest.mark.long, pytest.mark.timeout(900)])])
def test_a_process_killed_again_and_again_loses_no_acknowledged_write(tmp_path: Path, rounds: int) -> None:
    directory = tmp_path / "data"
    chance = random.Random(rounds)
    model: dict[bytes, bytes] = {}
    number = 1
    for _ in range(rounds):
        acked = kill_after(directory, number, chance.randrange(20, 400))
        for done in range(number, acked + 1):
            apply(model, done)
        number = acked + 1
        with Engine.open(directory, disk_reserve_bytes=0, workers=0) as engine:
            rows = dict(engine.scan())
            if rows != model:  # the write that was not acknowledged may be there, whole
                apply(model, number)
                number += 1
            assert rows == model
            keys = [b"key%04d" % key for key in range(KEYS)]
            assert engine.get_many(keys) == [model.get(key) for key in keys]
            tables = sum(engine.stats().get(f"level{level}_tables", 0) for level in (1, 2, 3))
    assert tables > 0  # flushes and compactions had their part in it


def kill_after(directory: Path, first: int, writes: int) -> int:
    """Run a writer that begins with write `first`, kill it after about so many, return the last it had acknowledged."""
    writer = subprocess.Popen(
        [sys.executable, "-m", "tests.node.engine.embedded_writer", str(directory), str(first)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdout is not None
    acked = first - 1
    try:
        for line in writer.stdout:
            acked = int(line)
            if acked == first + writes:
                writer.send_signal(signal.SIGKILL)
    finally:
        writer.kill()
        writer.wait()
    assert acked >= first + writes
    return acked


def apply(model: dict[bytes, bytes], number: int) -> None:
    for key, value in operations(number):
        if value is None:
            model.pop(key, None)
        else:
            model[key] = value
