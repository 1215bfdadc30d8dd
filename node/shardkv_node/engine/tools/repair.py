"""`repair_store`: makes a new, consistent store out of what can be read of a damaged one.

The damaged store is only read. The new one is written beside it: of each key the row with the highest version that
could be read, by tablet, without the deletes that nothing needs any more. Versions decide, not the places of files,
so it does not matter which levels tables stood on. The new store keeps id, tablets and labels; its term is past every
one seen, so that no version is ever given out twice.

What cannot be read is named with its place. Where a newer row or a delete is lost, an older row of that key may be
seen again: that is said too, since no tool can know it.

Invariant: IDENTITY is the last file the new store gets; a directory without it is no store, whatever a crash left.
"""

from __future__ import annotations

import os
import secrets
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from shardkv.errors import DiskFull, InvalidArgument, StorageError, UnsupportedFormat
from shardkv_node.engine import filenames
from shardkv_node.engine.block import CODEC_ZSTD
from shardkv_node.engine.columns import SEQNO_BITS, SEQNO_MAX, Columns, concat, expand_u64, make_version
from shardkv_node.engine.entries import WriteEntry
from shardkv_node.engine.identity import identity_text, make_directories, make_store_directory
from shardkv_node.engine.job import TableOptions
from shardkv_node.engine.log_format import HEADER_BYTES, NO_SEGMENT
from shardkv_node.engine.log_reader import ENTRY_DECODER, TornTail
from shardkv_node.engine.log_writer import LogWriter
from shardkv_node.engine.manifest import ManifestState, ManifestWriter, TabletState
from shardkv_node.engine.memtable import Memtable
from shardkv_node.engine.merge import merge_rounds, take, without_tombstones
from shardkv_node.engine.source import Source
from shardkv_node.engine.table_meta import TableMeta
from shardkv_node.engine.table_output import TableOutput
from shardkv_node.engine.tools.damage import Damage, damage_of
from shardkv_node.engine.tools.evidence import Evidence, TabletEvidence, gather
from shardkv_node.engine.tools.places import NODE_FILE
from shardkv_node.engine.tools.verify import Progress, verify_store
from shardkv_node.engine.tools.walk_log import LogWalk
from shardkv_node.engine.tools.walk_table import TableWalk
from shardkv_node.engine.vfs import Vfs

_GATHER_BYTES = 256 * 1024
_EMBEDDED_LABEL = b"default"


@dataclass(slots=True)
class RepairReport:
    """What was saved, and what was not."""

    target: str
    rows: dict[int, int] = field(default_factory=dict)
    """Live rows saved, by tablet."""
    losses: list[Damage] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    """What follows from the losses, in sentences."""


def repair_store(
    vfs: Vfs,
    store: str,
    target: str,
    *,
    labels: Mapping[int, bytes] | None = None,
    progress: Progress = lambda size: None,
) -> RepairReport:
    """Write a consistent store to `target`, a directory that is not there yet. Requires: nobody has `store` open.

    `labels`: for tablets whose own label is lost. Raises `InvalidArgument` when a label is needed, `DiskFull`,
    `UnsupportedFormat`, `Corruption` when nothing says which store this is.
    """
    if vfs.exists(target):
        raise InvalidArgument(f"{target} exists already.", hint="Name a directory that is not there yet.")
    evidence = gather(vfs, store)
    report = RepairReport(target, losses=evidence.losses)
    _give_labels(evidence, labels or {}, report, embedded=not _is_nodes(vfs, store))
    _require_space(vfs, store, target, evidence)
    make_store_directory(vfs, target)
    make_directories(vfs, target)
    _Repair(vfs, store, evidence, report, progress).write()
    _warn(evidence, report)
    found = verify_store(vfs, target)
    if found.problems:
        raise StorageError(
            f"The repaired store at {target} does not verify: {found.problems[0]}",
            hint="The disk it was written to is failing too; repair to another one.",
        )
    return report


class SalvagedTable:
    """A table as a `Source`, for one forward pass: its readable blocks, through the clip of `meta`.

    Damage goes to `losses`, once however many tablets share the file.
    """

    def __init__(self, vfs: Vfs, path: str, meta: TableMeta | None, losses: list[Damage], progress: Progress) -> None:
        self._vfs = vfs
        self._meta = meta
        self._path = path
        self._losses = losses
        self._progress = progress

    def chunks(self, start: bytes, stop: bytes | None, *, reverse: bool) -> Iterator[Columns]:
        """Requires: the whole range, forward."""
        try:
            for step in TableWalk(self._vfs, self._path, self._meta).steps():
                if isinstance(step, Damage):
                    self._note(step)
                else:
                    self._progress(step.size)
                    yield self._clipped(step.columns)
        except UnsupportedFormat:
            raise
        except StorageError as error:
            self._note(damage_of(error, self._path, lost="all its rows"))

    def _clipped(self, rows: Columns) -> Columns:
        if self._meta is None or not self._meta.clipped:
            return rows
        return rows.slice(bisect_left(rows.keys, self._meta.start), bisect_left(rows.keys, self._meta.high))

    def _note(self, damage: Damage) -> None:
        if damage not in self._losses:
            self._losses.append(damage)


def newest_by_version(parts: Sequence[Columns]) -> Columns:
    """One row per key of all parts: the one with the highest version."""
    if len(parts) == 1:
        return parts[0]
    whole = concat(parts)
    versions = expand_u64(whole.versions, len(whole))
    by_version = sorted(range(len(whole)), key=versions.__getitem__)
    newest = {whole.keys[row]: row for row in by_version}
    ordered = sorted(newest)
    return take(whole, list(map(newest.__getitem__, ordered)), ordered)


class _Repair:
    def __init__(self, vfs: Vfs, store: str, evidence: Evidence, report: RepairReport, progress: Progress) -> None:
        self._vfs = vfs
        self._store = store
        self._evidence = evidence
        self._report = report
        self._progress = progress
        self._memtables: dict[int, Memtable] = {}
        self._seqnos = {number: tablet.flushed_seqno for number, tablet in evidence.tablets.items()}
        self._term = evidence.term

    def write(self) -> None:
        self._read_log()
        output = TableOutput(
            self._vfs,
            filenames.table_directory(self._report.target),
            job_id=secrets.token_hex(4),
            file_number=self._evidence.next_file,
            options=TableOptions(codec=CODEC_ZSTD),
        )
        for number, tablet in sorted(self._evidence.tablets.items()):
            self._write_tablet(output, number, tablet)
        self._finish(output.finish().tables)

    def _write_tablet(self, output: TableOutput, number: int, tablet: TabletEvidence) -> None:
        sources: list[Source] = []
        for name, meta in tablet.tables:
            path = filenames.table_path(self._store, name)
            if not self._vfs.exists(path):
                lost = "all its rows" if meta is None else f"all its {meta.count} rows"
                damage = Damage(path, 0, 0, "the table is missing", lost)
                self._report.losses += [] if damage in self._report.losses else [damage]
                continue
            self._note_version(number, 0 if meta is None else meta.max_version)
            sources.append(SalvagedTable(self._vfs, path, meta, self._report.losses, self._progress))
        if number in self._memtables:
            sources.append(self._memtables[number])
        rows = 0
        for parts in merge_rounds(sources, b"", None, reverse=False, gather_bytes=_GATHER_BYTES):
            for part in parts:
                self._note_version(number, max(expand_u64(part.versions, len(part))))
            live = without_tombstones(newest_by_version(parts))
            rows += len(live)
            if live.keys:
                output.add(number, live)
        output.end_tablet()
        self._report.rows[number] = rows

    def _note_version(self, number: int, version: int) -> None:
        self._seqnos[number] = max(self._seqnos[number], version & SEQNO_MAX)
        self._term = max(self._term, version >> SEQNO_BITS)

    def _read_log(self) -> None:
        """Rows of the log that are not known to be in tables, into memory: as much as an open takes."""
        numbers, closed = self._evidence.segments, self._evidence.closed
        losses = self._report.losses
        for missing in sorted(set(range(numbers[0], numbers[-1] + 1)) - set(numbers)) if numbers else ():
            losses.append(Damage(filenames.segment_path(self._store, missing), 0, 0, "the log segment is missing"))
        walks = [LogWalk(self._vfs, filenames.segment_path(self._store, n), decoder=ENTRY_DECODER) for n in numbers]
        for index, walk in enumerate(walks):
            walk.close()
            successor = walks[index + 1].header if index + 1 < len(walks) else None
            follows = successor is not None and successor.previous_number == numbers[index]
            end = successor.previous_end if successor is not None and follows else None
            if successor is None and closed is not None and closed[0] == numbers[index]:
                end = closed[1]
            again = LogWalk(self._vfs, walk.path, decoder=ENTRY_DECODER, end=end)
            for step in again.steps():
                if isinstance(step, Damage):
                    losses.append(Damage(step.path, step.offset, step.bytes, step.problem, "the writes in it"))
                elif isinstance(step, TornTail):
                    self._report.warnings.append(
                        f"{step.path} had a torn tail at offset {step.offset}: {step.bytes} bytes that were never "
                        "known to be on disk, and are dropped as an open would."
                    )
                else:
                    self._progress(step.end - step.offset)
                    for entry in step.entries:
                        self._take(entry)

    def _take(self, entry: object) -> None:
        if not isinstance(entry, WriteEntry) or entry.tablet in self._evidence.dropped:
            return
        tablet = self._evidence.tablets.get(entry.tablet)
        if tablet is None or (self._evidence.manifest_whole and entry.seqno <= tablet.flushed_seqno):
            return
        version = make_version(entry.term, entry.seqno)
        self._note_version(entry.tablet, version)
        memtable = self._memtables.setdefault(entry.tablet, Memtable())
        memtable.apply(entry.keys, entry.kinds, version, entry.values, entry.expiries)

    def _finish(self, tables: Mapping[int, list[TableMeta]]) -> None:
        """Log, manifest, and at the very last the identity."""
        evidence, target = self._evidence, self._report.target
        segment = max([*evidence.segments, 0]) + 1
        previous = (segment - 1, HEADER_BYTES) if segment > 1 else (NO_SEGMENT, 0)
        path = filenames.segment_path(target, segment)
        LogWriter.create(self._vfs, path, store_id=evidence.store_id, number=segment, previous=previous).close()
        names = [filenames.parse_table_name(meta.file_name) for metas in tables.values() for meta in metas]
        state = ManifestState(
            store_id=evidence.store_id,
            tablets={
                number: TabletState(
                    tablet.label or b"",
                    (segment, HEADER_BYTES),
                    self._seqnos[number],
                    [[], tables.get(number, [])],
                    tablet.records_of,
                )
                for number, tablet in sorted(evidence.tablets.items())
            },
            term=self._term,
            next_file=max([evidence.next_file, *(name[0] + 1 for name in names if name is not None)]),
            next_tablet=evidence.next_tablet,
            first_segment=segment,
        )
        ManifestWriter.start(self._vfs, target, 1, state, 0).close()
        self._vfs.write_atomic(filenames.identity_path(target), identity_text(evidence.store_id))


def _is_nodes(vfs: Vfs, store: str) -> bool:
    return vfs.exists(os.path.join(os.path.dirname(os.path.abspath(store)), NODE_FILE))


def _give_labels(evidence: Evidence, labels: Mapping[int, bytes], report: RepairReport, *, embedded: bool) -> None:
    """Raises `InvalidArgument` for a tablet that needs a label and has none."""
    nameless = sorted(number for number, tablet in evidence.tablets.items() if tablet.label is None)
    for number in nameless:
        if number in labels:
            evidence.tablets[number].label = labels[number]
        elif embedded and len(evidence.tablets) == 1:
            evidence.tablets[number].label = _EMBEDDED_LABEL
            report.warnings.append(f"The label of tablet {number} is lost; it got that of an embedded store, default.")
        else:
            raise InvalidArgument(
                f"The labels of the tablets {', '.join(map(str, nameless))} are lost, with the manifest.",
                hint="Say which they are with --label TABLET=LABEL; for a node a label is the number of a shard.",
            )


def _require_space(vfs: Vfs, store: str, target: str, evidence: Evidence) -> None:
    names = [name for tablet in evidence.tablets.values() for name, _ in tablet.tables]
    paths = [filenames.table_path(store, name) for name in names]
    paths += [filenames.segment_path(store, number) for number in evidence.segments]
    needed = sum(vfs.size(path) for path in paths if vfs.exists(path))
    above = os.path.dirname(os.path.abspath(target))
    while not vfs.exists(above):
        above = os.path.dirname(above)
    free = vfs.free_bytes(above)
    if free < needed:
        raise DiskFull(
            f"The repaired store may need {needed} bytes, and {above} has {free} free.",
            hint="Free space, or name a place on another disk with --to.",
        )


def _warn(evidence: Evidence, report: RepairReport) -> None:
    report.warnings += evidence.notes
    if any(loss.lost or "missing" in loss.problem for loss in report.losses):
        report.warnings.append(
            "Where a lost row was newer than one that was saved, the older one, or a key that was deleted, may be "
            "seen again."
        )
    if not evidence.manifest_whole:
        report.warnings.append(
            "The manifest was damaged, so every table on disk was used: rows deleted since may be back."
        )


def put_in_place(vfs: Vfs, store: str, repaired: str) -> str:
    """Move the damaged store aside and the repaired one to its place; returns where the damaged one is now."""
    kept = f"{store}.damaged"
    number = 1
    while vfs.exists(kept):
        number += 1
        kept = f"{store}.damaged-{number}"
    vfs.rename(store, kept)
    vfs.rename(repaired, store)
    for directory in {os.path.dirname(os.path.abspath(path)) for path in (store, repaired)}:
        vfs.sync_dir(directory)
    return kept
