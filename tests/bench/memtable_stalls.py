"""How long the serving loop is held up by a large memtable: no stage may take more than 20 ms.

    python -m tests.bench.memtable_stalls [--puts 500000] [--rounds 3] [--directory DIR]

A store on an event loop, as a node drives it, with one memtable for everything: puts (dicts grow), the first scan
(the order is made), puts and pages after it, the flush that drops the memtable, a dropped tablet. A probe asks for
the loop every millisecond. Two figures per stage: the longest wait for the loop, and the longest time the loop's
thread computed without a break, which other programs on the machine hardly change. The store is in memory
(/dev/shm) where there is such a place: the disk is not what is measured.
Leaves with 1 when the least computation of the rounds is over the limit.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time

from tests.bench.engine_contenders import Budget
from tests.bench.engine_loop import PROBE_S, LagProbe, LoopStore, run_on_loop

LIMIT_MS = 20.0
WRITES_PER_TURN = 100
VALUE = b"v" * 100


class StallProbe(LagProbe):
    """Notes the thread's own time too."""

    def __init__(self) -> None:
        super().__init__()
        self.longest_cpu_s: dict[str, float] = {}
        self._cpu_s = time.thread_time()

    def _fire(self) -> None:
        now = time.thread_time()
        self.longest_cpu_s[self._stage] = max(now - self._cpu_s, self.longest_cpu_s.get(self._stage, 0.0))
        super()._fire()
        self._cpu_s = time.thread_time()


async def stalls(directory: str, puts: int) -> dict[str, tuple[float, float]]:
    """Per stage (longest wait, longest computation), in milliseconds."""
    host = LoopStore(directory, Budget(memtable_bytes=1 << 30, cache_bytes=1 << 26, codec="lz4"))
    store, probe = host.store, StallProbe()
    await probe.stage("puts")
    await _fill(host, puts)
    await probe.stage("first scan")
    await _page(host)
    await probe.stage("puts and pages")
    for _ in range(50):
        await _fill(host, puts // 500)
        await _page(host)
    await probe.stage("flush and drop")
    store.flush()
    while not store.maintenance.idle:
        await asyncio.sleep(PROBE_S)
    await probe.stage("puts in order")
    await _fill(host, puts)
    await probe.stage("drop of a tablet")
    store.drop_tablet(host.tablet)
    await asyncio.sleep(0.2)
    await probe.stage("")
    probe.stop()
    host.close()
    return {name: (1000 * late, 1000 * probe.longest_cpu_s[name]) for name, late in probe.longest_s.items() if name}


async def _fill(host: LoopStore, puts: int) -> None:
    for low in range(0, puts, WRITES_PER_TURN):
        keys = [os.urandom(16) for _ in range(low, min(low + WRITES_PER_TURN, puts))]
        await asyncio.gather(*(host.put(key, VALUE) for key in keys))


async def _page(host: LoopStore) -> None:
    while not host.store.ready_to_scan((host.tablet,)):
        await asyncio.sleep(0)
    page = host.store.scan_page((host.tablet,), b"", None, limit=1000)
    if len(page.keys) != 1000 or page.keys != sorted(page.keys):
        raise SystemExit("A wrong answer: the page is short or out of order.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--puts", type=int, default=500_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", help="where to make the stores; default: in memory")
    asked = parser.parse_args()
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    least: dict[str, tuple[float, float]] = {}
    for _ in range(asked.rounds):
        with tempfile.TemporaryDirectory(dir=asked.directory or memory) as directory:
            found = run_on_loop(lambda place=directory: stalls(place, asked.puts))
        for name, (wait, cpu) in found.items():
            before = least.get(name, (wait, cpu))
            least[name] = (min(wait, before[0]), min(cpu, before[1]))
    print(f"{'stage':18}{'wait ms':>9}{'computed ms':>13}   {asked.puts} rows, least of {asked.rounds} rounds")
    for name, (wait, cpu) in least.items():
        print(f"{name:18}{wait:9.1f}{cpu:13.1f}{'' if cpu <= LIMIT_MS else '   over the limit'}")
    return int(any(cpu > LIMIT_MS for _, cpu in least.values()))


if __name__ == "__main__":
    sys.exit(main())
