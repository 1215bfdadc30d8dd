"""A flush: the writes of log segments become tables, one row per key, the newest; deletes are kept.

Reading the log, not the memtable, is what lets a worker process do it. Rows are gathered per tablet in arrival order;
rows that were overwritten are dropped whenever they may be half of what is held, so the memory is that of the live
rows, at most twice. Invariant: arrival order is version order, so the last row of a key is its newest.
"""

from __future__ import annotations

from array import array
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
from shardkv_node.engine.merge import newest_rows
from shardkv_node.engine.table_output import TableOutput
from shardkv_node.engine.vfs import Vfs

_SETTLE_ROWS = 64 * 1024
_WRITE_ROWS = 2048


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
    """The rows of one tablet in arrival order; a key may stand in it more than once."""

    __slots__ = ("_expiries", "_keys", "_kinds", "_settle_at", "_values", "_versions")

    def __init__(self) -> None:
        self._keys: list[bytes] = []
        self._values: list[bytes] = []
        self._versions = array("Q")
        self._kinds: bytearray | None = None
        """None, as `_expiries`: all rows so far are puts that never end, as in most logs."""
        self._expiries = array("Q")
        self._settle_at = _SETTLE_ROWS

    def add(self, entry: WriteEntry) -> None:
        n = len(entry.keys)
        if self._kinds is not None or entry.kinds != PUT or entry.expiries:
            self._add_kinds(entry.kinds, entry.expiries, n)
        self._keys += entry.keys
        self._values += entry.values
        self._versions.extend(repeat(make_version(entry.term, entry.seqno), n))
        if len(self._keys) >= self._settle_at:
            self._settle()

    def add_run(self, run: WriteRun) -> None:
        n, version = len(run.keys), make_version(run.term, run.seqno)
        if self._kinds is not None or run.kind != PUT:
            self._add_kinds(run.kind, NO_EXPIRY, n)
        self._keys += run.keys
        self._values += run.values
        self._versions.extend(range(version, version + n))
        if len(self._keys) >= self._settle_at:
            self._settle()

    def _add_kinds(self, kinds: int | bytes, expiries: int | bytes, n: int) -> None:
        if self._kinds is None:
            self._kinds = bytearray((PUT,)) * len(self._keys)
            self._expiries = array("Q", bytes(8 * len(self._keys)))
        self._kinds += expand_kinds(kinds, n)
        self._expiries.extend(expand_u64(expiries, n))

    def _settle(self) -> None:
        """Drop overwritten rows. Next time when there are twice as many rows: the cost per row stays constant."""
        newest = dict(zip(self._keys, range(len(self._keys)), strict=True))
        if len(newest) < len(self._keys):
            rows = list(newest.values())
            del newest
            self._keys = list(map(self._keys.__getitem__, rows))
            self._values = list(map(self._values.__getitem__, rows))
            self._versions = array("Q", map(self._versions.__getitem__, rows))
            if self._kinds is not None:
                self._kinds = bytearray(map(self._kinds.__getitem__, rows))
                self._expiries = array("Q", map(self._expiries.__getitem__, rows))
        self._settle_at = max(_SETTLE_ROWS, 2 * len(self._keys))

    def write_to(self, output: TableOutput, tablet: int, now_ms: int) -> None:
        keys, rows = newest_rows(self._keys)
        self._keys = []
        kinds, value, version = self._kinds, self._values.__getitem__, self._versions.__getitem__
        for low in range(0, len(keys), _WRITE_ROWS):
            picked = rows[low : low + _WRITE_ROWS]
            columns = Columns(
                keys[low : low + _WRITE_ROWS],
                PUT if kinds is None else collapse(bytes(map(kinds.__getitem__, picked)), 1),
                collapse(pack_u64(map(version, picked)), 8),
                NO_EXPIRY if kinds is None else collapse(pack_u64(map(self._expiries.__getitem__, picked)), 8),
                list(map(value, picked)),
            )
            output.add(tablet, end_expired(columns, now_ms))
        output.end_tablet()
