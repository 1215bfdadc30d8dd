"""The memory of a running engine is what its options say and its stats report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MIB = 1024 * 1024
LIFE = """
import json, os, random, sys
import psutil
from shardkv_node.engine import Engine

me, chance, keys, most, reported, opened = psutil.Process(), random.Random(1), [], 0, 0, 0

def look():
    global most, reported
    most = max(most, me.memory_full_info().uss - opened)
    reported = max(reported, engine.stats()["memory_bytes"])

engine = Engine.open(
    sys.argv[1],
    durability="os",
    memtable_bytes_max=int(sys.argv[2]),
    frozen_memtables_max=1,
    block_cache_bytes=int(sys.argv[3]),
    level1_bytes_max=4 << 20,
)
opened = me.memory_full_info().uss
for number in range(100):
    new = [chance.randbytes(16) for _ in range(1000)]
    keys += new[::10]
    engine.put_many((key, chance.randbytes(50) * 2) for key in new)
    if number % 8 == 0:
        look()
for key in [*keys, *keys]:
    engine.get(key)
look()
for number, _ in enumerate(engine.scan()):
    if number % 20000 == 0:
        look()
look()
print(json.dumps({"held": most, "reported": reported, "max": engine.stats()["memory_bytes_max"]}))
engine.close()
"""
"""Loads 12 MB, reads a tenth of it twice, scans everything; looks at its own memory all the time."""


@pytest.mark.parametrize(("memtable", "cache"), [(3 * MIB, 8 * MIB), (8 * MIB, 2 * MIB)])
def test_memory_is_what_the_options_say(tmp_path: Path, memtable: int, cache: int):
    command = [sys.executable, "-c", LIFE, str(tmp_path / "store"), str(memtable), str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    found = json.loads(done.stdout)
    assert found["max"] == 2 * memtable + cache
    assert found["reported"] <= found["max"] * 1.1
    # What is beside it: pages of the allocator that are half used, a page of rows, lazily imported modules, indexes.
    assert found["held"] <= found["max"] * 1.25 + 8 * MIB
    assert found["reported"] >= found["held"] * 0.4, "what is held must be in the report"
