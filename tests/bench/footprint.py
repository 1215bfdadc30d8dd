"""How quickly a cluster answers its first put, what it holds when idle, and what it holds at most during a fill.

    python -m tests.bench.footprint [--keys 1000000] [--rounds 3] [--json]

Starts `shardkv cluster up` with three nodes on a directory of its own, in the default durability, and stops it
again. Memory is PSS (shared pages counted once), launcher, metadata process, router, nodes and workers together.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from shardkv import Client
from shardkv.errors import ShardKVError
from tests.worlds.ports import free_port

BATCH = 1000
VALUE_BYTES = 100
SAMPLE_INTERVAL_S = 0.1
SETTLE_S = 1.0
FIRST_PUT_BAR_S = 2.0
IDLE_BAR_BYTES = 200e6


def pss_bytes(launcher: psutil.Process) -> int:
    """Proportional set size of a process and everything below it."""
    total = 0
    for process in [launcher, *launcher.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue
    return total


class PeakSampler(threading.Thread):
    """Samples the memory of a process tree until `finish`."""

    def __init__(self, launcher: psutil.Process) -> None:
        super().__init__(daemon=True)
        self._launcher = launcher
        self._done = threading.Event()
        self.peak_bytes = 0

    def run(self) -> None:
        while not self._done.wait(SAMPLE_INTERVAL_S):
            self.peak_bytes = max(self.peak_bytes, pss_bytes(self._launcher))

    def finish(self) -> int:
        self._done.set()
        self.join()
        return self.peak_bytes


def start_cluster(directory: Path, port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "shardkv", "cluster", "up", "--port", str(port), "--data-dir", str(directory)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def first_put_s(port: int, started_at: float) -> float:
    """Seconds from `started_at` (time.perf_counter) to the first acknowledged put."""
    with Client(f"127.0.0.1:{port}", timeout=1) as db:
        while True:
            try:
                db.put("first", "put")
            except ShardKVError:
                if time.perf_counter() - started_at > 60:
                    raise
                continue
            return time.perf_counter() - started_at


def fill(port: int, keys: int) -> float:
    """Put `keys` random keys in batches; return the seconds it took."""
    rng = random.Random(1)
    began = time.perf_counter()
    with Client(f"127.0.0.1:{port}", timeout=60) as db:
        for _ in range(keys // BATCH):
            db.put_many({rng.randbytes(16): rng.randbytes(VALUE_BYTES // 2) * 2 for _ in range(BATCH)})
    return time.perf_counter() - began


def one_round(keys: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="shardkv-footprint-") as name:
        port = free_port()
        began = time.perf_counter()
        process = start_cluster(Path(name) / "data", port)
        try:
            first = first_put_s(port, began)
            launcher = psutil.Process(process.pid)
            time.sleep(SETTLE_S)
            idle = pss_bytes(launcher)
            sampler = PeakSampler(launcher)
            sampler.start()
            seconds = fill(port, keys) if keys else 0.0
            peak = sampler.finish()
        finally:
            process.terminate()
            process.wait(60)
    return {"first_put_s": first, "idle_pss_bytes": idle, "fill_s": seconds, "fill_peak_pss_bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=1_000_000, help="keys of the fill; 0 for none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rounds = [one_round(options.keys) for _ in range(options.rounds)]
    medians = {name: statistics.median(found[name] for found in rounds) for name in rounds[0]}
    machine = f"{os.cpu_count()} cores, {platform.machine()}, CPython {platform.python_version()}"
    if options.json:
        print(json.dumps({"machine": machine, "rounds": rounds, "medians": medians}, indent=2))
        return
    print(f"{machine}; medians of {options.rounds} rounds")
    print(f"first put answered after   {medians['first_put_s']:6.2f} s   (bar: under {FIRST_PUT_BAR_S:g} s)")
    print(
        f"idle, all processes (PSS)  {medians['idle_pss_bytes'] / 1e6:6.0f} MB  (bar: under {IDLE_BAR_BYTES / 1e6:g})"
    )
    if options.keys:
        rate = options.keys / medians["fill_s"]
        print(f"peak, fill of {options.keys:,} keys  {medians['fill_peak_pss_bytes'] / 1e6:6.0f} MB")
        print(
            f"fill                       {rate:6,.0f} keys/s (put_many of {BATCH}, one client, {VALUE_BYTES} B values)"
        )


if __name__ == "__main__":
    main()
