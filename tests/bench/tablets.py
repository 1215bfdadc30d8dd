"""What many tablets in one store cost: flush, open, memory, and the store's own work for each group of writes.

    python -m tests.bench.tablets [--tablets 300] [--rows 200] [--generations 3] [--split-rows 500000]
                                  [--directory DIR]

A process of its own makes a store, writes to every tablet, flushes, and does so for some generations, so that level 0
is compacted too; it closes the store and opens it again; then it writes once more and is killed with SIGKILL, and
another one opens what it left. A third one makes a tablet of many rows, exports, imports and splits it, at a key and at
a hash token, written to meanwhile. Times are CPU seconds of the process that holds the store (what its loop would be
held up by) and elapsed ones; memory is PSS, per tablet what the store added to the process divided by the tablets.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from shardkv_node.engine.columns import PUT
from shardkv_node.engine.options import Options
from shardkv_node.engine.store import Store
from shardkv_node.engine.write import Write

VALUE = os.urandom(50) * 2
OPTIONS = Options(durability="os", disk_reserve_bytes=0, scrub_bytes_per_s=0)
GROUP_TABLETS = 10
"""A group of writes is about so many tablets."""

Figures = dict[str, Any]


class Owner:
    """A store with what it posts."""

    def __init__(self, directory: str) -> None:
        self._posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.longest_cpu_s = 0.0
        """Of one posted call: how long a loop would have been held up by it."""
        self.store = Store.open(directory, OPTIONS, post=self._posted.put)

    def settle(self, done: Callable[[], bool]) -> None:
        while not done():
            call = self._posted.get(timeout=60)
            began = time.thread_time()
            call()
            self.longest_cpu_s = max(self.longest_cpu_s, time.thread_time() - began)

    def take_posted(self) -> None:
        """What is there, without waiting."""
        while not self._posted.empty():
            self._posted.get()()

    def write_all(self, tablets: list[int], rows: int, generation: int) -> int:
        """`rows` rows to each tablet, a tenth of them at a time; returns the number of groups."""
        groups, step = 0, max(1, rows // 10)
        for low in range(0, rows, step):
            keys = [b"%06d:%03d" % (n * 7919 % 100_003, generation) for n in range(low, min(rows, low + step))]
            for first in range(0, len(tablets), GROUP_TABLETS):
                writes = [
                    Write(number, keys, PUT, [VALUE] * len(keys)) for number in tablets[first : first + GROUP_TABLETS]
                ]
                self.store.apply_group(self.store.log_group(writes))
                groups += 1
        return groups


@contextmanager
def timed(figures: Figures, name: str) -> Iterator[None]:
    cpu, wall = time.process_time(), time.perf_counter()
    yield
    figures[name] = (time.process_time() - cpu, time.perf_counter() - wall)


def pss() -> int:
    return int(psutil.Process().memory_full_info().pss)


def fill(directory: str, tablets: int, rows: int, generations: int) -> Figures:
    """Ends by SIGKILL once it has told its figures."""
    figures: Figures = {}
    before = pss()
    owner = Owner(directory)
    store = owner.store
    with timed(figures, "create"):
        numbers = [store.create_tablet(b"%d" % n) for n in range(tablets)]
    figures["empty_bytes"] = pss() - before
    for generation in range(generations):
        with timed(figures, "write"):
            figures["groups"] = owner.write_all(numbers, rows, generation)
        figures["memtables_bytes"] = pss() - before
        with timed(figures, "flush"):
            store.flush()
            owner.settle(lambda: not store.maintenance.frozen)
        figures["flush_longest_s"] = owner.longest_cpu_s
    figures["files"] = store.stats()["level0_tables"]
    with timed(figures, "settle"):
        owner.settle(lambda: store.maintenance.idle and store.stats()["level0_tables"] < 4 * tablets)
    figures["flushed_bytes"] = pss() - before
    with timed(figures, "schedule_1000"):
        for _ in range(1000):
            store.maintenance.schedule()
    with timed(figures, "stats"):
        store.stats()
    with timed(figures, "close"):
        store.close()
    with timed(figures, "open"):
        owner = Owner(directory)
    owner.write_all(numbers, rows, generations)
    print(json.dumps(figures), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    return figures


def reopen(directory: str, tablets: int) -> Figures:
    figures: Figures = {}
    before = pss()
    with timed(figures, "open_after_kill"):
        owner = Owner(directory)
    figures["replayed"] = owner.store.recovery.writes_replayed
    figures["open_bytes"] = pss() - before
    figures["tables"] = len(owner.store.maintenance.tables_in_force())
    if len(owner.store.tablets) != tablets:
        raise SystemExit("A wrong answer: tablets are missing.")
    owner.store.close()
    print(json.dumps(figures), flush=True)
    return figures


def split(directory: str, rows: int) -> Figures:
    figures: Figures = {}
    owner = Owner(directory)
    store = owner.store
    whole = store.create_tablet(b"whole")
    for low in range(0, rows, 1000):
        keys = [b"%09d" % (n * 7919 % 999_999_937) for n in range(low, low + 1000)]
        values = [os.urandom(50) * 2 for _ in keys]
        store.apply_group(store.log_group([Write(whole, keys, PUT, values)]))
        owner.settle(lambda: not store.stalled)
    store.flush()
    owner.settle(lambda: store.maintenance.idle)
    figures["whole_bytes"] = store.tablet_size(whole).stored_bytes
    export = os.path.join(directory, "export")
    with timed(figures, "export"):
        store.export_tablet(whole, export)
    with timed(figures, "import"):
        again = store.import_tablet(export, b"again")
    with timed(figures, "middle_key"):
        middle = store.middle_key(again)
    with timed(figures, "split_at_key"):
        halves = store.split_tablet(again, middle or b"", (b"left", b"right"))
    sizes = [store.tablet_size(half).stored_bytes for half in halves]
    figures["larger_half"] = max(sizes) / sum(sizes)
    written, fenced_at = 0, 0.0
    with timed(figures, "split_at_token"):
        began = store.split_tablet_by_token(whole, 1 << 63, (b"left", b"right"))
        while began.outcome is None:
            if not store.stalled:
                keys = [b"new%09d" % n for n in range(written, written + 10)]
                write = Write(whole, keys, PUT, [VALUE] * 10)
                store.apply_group(store.log_group([write]))
                written += 10 * (write.error is None)
                fenced_at = fenced_at or (time.perf_counter() if write.error else 0.0)
            time.sleep(0.001)
            owner.take_posted()
    figures["fenced_s"] = time.perf_counter() - fenced_at if fenced_at else 0.0
    if not isinstance(began.outcome, tuple):
        raise began.outcome
    found = [store.tablet_size(half) for half in began.outcome]
    figures["rows"], figures["written"] = sum(size.rows for size in found), written
    if figures["rows"] != rows + written:
        raise SystemExit(f"A wrong answer: {figures['rows']} rows of {rows + written} are there.")
    store.close()
    print(json.dumps(figures), flush=True)
    return figures


def run(part: str, asked: argparse.Namespace, directory: str) -> Figures:
    command = [sys.executable, "-m", "tests.bench.tablets", "--part", part, "--directory", directory]
    command += ["--tablets", str(asked.tablets), "--rows", str(asked.rows), "--generations", str(asked.generations)]
    command += ["--split-rows", str(asked.split_rows)]
    found: Figures = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=False).stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tablets", type=int, default=300)
    parser.add_argument("--rows", type=int, default=200, help="rows a generation writes to each tablet")
    parser.add_argument("--generations", type=int, default=3, help="flushes; from the fourth on level 0 is compacted")
    parser.add_argument("--split-rows", type=int, default=500_000, help="rows of the tablet that is split")
    parser.add_argument("--directory", help="where to make the store; default: a temporary one")
    parser.add_argument("--part", choices=("fill", "reopen", "split"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.part == "fill":
        fill(asked.directory, asked.tablets, asked.rows, asked.generations)
    elif asked.part == "reopen":
        reopen(asked.directory, asked.tablets)
    elif asked.part == "split":
        split(asked.directory, asked.split_rows)
    else:
        with tempfile.TemporaryDirectory(dir=asked.directory) as directory:
            report(asked, run("fill", asked, directory) | run("reopen", asked, directory))
        with tempfile.TemporaryDirectory(dir=asked.directory) as directory:
            report_split(asked, run("split", asked, directory))


def report(asked: argparse.Namespace, found: Figures) -> None:
    tablets = asked.tablets
    print(f"{tablets} tablets, {asked.rows} rows of {len(VALUE)} B each, {asked.generations} generations")
    for name in ("create", "write", "flush", "settle", "schedule_1000", "stats", "close", "open", "open_after_kill"):
        cpu, wall = found[name]
        print(f"{name:18}{1000 * cpu:10.1f} ms CPU {1000 * wall:10.1f} ms elapsed")
    files, at_once_ms = found["files"] // asked.generations, 1000 * found["flush_longest_s"]
    print(f"one flush          {files} files; the longest call of its installation {at_once_ms:.1f} ms CPU")
    print(f"after the kill     {found['tables']} tables opened, {found['replayed']} writes replayed")
    for name in ("empty_bytes", "memtables_bytes", "flushed_bytes", "open_bytes"):
        print(f"{name:18}{found[name] / 1e6:8.1f} MB, {found[name] / tablets / 1e3:6.1f} KB per tablet")


def report_split(asked: argparse.Namespace, found: Figures) -> None:
    print(f"a tablet of {asked.split_rows} rows, {found['whole_bytes'] / 1e6:.0f} MB stored")
    for name in ("export", "import", "middle_key", "split_at_key", "split_at_token"):
        cpu, wall = found[name]
        print(f"{name:18}{1000 * cpu:10.1f} ms CPU {1000 * wall:10.1f} ms elapsed")
    print(f"the larger half has {100 * found['larger_half']:.1f} % of the bytes, split at the middle key")
    print(f"split at a token: {found['written']} rows written meanwhile, fenced for the last {found['fenced_s']:.2f} s")


if __name__ == "__main__":
    main()
