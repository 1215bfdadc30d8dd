"""A tablet on its way into this store from another one that goes on writing to it: *staging*.

    1. `Store.begin_staging(directory, manifest)`: a `StagingImport`. The files of the manifest are put into the
       directory under their names there (`absent` says which are missing), the slices of the dump given to `add_slice`;
    2. `fetch`, in any thread: files are verified and linked or copied into the tables directory, the dump written to
       tables beside them, all synced. Still no manifest names them;
    3. `Store.install_staging`: one manifest edit makes the staging tablet, and drops the one of an earlier round;
    4. `Store.stage` logs and applies batches of the tail, with the terms and seqnos they have in the store they come
       from; `Store.sync_log` has all of it on disk;
    5. `Store.adopt_staging` gives the tablet its label, by one manifest edit, and from then on it takes writes.

Invariants:
  - rows keep their versions, and the tablet goes on with the seqnos it had; the term of this store is above that of
    every row before the row is logged, so whatever is written here later gets a higher version;
  - what is staged is logged, then applied, and durable as any write is;
  - a staging tablet is fenced: nothing but `stage` writes to it. The fence is not durable, nor is how much of a tail
    has arrived: a staging tablet found when a store is opened is adopted if all of it was synced, else dropped.

The dump goes to tables, not to the log, since it is rows in no order of versions: a log holds writes in theirs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from shardkv.errors import InvalidArgument
from shardkv_node.engine.columns import make_version
from shardkv_node.engine.entries import WriteEntry
from shardkv_node.engine.job import TableOptions
from shardkv_node.engine.memory_dump import DumpSlice
from shardkv_node.engine.memtable import Memtable
from shardkv_node.engine.table_meta import TableMeta
from shardkv_node.engine.table_output import TableOutput
from shardkv_node.engine.tablet_export import ExportManifest
from shardkv_node.engine.tablet_import import TabletImport
from shardkv_node.engine.tail import TailBatch, TailWrite
from shardkv_node.engine.tail_digest import TailDigest
from shardkv_node.engine.vfs import Vfs

Verified = set[tuple[str, int]]
"""Name and checksum of files of a directory that were read and found right: they are not read again."""


class StagingImport(TabletImport):
    """Made by `Store.begin_staging`. `fetch`, then give it to `Store.install_staging`, or `abandon` it."""

    def __init__(
        self,
        vfs: Vfs,
        directory: str,
        manifest: ExportManifest,
        *,
        table_directory: str,
        file_number: int,
        random_bytes: Callable[[int], bytes],
        options: TableOptions,
        verified: Verified,
    ) -> None:
        """`options`: of the tables the dump is written to."""
        super().__init__(
            vfs,
            directory,
            table_directory=table_directory,
            file_number=file_number,
            job_id=random_bytes(4).hex(),
        )
        self.manifest = manifest
        self.digest = TailDigest()
        """Of the dump; goes on with the tail."""
        self.verified = verified
        self._random_bytes = random_bytes
        self._options = options
        self._next_slice = 0
        self._memory = {False: Memtable(), True: Memtable()}
        """What is not written yet, of the tablet and of its records."""
        self._dumped: dict[bool, list[TableMeta]] = {False: [], True: []}
        """Tables written of it, oldest first."""

    def absent(self) -> list[TableMeta]:
        """The files that the directory does not have yet, each once; one that is too short is one of them."""
        metas = {meta.file_name: meta for _, meta in (*self.manifest.tables, *self.manifest.records)}
        return [meta for meta in metas.values() if not self._is_there(meta)]

    def _is_there(self, meta: TableMeta) -> bool:
        path = os.path.join(self._directory, meta.file_name)
        return self._vfs.exists(path) and self._vfs.size(path) == meta.size

    def add_slice(self, found: DumpSlice) -> None:
        """Take the next slice of the dump; one that was taken is ignored. Not while `write_dump` or `fetch` runs.

        Raises `InvalidArgument` for one that is too early.
        """
        if found.index > self._next_slice:
            raise InvalidArgument(f"Slice {found.index} of a dump came before slice {self._next_slice}.")
        if found.index == self._next_slice:
            self._next_slice += 1
            self._memory[found.records].apply_rows(found.rows)
            self.digest.add(found.hash)

    @property
    def dump_bytes(self) -> int:
        """Memory that the slices take: with more than a memtable's, call `write_dump`."""
        return sum(memtable.resident_bytes for memtable in self._memory.values())

    def write_dump(self) -> None:
        """Write the slices so far to tables, durable, and let go of them. In any thread. Raises `StorageError`."""
        for records, memtable in self._memory.items():
            if len(memtable):
                self._memory[records] = Memtable()
                self._dumped[records] += self._written(memtable)

    def fetch(self) -> None:
        """Verify the files and bring them here, and write what is left of the dump; durable. As `TabletImport.fetch`.

        Requires: nothing is absent, and all slices were added.
        """
        super().fetch()
        try:
            self.write_dump()
        except BaseException:
            self.abandon()
            raise
        for levels, metas in ((self.levels, self._dumped[False]), (self.records, self._dumped[True])):
            if metas:
                levels[:1] = [[*(levels[0] if levels else []), *metas]]  # level 0 is oldest first

    def _read_manifest(self) -> ExportManifest:
        return self.manifest

    def _check_file(self, path: str, meta: TableMeta) -> None:
        if (meta.file_name, meta.crc32c) not in self.verified:
            super()._check_file(path, meta)
            self.verified.add((meta.file_name, meta.crc32c))

    def _written(self, memtable: Memtable) -> list[TableMeta]:
        output = TableOutput(
            self._vfs,
            self._table_directory,
            job_id=self._random_bytes(4).hex(),
            file_number=self._file_number,
            options=self._options,
        )
        tablet = self.manifest.tablet
        try:
            for rows in memtable.chunks(b"", None, reverse=False):
                output.add(tablet, rows)
            output.end_tablet()
            metas = output.finish().tables.get(tablet, [])
        except BaseException:
            output.abandon()
            raise
        self._placed += [os.path.join(self._table_directory, meta.file_name) for meta in metas]
        return metas


class Staging:
    """A staging tablet and how far its tail has come. Made by `Store.install_staging`, which does the work.

    Invariant: writes of the tablet, and those of its records, are taken with seqnos that follow without a gap.
    """

    def __init__(self, number: int, found: StagingImport) -> None:
        self.number = number
        """Of the tablet in this store. Its records tablet has another one."""
        self.applied = 0
        """So many writes of the tail are in: ask for what follows."""
        self.seqnos = {False: found.manifest.last_seqno, True: found.manifest.records_seqno}
        """Of the newest write of the tablet, and of its records."""
        self.digest = found.digest
        """To be compared with that of the pin, once the tablet is fenced there and all of its tail has come."""
        self.verified = found.verified
        """For the `begin_staging` of the next round."""

    def news_of(self, batch: TailBatch) -> list[TailWrite]:
        """The writes of the batch that are not in yet. Raises `InvalidArgument` for a batch that does not follow."""
        if batch.after > self.applied:
            raise InvalidArgument(f"A batch follows write {batch.after} of a tail of which {self.applied} are here.")
        writes = batch.writes[self.applied - batch.after :]
        seqnos = dict(self.seqnos)
        for write in writes:
            if write.seqno != seqnos[write.records] + 1:
                raise InvalidArgument(f"Write {write.seqno} of a tail follows write {seqnos[write.records]}.")
            seqnos[write.records] = write.seqno
        return writes

    def note(self, writes: Iterable[TailWrite]) -> None:
        """These are applied."""
        for write in writes:
            self.applied += 1
            self.seqnos[write.records] = write.seqno
            self.digest.add(write.hash)


def apply_entries(memtable: Memtable, entries: Iterable[WriteEntry]) -> None:
    """Make logged writes visible."""
    for entry in entries:
        version = make_version(entry.term, entry.seqno)
        memtable.apply(entry.keys, entry.kinds, version, entry.values, entry.expiries)
