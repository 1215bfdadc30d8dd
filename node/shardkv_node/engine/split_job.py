"""A split job: a part of a tablet's tables becomes tables of two tablets, by the hash token of each key.

It is a compaction of the given tables, so one row per key is left, and memory is bounded as there. Invariant: a key
goes to the half that the topology would send it to (`hash_token`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress

from shardkv.topology.tokens import hash_token
from shardkv_node.engine.clipped_table import view
from shardkv_node.engine.columns import Columns
from shardkv_node.engine.job import JobResult, Pause, SplitJob, no_pause
from shardkv_node.engine.merge import merge_newest, merge_rounds, take
from shardkv_node.engine.open_files import OpenFiles
from shardkv_node.engine.sorted_run import SortedRun
from shardkv_node.engine.table_output import TableOutput
from shardkv_node.engine.table_reader import Table
from shardkv_node.engine.vfs import Vfs

_GATHER_BYTES = 256 * 1024
_OPEN_FILES_MAX = 32


def run_split(vfs: Vfs, job: SplitJob, pause: Pause = no_pause) -> JobResult:
    """Do the job. Raises `Corruption` when an input is damaged, `StorageError`; then no output is left."""
    files = OpenFiles(vfs, _OPEN_FILES_MAX)
    outputs = [
        TableOutput(
            vfs,
            job.output_directory,
            job_id=job.job_id,
            file_number=job.file_number + half,
            file_number_step=2,  # both have names of the same job
            options=job.options,
        )
        for half in (0, 1)
    ]
    try:
        runs = [
            SortedRun([view(Table.open(vfs, table.path, table.meta, None, files), table.meta) for table in run])
            for run in job.runs
        ]
        for parts in merge_rounds(runs, job.start, job.stop, reverse=False, gather_bytes=_GATHER_BYTES):
            rows = merge_newest(parts, drop_tombstones=job.drop_tombstones, now_ms=job.now_ms)
            for tablet, output, half in zip(job.tablets, outputs, cut_by_token(rows, job.token), strict=True):
                output.add(tablet, half)
            pause(sum(output.stored_bytes for output in outputs))
        return JobResult({tablet: metas for output in outputs for tablet, metas in output.finish().tables.items()})
    except BaseException:
        for output in outputs:
            output.abandon()
        raise
    finally:
        files.close_all()


def cut_by_token(rows: Columns, token: int) -> tuple[Columns, Columns]:
    """The rows whose keys have a token below `token`, and the others, both in key order."""
    below = [hash_token(key) < token for key in rows.keys]
    above = [not is_below for is_below in below]
    numbers: Sequence[int] = range(len(below))
    return take(rows, list(compress(numbers, below))), take(rows, list(compress(numbers, above)))
