"""How a program's process is set up."""

from __future__ import annotations

import subprocess
import sys

PAGES = """
import asyncio, resource
from shardkv.transport.loop import run_program

async def main(stop):
    bytes(1_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(100):
        bytearray(1_000_000) + bytearray(2)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return 0

run_program(main)
"""


def test_memory_of_a_page_is_not_fetched_anew_for_each_page() -> None:
    done = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 5_000, "page faults; 25,000 when each of 100 buffers is fetched from the system"
