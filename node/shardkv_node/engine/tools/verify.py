"""`verify_store`, `verify_file`: every checksum of every file, and everything that opening the store would check.

Nothing is changed. Each file is checked as the engine reads it; only where that fails it is walked, to name every
place. Unlike opening, this goes on behind the first problem.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from shardkv.errors import Corruption, InvalidArgument, StorageError, StoreMismatch, UnsupportedFormat
from shardkv_node.engine import filenames
from shardkv_node.engine.identity import read_identity
from shardkv_node.engine.log_format import MANIFEST_MAGIC
from shardkv_node.engine.log_reader import ENTRY_DECODER, FileHeader, TornTail
from shardkv_node.engine.manifest import ManifestState, read_current, read_manifest
from shardkv_node.engine.recovery import RecoveryReport, Replay
from shardkv_node.engine.table_meta import TableMeta
from shardkv_node.engine.table_reader import Table
from shardkv_node.engine.tools.cut_manifest import why_cut_off
from shardkv_node.engine.tools.damage import Damage, damage_of
from shardkv_node.engine.tools.places import Kind, segment_numbers, table_names
from shardkv_node.engine.tools.walk_log import EDIT_DECODER, LogWalk
from shardkv_node.engine.tools.walk_table import TableWalk
from shardkv_node.engine.vfs import Vfs

T = TypeVar("T")

Progress = Callable[[int], None]
"""Called with the bytes read since the last call."""


@dataclass(slots=True)
class VerifyReport:
    """`problems` is empty when every byte that the store needs is as it was written."""

    files: int = 0
    bytes: int = 0
    problems: list[Damage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Harmless: torn tails, files that nothing refers to."""


def verify_store(vfs: Vfs, store: str, progress: Progress = lambda size: None) -> VerifyReport:
    """Check the whole store. Requires: no process has it open. Raises `UnsupportedFormat`, `StorageError`."""
    return _StoreCheck(vfs, store, progress).run()


def verify_file(vfs: Vfs, kind: Kind, path: str) -> VerifyReport:
    """Check one file by itself: what only the manifest knows (its whole-file checksum) is not looked at."""
    report = VerifyReport(files=1, bytes=vfs.size(path))
    if kind is Kind.TABLE:
        report.problems += table_damages(vfs, path, None)
    elif kind is Kind.SEGMENT:
        _walk_log(report, LogWalk(vfs, path, decoder=ENTRY_DECODER))
    elif kind is Kind.MANIFEST:
        _walk_log(report, LogWalk(vfs, path, decoder=EDIT_DECODER, magic=MANIFEST_MAGIC))
    elif kind is Kind.CURRENT:
        _try(report, path, lambda: read_current(vfs, os.path.dirname(path) or "."))
    elif kind is Kind.IDENTITY:
        _try(report, path, lambda: read_identity(vfs, os.path.dirname(path) or "."))
    else:
        raise InvalidArgument(f"{path} is not a file.")
    return report


def table_damages(vfs: Vfs, path: str, meta: TableMeta | None) -> list[Damage]:
    """Everything wrong with a table; `meta`: what the manifest says of it. Raises `UnsupportedFormat`."""
    whole: StorageError | None = None
    if meta is not None:
        try:
            Table.open(vfs, path, meta, None).verify()
            return []
        except StorageError as error:
            whole = error
    try:
        found = [step for step in TableWalk(vfs, path, meta).steps() if isinstance(step, Damage)]
    except UnsupportedFormat:
        raise
    except StorageError as error:
        return [damage_of(error, path)]
    if not found and whole is not None:
        found.append(damage_of(whole, path))
    return found


class _StoreCheck:
    def __init__(self, vfs: Vfs, store: str, progress: Progress) -> None:
        self._vfs = vfs
        self._store = store
        self._progress = progress
        self._report = VerifyReport()
        self._cut_off = False

    def run(self) -> VerifyReport:
        report, vfs, store = self._report, self._vfs, self._store
        store_id = self._check_small(filenames.identity_path(store), lambda: read_identity(vfs, store))
        number = self._check_small(filenames.current_path(store), lambda: read_current(vfs, store))
        state = None if number is None else self._check_manifest(number, store_id)
        log_intact = self._check_log(state)
        self._check_tables(state)
        if state is not None and log_intact:
            replay = Replay(vfs, store, state, RecoveryReport())
            _try(report, filenames.wal_directory(store), replay.run)
        return report

    def _count(self, path: str) -> None:
        size = self._vfs.size(path) if self._vfs.exists(path) else 0
        self._report.files += 1
        self._report.bytes += size
        self._progress(size)

    def _check_small(self, path: str, read: Callable[[], T]) -> T | None:
        if not self._vfs.exists(path):
            self._report.problems.append(Damage(path, 0, 0, "the file is missing"))
            return None
        self._count(path)
        return _try(self._report, path, read)

    def _check_manifest(self, number: int, store_id: bytes | None) -> ManifestState | None:
        path = filenames.manifest_path(self._store, number)
        if not self._vfs.exists(path):
            self._report.problems.append(Damage(path, 0, 0, "the manifest in force is missing"))
            return None
        self._count(path)
        before = len(self._report.problems)
        header = _walk_log(self._report, LogWalk(self._vfs, path, decoder=EDIT_DECODER, magic=MANIFEST_MAGIC))
        if len(self._report.problems) > before or header is None:
            return None
        found = _try(
            self._report, path, lambda: read_manifest(self._vfs, self._store, number, store_id or header.store_id)
        )
        if found is None:
            return None
        state, torn = found
        why = why_cut_off(self._vfs, self._store, number, state, torn)
        if why is not None:
            self._cut_off = True
            offset = torn.offset if torn is not None else self._vfs.size(path)
            self._report.problems.append(Damage(path, offset, 0, f"the manifest ends too early: {why}"))
        return state

    def _check_log(self, state: ManifestState | None) -> bool:
        """Check the segments that are needed, or all when that is not known. True when nothing is wrong."""
        vfs, store, report = self._vfs, self._store, self._report
        first = 1 if state is None else state.first_segment
        numbers = [number for number in segment_numbers(vfs, store) if number >= first]
        before = len(report.problems)
        needed = range(first, numbers[-1] + 1) if numbers else range(first, first + 1)
        if state is not None and state.term > 0:
            missing = sorted(set(needed) - set(numbers))
            report.problems += [
                Damage(filenames.segment_path(store, n), 0, 0, "the log segment is missing") for n in missing
            ]
        ends = self._ends(numbers)
        if state is not None and state.closed is not None:
            ends.setdefault(*state.closed)
        for number in numbers:
            path = filenames.segment_path(store, number)
            self._count(path)
            _walk_log(report, LogWalk(vfs, path, decoder=ENTRY_DECODER, end=ends.get(number)))
        return len(report.problems) == before

    def _ends(self, numbers: list[int]) -> dict[int, int]:
        """For each segment but the last, where its successor says it ends."""
        ends = {}
        for number in numbers[1:]:
            path = filenames.segment_path(self._store, number)
            walk = LogWalk(self._vfs, path, decoder=ENTRY_DECODER)
            if walk.header is not None and walk.header.previous_number == number - 1:
                ends[number - 1] = walk.header.previous_end
            walk.close()
        return ends

    def _check_tables(self, state: ManifestState | None) -> None:
        present = set(table_names(self._vfs, self._store))
        metas: dict[str, TableMeta | None] = dict.fromkeys(sorted(present))
        if state is not None:
            metas = {m.file_name: m for tablet in state.tablets.values() for level in tablet.levels for m in level}
            orphans = sorted(present - metas.keys())
            if orphans:
                fate = "for `repair` to use" if self._cut_off else "which the next open removes"
                self._report.notes.append(
                    f"{len(orphans)} tables that nothing refers to, {fate}: {', '.join(orphans[:5])}"
                )
        for name, meta in metas.items():
            path = filenames.table_path(self._store, name)
            if name not in present:
                self._report.problems.append(Damage(path, 0, 0, "the table is missing"))
                continue
            self._count(path)
            self._report.problems += table_damages(self._vfs, path, meta)


def _walk_log(report: VerifyReport, walk: LogWalk[Any]) -> FileHeader | None:
    for step in walk.steps():
        if isinstance(step, Damage):
            report.problems.append(step)
        elif isinstance(step, TornTail):
            report.notes.append(
                f"{step.path} at offset {step.offset}: a torn tail of {step.bytes} bytes, never known to be on disk; "
                "the next open drops it."
            )
    return walk.header


def _try(report: VerifyReport, path: str, read: Callable[[], T]) -> T | None:
    try:
        return read()
    except (Corruption, StoreMismatch) as error:
        report.problems.append(damage_of(error, path))
        return None
