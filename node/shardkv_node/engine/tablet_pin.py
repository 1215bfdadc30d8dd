"""`TabletPin`: a tablet with everything in it at one moment, and what is written to it from then on, for another store.

    manifest     its table files, which stay while the pin is open, as an export would list them; `path` says where
    dump         what was only in memory at the moment (memory_dump.py); ask for it first, it costs its memtables memory
    tail         the writes since, in order, bounded in bytes (tail.py)
    digest       one number over all of the dump and the tail that was given out (tail_digest.py)

All of it is of the tablet and of its records tablet, also when that is made later. Invariant: files, dump and tail
together are all the tablet was told, each write once, and in the order of its versions.

Once the tablet is fenced, no group is in flight, and the asker has all of the tail (`given` == `added`), both stores
compare `digest.value` and `seqnos`.
"""

from __future__ import annotations

from collections.abc import Callable

from shardkv_node.engine import filenames
from shardkv_node.engine.memory_dump import DumpSlice, MemoryDump
from shardkv_node.engine.tablet import Tablet
from shardkv_node.engine.tablet_export import ExportManifest
from shardkv_node.engine.tail import Tail
from shardkv_node.engine.tail_digest import TailDigest


class TabletPin:
    """Made by `Store.pin_tablet`; `close` it. Belongs to the owner of the store."""

    def __init__(
        self,
        store: str,
        pinned: Tablet,
        manifest: ExportManifest,
        dump: MemoryDump,
        tail: Tail,
        digest: TailDigest,
        release: Callable[[TabletPin], None],
    ) -> None:
        self.manifest = manifest
        """Seqnos are those of the moment: with the dump, everything up to them is there."""
        self.tail = tail
        self.digest = digest
        self.closed = False
        self._store = store
        self._pinned = pinned
        self._dump = dump
        self._release = release
        self._dumped = 0

    @property
    def tablet(self) -> int:
        """Number of the tablet."""
        return self.manifest.tablet

    @property
    def seqnos(self) -> dict[bool, int]:
        """Of the newest write there is by now: False: of the tablet, True: of its records."""
        records = self._pinned.records
        return {False: self._pinned.last_seqno, True: 0 if records is None else records.last_seqno}

    @property
    def dump_rows(self) -> int:
        """How many rows the dump has, about."""
        return self._dump.rows

    def path(self, file_name: str) -> str:
        """Where a file of the manifest lies, to be read while the pin is open."""
        return filenames.table_path(self._store, file_name)

    def dump_slice(self, index: int) -> DumpSlice | None:
        """Slice number `index` of the dump: see `MemoryDump.slice`."""
        found = self._dump.slice(index)
        if found is not None and found.index == self._dumped:
            self._dumped += 1
            self.digest.add(found.hash)
        return found

    def close(self) -> None:
        """Let go of everything. Safe to call twice."""
        if not self.closed:
            self.closed = True
            self._dump.close()
            self._release(self)
