"""`Scrub`: re-reads every table in the background at a set rate, so that damage is found while a copy still exists.

One niced daemon thread reads a slice, extends a checksum (both without work for the interpreter) and sleeps. It asks
the store nothing but which tables there are, changes nothing, and is never waited for: a slow disk slows the scrub
alone. What it finds is in the log, as `table_corrupt`, and in `findings`.

Invariants: a table is reported only if it was in force after its damage was seen, so one that a compaction removed
meanwhile is not; `findings` is written by the thread and read by anybody.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import google_crc32c

from shardkv.errors import Corruption, StorageError
from shardkv_node.engine import filenames
from shardkv_node.engine.table_meta import TableMeta
from shardkv_node.engine.vfs import Vfs

log = logging.getLogger(__name__)

START_DELAY_S = 60.0
"""Opening a store is busy enough, and short-lived programs never pay for a scrub."""
PASS_INTERVAL_S = 3600.0
"""A pass begins at most so often: a small store is not read over and over."""
SLICE_BYTES = 256 * 1024
_NICENESS = 10
_JOIN_S = 2.0


class Scrub:
    """`tables` gives the tables in force; it is called from the thread. `bytes_per_s` 0: never runs."""

    def __init__(
        self,
        vfs: Vfs,
        directory: str,
        *,
        bytes_per_s: int,
        tables: Callable[[], Sequence[TableMeta]],
        start_delay_s: float = START_DELAY_S,
        pass_interval_s: float = PASS_INTERVAL_S,
    ) -> None:
        self._vfs = vfs
        self._directory = directory
        self._bytes_per_s = bytes_per_s
        self._tables = tables
        self._start_delay_s = start_delay_s
        self._pass_interval_s = pass_interval_s
        self._slice_bytes = max(4096, min(SLICE_BYTES, bytes_per_s // 4))
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._bytes = self._checked = self._passes = 0
        self.findings: dict[str, StorageError] = {}
        """Tables in force that cannot be read as they were written, by file name, as of their last check."""

    def start(self) -> None:
        """Begin, after the delay. Safe to call when it is off."""
        if self._bytes_per_s and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="shardkv-scrub", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop after the slice at hand. Safe to call twice."""
        self._closed.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_JOIN_S)

    def stats(self) -> dict[str, int]:
        """Since the store was opened: bytes and tables read, whole passes, and the tables found damaged by now."""
        return {
            "scrub_bytes": self._bytes,
            "scrub_tables": self._checked,
            "scrub_passes": self._passes,
            "scrub_corrupt_tables": len(self.findings),
        }

    def _run(self) -> None:
        if sys.platform == "linux":  # where it is a property of the thread
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        pause_s = self._start_delay_s
        while not self._closed.wait(pause_s):
            began = time.monotonic()
            if not self._pass():
                return
            self._passes += 1
            pause_s = max(0.0, began + self._pass_interval_s - time.monotonic())

    def _pass(self) -> bool:
        """Check every table there is now, from a place that differs from start to start. False: closed meanwhile."""
        metas = sorted(self._tables(), key=lambda meta: meta.file_name)
        first = time.time_ns() % len(metas) if metas and not self._passes else 0
        for meta in metas[first:] + metas[:first]:
            try:
                if not self._read(meta):
                    return False
                self.findings.pop(meta.file_name, None)
            except StorageError as error:
                self._note(meta, error)
            self._checked += 1
        in_force = {meta.file_name for meta in self._tables()}
        for name in self.findings.keys() - in_force:
            del self.findings[name]
        return True

    def _read(self, meta: TableMeta) -> bool:
        """Re-read one table at the set rate. False: closed meanwhile. Raises `Corruption`, `StorageError`."""
        path = filenames.table_path(self._directory, meta.file_name)
        file = self._vfs.open_read(path)
        try:
            crc = offset = 0
            while data := file.pread(offset, self._slice_bytes):
                crc = google_crc32c.extend(crc, data)
                offset += len(data)
                self._bytes += len(data)
                if self._closed.wait(len(data) / self._bytes_per_s):
                    return False
        finally:
            file.close()
        if offset != meta.size:
            raise Corruption("Wrong size of a table", path=path, offset=0, expected=meta.size, got=offset)
        if crc != meta.crc32c:
            raise self._named(path, meta, crc)
        return True

    def _named(self, path: str, meta: TableMeta, crc: int) -> Corruption:
        """The corruption with the offset of the damaged block; 0 when no block tells."""
        from shardkv_node.engine.tools.damage import Damage
        from shardkv_node.engine.tools.walk_table import TableWalk

        found = next((step for step in TableWalk(self._vfs, path).steps() if isinstance(step, Damage)), None)
        what, offset = ("Bad checksum of a table", 0) if found is None else ("Damage", found.offset)
        return Corruption(what, path=path, offset=offset, expected=f"{meta.crc32c:08x}", got=f"{crc:08x}")

    def _note(self, meta: TableMeta, error: StorageError) -> None:
        if all(other.file_name != meta.file_name for other in self._tables()):
            return
        self.findings[meta.file_name] = error
        offset = error.offset if isinstance(error, Corruption) else 0
        log.error("table_corrupt file=%s offset=%d problem=%r", meta.file_name, offset, error.message)
