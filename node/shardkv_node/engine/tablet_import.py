"""`TabletImport`: brings an exported tablet into a store: checks all of it, then has its files under new names.

    1. `fetch`, in any thread: the export's manifest and every byte of its files are checked, and the files linked or
       copied into the tables directory, synced. No manifest names them yet: after a crash the next open sweeps them.
    2. `Store.install_import`, by the owner of the store: one manifest edit makes the tablet.

Rows keep their versions. So that later writes get higher ones, and none that the exporting store gives out until it
is opened again, the store's term is raised above that of every imported row, by the same edit, unless it is already.
"""

from __future__ import annotations

import os
from itertools import count

import msgspec

from shardkv.errors import Corruption, StorageError
from shardkv_node.engine import filenames
from shardkv_node.engine.columns import SEQNO_BITS, SEQNO_MAX
from shardkv_node.engine.manifest import LEVELS_MAX, TablesEdit, changed_levels
from shardkv_node.engine.open_files import OpenFiles
from shardkv_node.engine.table_meta import TableMeta
from shardkv_node.engine.table_reader import Table, verify_file
from shardkv_node.engine.tablet_export import ExportManifest, place, read_export, remove_all
from shardkv_node.engine.vfs import Vfs


class TabletImport:
    """Made by `Store.begin_import`. `fetch`, then give it to `Store.install_import`, or `abandon` it."""

    def __init__(self, vfs: Vfs, directory: str, *, table_directory: str, file_number: int, job_id: str) -> None:
        """Files are named from `file_number` on, with this random job id."""
        self._vfs = vfs
        self._directory = directory
        self._table_directory = table_directory
        self._file_number = file_number
        self._job_id = job_id
        self._placed: list[str] = []
        self.last_seqno = 0
        self.levels: list[list[TableMeta]] = []
        """The tables, under their names in this store."""
        self.records_seqno = 0
        self.records: list[list[TableMeta]] = []
        """The same of the records of tokens."""

    @property
    def metas(self) -> list[TableMeta]:
        return [meta for metas in (*self.levels, *self.records) for meta in metas]

    @property
    def highest_term(self) -> int:
        """Of any row; 0 when there is none."""
        return max((meta.max_version for meta in self.metas), default=0) >> SEQNO_BITS

    def fetch(self) -> None:
        """Check everything and bring the files here, durable. May run in any thread, and take long.

        Raises `Corruption` that names file and place, `UnsupportedFormat`, `InvalidArgument` when there is no export,
        `StorageError`; then nothing is left behind.
        """
        manifest = self._read_manifest()
        self._check(manifest)
        try:
            names = self._fetch_files(manifest)
        except BaseException:
            self.abandon()
            raise
        self.levels, self.last_seqno = _levels(manifest.tables, names), manifest.last_seqno
        self.records, self.records_seqno = _levels(manifest.records, names), manifest.records_seqno

    def abandon(self) -> None:
        """Remove what was brought here."""
        remove_all(self._vfs, self._placed)
        self._placed = []

    def _read_manifest(self) -> ExportManifest:
        return read_export(self._vfs, self._directory)

    def _check(self, manifest: ExportManifest) -> None:
        """Raise `Corruption` when the manifest contradicts itself."""
        problem = _problem(manifest.tables, manifest.last_seqno) or _problem(manifest.records, manifest.records_seqno)
        if problem is not None:
            path = filenames.export_path(self._directory)
            raise Corruption(
                "An export contradicts itself", path=path, offset=0, expected="tables that fit", got=problem
            )

    def _fetch_files(self, manifest: ExportManifest) -> dict[str, str]:
        """The name here of each file there."""
        names: dict[str, str] = {}
        numbers = count(self._file_number)
        for _, meta in (*manifest.tables, *manifest.records):
            if meta.file_name not in names:
                names[meta.file_name] = filenames.table_name(next(numbers), self._job_id)
                self._fetch_file(meta, names[meta.file_name])
        if names:
            self._vfs.sync_dir(self._table_directory)
        return names

    def _fetch_file(self, meta: TableMeta, name: str) -> None:
        source, target = os.path.join(self._directory, meta.file_name), os.path.join(self._table_directory, name)
        if not self._vfs.exists(source):
            raise Corruption("A table of an export is missing", path=source, offset=0, expected="a file", got="no file")
        self._check_file(source, meta)
        self._placed.append(target)
        if place(self._vfs, source, target):
            self._vfs.sync_file(target)  # others wrote these bytes
        else:
            files = OpenFiles(self._vfs, 1)
            try:
                verify_file(files, target, meta)
            finally:
                files.close_all()

    def _check_file(self, path: str, meta: TableMeta) -> None:
        check_table(self._vfs, path, meta)


def _problem(tables: list[tuple[int, TableMeta]], last_seqno: int) -> str | None:
    """What of an export cannot be, or None."""
    if any(filenames.parse_table_name(meta.file_name) is None for _, meta in tables):
        return "a file name that is none of a table"
    if not all(0 <= level < LEVELS_MAX for level, _ in tables):
        return "a level that cannot be"
    if not 0 <= last_seqno <= SEQNO_MAX:
        return f"a seqno of {last_seqno}"
    try:
        changed_levels([], TablesEdit(0, tables, []))
    except ValueError as error:
        return str(error)
    return None


def _levels(tables: list[tuple[int, TableMeta]], names: dict[str, str]) -> list[list[TableMeta]]:
    """The tables level by level, under their names here."""
    levels: list[list[TableMeta]] = []
    for level, meta in tables:
        while len(levels) <= level:
            levels.append([])
        levels[level].append(msgspec.structs.replace(meta, file_name=names[meta.file_name]))
    return levels


def check_table(vfs: Vfs, path: str, meta: TableMeta) -> None:
    """Read every byte of a table. Raises `Corruption` with the place of the damage, as far as blocks can tell it."""
    files = OpenFiles(vfs, 1)
    try:
        verify_file(files, path, meta)
        Table.open(vfs, path, meta, None, files)
    except Corruption as error:
        raise _at_its_place(vfs, path, meta, error) from None
    finally:
        files.close_all()


def _at_its_place(vfs: Vfs, path: str, meta: TableMeta, error: Corruption) -> Corruption:
    from shardkv_node.engine.tools.damage import Damage
    from shardkv_node.engine.tools.walk_table import TableWalk

    try:
        found = next((step for step in TableWalk(vfs, path, meta).steps() if isinstance(step, Damage)), None)
    except StorageError:
        return error
    if found is None:
        return error
    return Corruption("Damage", path=path, offset=found.offset, expected="what was exported", got=found.problem)
