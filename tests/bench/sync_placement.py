"""Where the log's sync should run: on the event loop (inline) or in a thread beside it.

    python -m tests.bench.sync_placement [--rounds 3] [--seconds 2]

One node's store and committer on an event loop: 1 or 64 tasks that put 100 B values one after the other, durability
`always`, beside a reader that wants the loop every millisecond. The two placements alternate in one run; medians.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable

from shardkv_node.committer import Committer
from shardkv_node.engine.options import Options
from shardkv_node.engine.store import Store
from shardkv_node.engine.syncer import InlineSyncer, Syncer, ThreadSyncer
from shardkv_node.engine.write import Write

PUT = 1
PROBE_INTERVAL_S = 0.001
VALUE = b"v" * 100


def _ignore(error: object) -> None:
    raise SystemExit(f"the store failed: {error}")


async def measure(kind: str, writers: int, seconds: float) -> tuple[float, float, float]:
    """(puts per second, median put latency ms, p99 lateness of the reader ms)."""
    loop = asyncio.get_running_loop()

    def post(work: Callable[[], None]) -> None:
        loop.call_soon_threadsafe(work)

    with tempfile.TemporaryDirectory(prefix="shardkv-sync-") as directory:
        syncer: Syncer = InlineSyncer() if kind == "inline" else ThreadSyncer(post)
        store = Store.open(directory, Options(), post=post, syncer=syncer)
        tablet = store.create_tablet(b"bench")
        committer = Committer(store, on_fatal=_ignore)
        end = loop.time() + seconds
        latencies: list[float] = []
        late: list[float] = []

        async def writer(number: int) -> None:
            for turn in itertools.count():
                if loop.time() > end:
                    return
                done = loop.create_future()
                began = time.perf_counter()
                key = b"key-%d-%d" % (number, turn)
                write = Write(tablet, [key], PUT, [VALUE], done=lambda _, done=done: done.set_result(None))
                committer.submit(write, None)
                await done
                latencies.append(time.perf_counter() - began)

        async def reader() -> None:
            while loop.time() < end:
                due = time.perf_counter() + PROBE_INTERVAL_S
                await asyncio.sleep(PROBE_INTERVAL_S)
                late.append(time.perf_counter() - due)

        await asyncio.gather(reader(), *(writer(number) for number in range(writers)))
        store.close()
    p99 = statistics.quantiles(late, n=100)[98]
    return len(latencies) / seconds, statistics.median(latencies) * 1e3, p99 * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, {platform.machine()}, CPython {platform.python_version()}")
    print("writers  sync    puts/s   median ms  reader late, p99 ms")
    for writers in (1, 64):
        found: dict[str, list[tuple[float, float, float]]] = {"inline": [], "thread": []}
        for _ in range(options.rounds):
            for kind, rounds in found.items():
                with asyncio.Runner(loop_factory=_loop_factory()) as runner:
                    rounds.append(runner.run(measure(kind, writers, options.seconds)))
        for kind, rounds in found.items():
            rate, latency, late = (statistics.median(column) for column in zip(*rounds, strict=True))
            print(f"{writers:7}  {kind:6}  {rate:7,.0f}  {latency:9.3f}  {late:9.3f}")


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    import uvloop

    return uvloop.new_event_loop


if __name__ == "__main__":
    main()
