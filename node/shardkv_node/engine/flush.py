"""A flush: the writes of log segments become tables, one row per key, the newest; deletes are kept.

Reading the log, not the memtable, is what lets a worker process do it. Rows are gathered per tablet in a dict, so
those that were overwritten go at once, and the memory is that of the live rows.
Invariant: arrival order is version order, so the last row of a key is its newest.
"""

from __future__ import annotations

from itertools import repeat

from shardkv_node.engine.columns import (
    NO_EXPIRY,
    PUT,
    Columns,
    collapse,
    expand_kinds,
    expand_u64,
    make_version,
    pack_u64,
)
from shardkv_node.engine.entries import WriteEntry
from shardkv_node.engine.entry_runs import WriteRun, read_runs
from shardkv_node.engine.expiry import end_expired
from shardkv_node.engine.job import FlushJob, JobResult
from shardkv_node.engine.table_output import TableOutput
from shardkv_node.engine.vfs import Vfs

_WRITE_ROWS = 2048
_PLAIN = (PUT, NO_EXPIRY)


def run_flush(vfs: Vfs, job: FlushJob) -> JobResult:
    """Do the job. Raises `Corruption` when a segment is damaged, `StorageError`; then no output is left."""
    output = TableOutput(
        vfs,
        job.output_directory,
        job_id=job.job_id,
        file_number=job.file_number,
        options=job.options,
    )
    try:
        gathered = _gather(vfs, job)
        for tablet in sorted(gathered):
            gathered.pop(tablet).write_to(output, tablet, job.now_ms)
        return output.finish()
    except BaseException:
        output.abandon()
        raise


def _gather(vfs: Vfs, job: FlushJob) -> dict[int, _TabletRows]:
    gathered: dict[int, _TabletRows] = {}
    superseded = frozenset(job.superseded_terms)
    for segment in job.segments:
        for entry in read_runs(vfs, segment.path, end=segment.end):
            if not isinstance(entry, WriteEntry | WriteRun) or entry.term in superseded:
                continue
            wanted = job.tablets.get(entry.tablet)
            if wanted is None:
                continue
            if isinstance(entry, WriteRun):
                entry.clip(*wanted)
                if not entry.keys:
                    continue
            elif not wanted[0] < entry.seqno <= wanted[1]:
                continue
            rows = gathered.get(entry.tablet)
            if rows is None:
                rows = gathered[entry.tablet] = _TabletRows()
            if isinstance(entry, WriteRun):
                rows.add_run(entry)
            else:
                rows.add(entry)
    return gathered


class _TabletRows:
    """The newest row of each key of one tablet."""

    __slots__ = ("_endings", "_rows")

    def __init__(self) -> None:
        self._rows: dict[bytes, tuple[bytes, int]] = {}
        """key -> (value, version)"""
        self._endings: dict[bytes, tuple[int, int]] = {}
        """key -> (kind, expiry) of the rows that are no plain puts."""

    def add(self, entry: WriteEntry) -> None:
        """Requires: what was added before is older."""
        version = make_version(entry.term, entry.seqno)
        self._rows.update(zip(entry.keys, zip(entry.values, repeat(version)), strict=True))
        if self._endings or entry.kinds != PUT or entry.expiries:
            self._add_endings(entry.keys, entry.kinds, entry.expiries)

    def add_run(self, run: WriteRun) -> None:
        """Requires: what was added before is older."""
        first = make_version(run.term, run.seqno)
        versions = range(first, first + len(run.keys))
        self._rows.update(zip(run.keys, zip(run.values, versions, strict=True), strict=True))
        if self._endings or run.kind != PUT:
            self._add_endings(run.keys, run.kind, NO_EXPIRY)

    def _add_endings(self, keys: list[bytes], kinds: int | bytes, expiries: int | bytes) -> None:
        endings, n = self._endings, len(keys)
        for key, kind, expiry in zip(keys, expand_kinds(kinds, n), expand_u64(expiries, n), strict=True):
            if kind == PUT and expiry == NO_EXPIRY:
                endings.pop(key, None)
            else:
                endings[key] = (kind, expiry)

    def write_to(self, output: TableOutput, tablet: int, now_ms: int) -> None:
        """Write the rows, which are gone then."""
        ordered = sorted(self._rows)
        for low in range(0, len(ordered), _WRITE_ROWS):
            keys = ordered[low : low + _WRITE_ROWS]
            values, versions = zip(*map(self._rows.pop, keys), strict=True)
            kinds, expiries = self._endings_of(keys)
            columns = Columns(keys, kinds, collapse(pack_u64(versions), 8), expiries, list(values))
            output.add(tablet, end_expired(columns, now_ms))
        output.end_tablet()

    def _endings_of(self, keys: list[bytes]) -> tuple[int | bytes, int | bytes]:
        """The columns of kinds and expiries."""
        if not self._endings:
            return PUT, NO_EXPIRY
        kinds, expiries = zip(*[self._endings.get(key, _PLAIN) for key in keys], strict=True)
        return collapse(bytes(kinds), 1), collapse(pack_u64(expiries), 8)
