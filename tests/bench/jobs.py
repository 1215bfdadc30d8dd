"""What flush and compaction cost: the jobs run inline, CPU time per row of input, and by stage.

    python -m tests.bench.jobs [--rows 60000] [--rounds 5] [--directory DIR]

Rows are those of the engine benchmark: 16-byte random keys, 20 % overwrites, 100-byte values that halve, lz4.
  flush, puts      one log segment, one put per group
  flush, batches   one log segment, groups of 1000
  compact          four tables of level 0 with a level 1 of as many rows
Stages are measured by doing less: all up to the stage, less all up to the one before. The least of the rounds counts.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator

from shardkv_node.engine.block import CODEC_LZ4
from shardkv_node.engine.columns import NO_EXPIRY, PUT
from shardkv_node.engine.entries import WriteEntry
from shardkv_node.engine.entry_runs import read_runs
from shardkv_node.engine.job import (
    CompactionInput,
    CompactionJob,
    FlushJob,
    JobResult,
    SegmentSpan,
    TableOptions,
)
from shardkv_node.engine.log_writer import LogWriter
from shardkv_node.engine.merge import merge_newest, merge_rounds
from shardkv_node.engine.open_files import OpenFiles
from shardkv_node.engine.run_job import run
from shardkv_node.engine.sorted_run import SortedRun
from shardkv_node.engine.table_meta import TableMeta
from shardkv_node.engine.table_reader import Table
from shardkv_node.engine.vfs import OsVfs
from tests.bench.engine_data import KEY_BYTES, values

TABLET = 1
VALUE_BYTES = 100
BATCH = 1000
OPTIONS = TableOptions(codec=CODEC_LZ4)
GATHER_BYTES = 96 * 1024


class Bench:
    """Makes inputs once and runs jobs over them; outputs are removed after each run."""

    def __init__(self, directory: str, rows: int) -> None:
        self.directory = directory
        self.rows = rows
        self.vfs = OsVfs()
        self._jobs = 0
        rng = random.Random(1)
        keys = [rng.randbytes(KEY_BYTES) for _ in range(rows)]
        self.keys = [rng.choice(keys) if number % 5 == 4 else key for number, key in enumerate(keys)]
        self.values = values(1, rows, VALUE_BYTES)

    def log(self, name: str, per_group: int) -> SegmentSpan:
        """A segment that holds all rows."""
        path = os.path.join(self.directory, name)
        log = LogWriter.create(self.vfs, path, store_id=bytes(16), number=1)
        for number, low in enumerate(range(0, self.rows, per_group)):
            keys, given = self.keys[low : low + per_group], self.values[low : low + per_group]
            log.append([WriteEntry(TABLET, 1, number + 1, None, keys, PUT, NO_EXPIRY, given)], 1)
        log.close()
        return SegmentSpan(path, log.offset)

    def flush_job(self, segment: SegmentSpan) -> FlushJob:
        self._jobs += 1
        return FlushJob(
            job_id=f"{self._jobs:08x}",
            output_directory=self.directory,
            file_number=1,
            segments=[segment],
            tablets={TABLET: (0, 1 << 39)},
            options=OPTIONS,
            now_ms=1,
        )

    def compaction_job(self, runs: list[list[TableMeta]]) -> CompactionJob:
        self._jobs += 1
        return CompactionJob(
            job_id=f"{self._jobs:08x}",
            output_directory=self.directory,
            file_number=1,
            tablet=TABLET,
            runs=[
                [CompactionInput(os.path.join(self.directory, meta.file_name), meta) for meta in run] for run in runs
            ],
            drop_tombstones=True,
            options=OPTIONS,
            now_ms=1,
        )

    def remove(self, result: JobResult) -> None:
        for metas in result.tables.values():
            for meta in metas:
                os.remove(os.path.join(self.directory, meta.file_name))

    def runs(self) -> list[list[TableMeta]]:
        """A level 1 of half the rows and four level-0 tables of the others."""
        whole_keys, whole_values = self.keys, self.values
        half, quarter = self.rows // 2, self.rows // 8
        spans = [(0, half), *((low, low + quarter) for low in range(half, half + 4 * quarter, quarter))]
        found = []
        for number, (low, high) in enumerate(spans):
            self.keys, self.values, self.rows = whole_keys[low:high], whole_values[low:high], high - low
            result = run(self.vfs, self.flush_job(self.log(f"input-{number}", BATCH)))
            found.append(result.tables[TABLET])
            self.keys, self.values, self.rows = whole_keys, whole_values, len(whole_keys)
        return found


def least_cpu_s(work: Callable[[], object], rounds: int) -> float:
    def once() -> float:
        began = time.process_time()
        work()
        return time.process_time() - began

    return min(once() for _ in range(rounds))


def measure_flush(bench: Bench, segment: SegmentSpan, rounds: int) -> Iterator[tuple[str, float]]:
    def read() -> None:
        for _ in read_runs(bench.vfs, segment.path, end=segment.end):
            pass

    def whole() -> None:
        bench.remove(run(bench.vfs, bench.flush_job(segment)))

    yield "reading the log", least_cpu_s(read, rounds)
    yield "all", least_cpu_s(whole, rounds)


def measure_compaction(bench: Bench, rounds: int) -> Iterator[tuple[str, float]]:
    inputs = bench.runs()

    def parts() -> Iterator[list[object]]:
        files = OpenFiles(bench.vfs, 32)
        runs = [
            SortedRun(
                [Table.open(bench.vfs, os.path.join(bench.directory, m.file_name), m, None, files) for m in metas]
            )
            for metas in inputs
        ]
        yield from merge_rounds(runs, b"", None, reverse=False, gather_bytes=GATHER_BYTES)  # type: ignore[misc]
        files.close_all()

    def read() -> None:
        for _ in parts():
            pass

    def merge() -> None:
        for found in parts():
            merge_newest(found, drop_tombstones=True, now_ms=1)  # type: ignore[arg-type]

    def whole() -> None:
        bench.remove(run(bench.vfs, bench.compaction_job(inputs)))

    yield "reading the tables", least_cpu_s(read, rounds)
    yield "and merging", least_cpu_s(merge, rounds)
    yield "all", least_cpu_s(whole, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", default="/dev/shm" if os.path.isdir("/dev/shm") else None)
    args = parser.parse_args()
    gc.disable()  # as a worker does
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        bench = Bench(directory, args.rows)
        works = {
            "flush, puts": measure_flush(bench, bench.log("puts", 1), args.rounds),
            "flush, batches": measure_flush(bench, bench.log("batches", BATCH), args.rounds),
            "compact": measure_compaction(bench, args.rounds),
        }
        for name, stages in works.items():
            for stage, seconds in stages:
                print(f"{name:16}{stage:20}{1e6 * seconds / args.rows:8.2f} us of CPU per row")


if __name__ == "__main__":
    main()
