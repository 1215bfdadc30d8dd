"""`TableOutput`: the tables a job writes, cut at `table_bytes_max`, named by the job, all or nothing.

Invariant: after `finish` returned, all files are complete, were read back, and files and directory are synced. After
`abandon` none of them is left. A job that dies in between leaves files nobody refers to; opening the store sweeps them.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress

from shardkv.errors import StorageError
from shardkv_node.engine.columns import Columns, row_ends
from shardkv_node.engine.filenames import table_name
from shardkv_node.engine.job import JobResult, TableOptions
from shardkv_node.engine.open_files import OpenFiles
from shardkv_node.engine.table_meta import TableMeta
from shardkv_node.engine.table_reader import verify_file
from shardkv_node.engine.table_writer import TableWriter
from shardkv_node.engine.vfs import Vfs


class TableOutput:
    """Rows in, tables out. `add` rows in key order, `end_tablet` between tablets, then `finish` or `abandon`."""

    def __init__(
        self,
        vfs: Vfs,
        directory: str,
        *,
        job_id: str,
        file_number: int,
        options: TableOptions,
        file_number_step: int = 1,
    ) -> None:
        """Tables are numbered from `file_number` on, in steps of `file_number_step`."""
        self._vfs = vfs
        self._directory = directory
        self._job_id = job_id
        self._file_number = file_number
        self._file_number_step = file_number_step
        self._options = options
        self._piece_bytes = max(options.block_bytes, options.table_bytes_max // 16)
        self._writer: TableWriter | None = None
        self._tablet = 0
        self._finished: list[str] = []
        self._finished_bytes = 0
        self._tables: dict[int, list[TableMeta]] = {}

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tables so far."""
        return self._finished_bytes + (self._writer.stored_bytes if self._writer is not None else 0)

    def add(self, tablet: int, rows: Columns) -> None:
        """Rows of this tablet, ascending and above what was added for it before."""
        ends = row_ends(rows)
        if not ends or ends[-1] <= self._piece_bytes:
            self._add_piece(tablet, rows, ends)
            return
        low, taken = 0, 0
        while low < len(ends):
            # In pieces, so that one large batch of large rows does not make one large table.
            high = max(low + 1, bisect_right(ends, taken + self._piece_bytes, low))
            self._add_piece(tablet, rows.slice(low, high), None)
            low, taken = high, ends[high - 1]

    def _add_piece(self, tablet: int, rows: Columns, ends: Sequence[int] | None) -> None:
        if not rows.keys:
            return
        if self._writer is None:
            path = os.path.join(self._directory, table_name(self._file_number, self._job_id))
            self._writer = TableWriter(self._vfs, path, tablet=tablet, options=self._options)
            self._file_number += self._file_number_step
            self._tablet = tablet
        self._writer.add(rows, ends)
        if self._writer.stored_bytes >= self._options.table_bytes_max:
            self.end_tablet()

    def end_tablet(self) -> None:
        """Complete the table being written, if there is one."""
        if self._writer is None:
            return
        meta = self._writer.finish()
        self._finished_bytes += meta.size
        self._finished.append(os.path.join(self._directory, meta.file_name))
        self._tables.setdefault(self._tablet, []).append(meta)
        self._writer = None

    def finish(self) -> JobResult:
        """Complete all tables, make them durable, and read them back against their checksums."""
        self.end_tablet()
        if self._finished:
            self._vfs.sync_dir(self._directory)
        files = OpenFiles(self._vfs, 1)
        try:
            for tables in self._tables.values():
                for meta in tables:
                    verify_file(files, os.path.join(self._directory, meta.file_name), meta)
        finally:
            files.close_all()
        return JobResult(self._tables)

    def abandon(self) -> None:
        """Remove everything written so far, as far as the disk lets us: the next open sweeps the rest."""
        if self._writer is not None:
            with suppress(StorageError):
                self._writer.abandon()
        for path in self._finished:
            with suppress(StorageError):
                self._vfs.remove(path)
