"""A job of a merge: the records of tokens of two tablets become the tables of one.

Both are streamed in the order of lanes, one row per lane each, and lanes that both have are united (`dedupe.united`).
What is streamed may be the newest tables only: then a lane that one side lacks is looked up in all the tables it has.
Invariant: of no lane with a record that has not ended is the highest number lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from shardkv_node.engine.block_cache import BlockCache
from shardkv_node.engine.clipped_table import view
from shardkv_node.engine.columns import EMPTY, PUT_EXPIRING, Columns, collapse, expand_u64, pack_u64
from shardkv_node.engine.dedupe import of_one_side, united
from shardkv_node.engine.job import CompactionInput, JobResult, UniteJob
from shardkv_node.engine.merge import merge_newest, merge_rounds
from shardkv_node.engine.open_files import OpenFiles
from shardkv_node.engine.sorted_run import SortedRun
from shardkv_node.engine.table_lookup import TableLookup
from shardkv_node.engine.table_output import TableOutput
from shardkv_node.engine.table_reader import Table
from shardkv_node.engine.vfs import Vfs

LEFT, RIGHT = 0, 1
_GATHER_BYTES = 256 * 1024
_OPEN_FILES_MAX = 32
_CACHE_BYTES = 16 * 1024 * 1024


def run_unite(vfs: Vfs, job: UniteJob) -> JobResult:
    """Do the job. Raises `Corruption` when an input is damaged, `StorageError`; then no output is left."""
    files = OpenFiles(vfs, _OPEN_FILES_MAX)
    output = TableOutput(vfs, job.output_directory, job_id=job.job_id, file_number=job.file_number, options=job.options)
    try:
        sides = [_Side(vfs, runs, files, side, job.now_ms) for side, runs in ((LEFT, job.left), (RIGHT, job.right))]
        rest = _Rest(vfs, job.looked_up, files, job.now_ms)
        for parts in merge_rounds(sides, b"", None, reverse=False):
            output.add(job.tablet, _united(rest.completed(parts), job.boundary))
        output.end_tablet()
        return output.finish()
    except BaseException:
        output.abandon()
        raise
    finally:
        files.close_all()


class _Side:
    """The newest records of one tablet, a `Source`. All are of one kind: in its place stands the side they are of."""

    def __init__(
        self, vfs: Vfs, runs: Sequence[Sequence[CompactionInput]], files: OpenFiles, side: int, now_ms: int
    ) -> None:
        self._runs = _opened(vfs, runs, files, None)
        self._side = side
        self._now_ms = now_ms

    def chunks(self, start: bytes, stop: bytes | None, *, reverse: bool) -> Iterator[Columns]:
        for parts in merge_rounds(self._runs, start, stop, reverse=reverse, gather_bytes=_GATHER_BYTES):
            rows = merge_newest(parts, drop_tombstones=True, now_ms=self._now_ms)
            if rows.keys:
                yield Columns(rows.keys, self._side, rows.versions, rows.expiries, rows.values)


_Row = tuple[int, int, bytes]
"""Version, expiry, record."""
_Rows = dict[bytes, _Row]
"""By lane."""


class _Rest:
    """All there is of both sides, for lanes that were written to on the other one only."""

    def __init__(
        self, vfs: Vfs, sides: Sequence[Sequence[Sequence[CompactionInput]]], files: OpenFiles, now_ms: int
    ) -> None:
        cache = BlockCache(_CACHE_BYTES)
        self._sides = [TableLookup(_opened(vfs, runs, files, cache)[::-1]) if runs else None for runs in sides]
        self._now_ms = now_ms

    def completed(self, parts: Sequence[Columns]) -> tuple[_Rows, _Rows]:
        """The rows of these lanes on either side."""
        left, right = _rows_of(parts)
        more = self._found(LEFT, right.keys() - left.keys()), self._found(RIGHT, left.keys() - right.keys())
        return left | more[LEFT], right | more[RIGHT]

    def _found(self, side: int, lanes: Iterable[bytes]) -> _Rows:
        lookup = self._sides[side]
        if lookup is None:
            return {}
        found: _Rows = {}
        for lane in sorted(lanes):
            columns, row = lookup.find(lane) or (EMPTY, 0)
            if len(columns) and columns.kind(row) == PUT_EXPIRING and columns.expiry(row) > self._now_ms:
                found[lane] = (columns.version(row), columns.expiry(row), columns.values[row])
        return found


def _opened(
    vfs: Vfs, runs: Sequence[Sequence[CompactionInput]], files: OpenFiles, cache: BlockCache | None
) -> list[SortedRun]:
    return [
        SortedRun([view(Table.open(vfs, table.path, table.meta, cache, files), table.meta) for table in run])
        for run in runs
    ]


def _rows_of(parts: Sequence[Columns]) -> tuple[_Rows, _Rows]:
    rows: tuple[_Rows, _Rows] = ({}, {})
    for part in parts:
        n = len(part)
        columns = zip(expand_u64(part.versions, n), expand_u64(part.expiries, n), part.values, strict=True)
        rows[part.kind(0)].update(zip(part.keys, columns, strict=True))
    return rows


def _united(sides: tuple[_Rows, _Rows], boundary: bytes | int) -> Columns:
    """One row for each lane."""
    left, right = sides
    merged: dict[bytes, _Row] = {}
    for lane in left.keys() | right.keys():
        one, other = left.get(lane), right.get(lane)
        if one is not None and other is not None:
            merged[lane] = (max(one[0], other[0]), max(one[1], other[1]), united(one[2], other[2], boundary))
        elif one is not None:
            merged[lane] = (one[0], one[1], of_one_side(one[2], boundary, below=True))
        elif other is not None:
            merged[lane] = (other[0], other[1], of_one_side(other[2], boundary, below=False))
    lanes = sorted(merged)
    versions, expiries, records = zip(*map(merged.__getitem__, lanes), strict=True)
    return Columns(lanes, PUT_EXPIRING, collapse(pack_u64(versions), 8), collapse(pack_u64(expiries), 8), list(records))
