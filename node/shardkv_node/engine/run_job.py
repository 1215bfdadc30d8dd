"""`run`: does a job, in a worker process or inline. A job may be run again from the start at any time."""

from __future__ import annotations

from shardkv_node.engine.compaction import run_compaction
from shardkv_node.engine.flush import run_flush
from shardkv_node.engine.job import CompactionJob, FlushJob, Job, JobResult, Pause, SplitJob, UniteJob, no_pause
from shardkv_node.engine.split_job import run_split
from shardkv_node.engine.vfs import Vfs


def run(vfs: Vfs, job: Job, pause: Pause = no_pause) -> JobResult:
    """The tables the job made, durable and verified. Raises what went wrong, and then leaves no output behind."""
    match job:
        case FlushJob():
            return run_flush(vfs, job)
        case CompactionJob():
            return run_compaction(vfs, job, pause)
        case SplitJob():
            return run_split(vfs, job, pause)
        case UniteJob():
            from shardkv_node.engine.unite_job import run_unite  # seldom, and it takes a worker a third longer to start

            return run_unite(vfs, job)
