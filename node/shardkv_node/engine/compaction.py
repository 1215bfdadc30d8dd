"""A compaction: runs of tables of one tablet become tables that do not overlap, one row per key.

Memory is bounded whatever the size of the inputs: each run holds about a partition of rows at a time.
"""

from __future__ import annotations

from shardkv_node.engine.clipped_table import ClippedTable, view
from shardkv_node.engine.job import CompactionInput, CompactionJob, JobResult, Pause, no_pause
from shardkv_node.engine.merge import merge_newest, merge_rounds
from shardkv_node.engine.open_files import OpenFiles
from shardkv_node.engine.sorted_run import SortedRun
from shardkv_node.engine.table_output import TableOutput
from shardkv_node.engine.table_reader import Table
from shardkv_node.engine.vfs import Vfs

_GATHER_BYTES = 96 * 1024
"""Of each run per round: more is no faster, since the rows of a round fall out of the cache of the processor."""
_OPEN_FILES_MAX = 32


def run_compaction(vfs: Vfs, job: CompactionJob, pause: Pause = no_pause) -> JobResult:
    """Do the job. Raises `Corruption` when an input is damaged, `StorageError`; then no output is left.

    `pause(bytes written so far)` is called often: a place to let more urgent work go first, or to slow down.
    """
    files = OpenFiles(vfs, _OPEN_FILES_MAX)
    output = TableOutput(
        vfs,
        job.output_directory,
        job_id=job.job_id,
        file_number=job.file_number,
        options=job.options,
    )
    try:
        runs = [SortedRun([_open(vfs, table, files) for table in run]) for run in job.runs]
        for parts in merge_rounds(runs, job.start, job.stop, reverse=False, gather_bytes=_GATHER_BYTES):
            output.add(job.tablet, merge_newest(parts, drop_tombstones=job.drop_tombstones, now_ms=job.now_ms))
            pause(output.stored_bytes)
        return output.finish()
    except BaseException:
        output.abandon()
        raise
    finally:
        files.close_all()


def _open(vfs: Vfs, table: CompactionInput, files: OpenFiles) -> Table | ClippedTable:
    return view(Table.open(vfs, table.path, table.meta, None, files), table.meta)
