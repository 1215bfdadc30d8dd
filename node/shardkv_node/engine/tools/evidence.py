"""What is still known of a damaged store: its identity, its tablets, and which files hold their rows.

A manifest that can be read whole is believed, unless the files beside it show that it was cut off. From a damaged one
every readable edit is gathered: labels, drops, the tables that were replaced; then all other tables and log segments on
disk count, because nothing says which do not.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field

from shardkv.errors import Corruption, StorageError, StoreMismatch, UnsupportedFormat
from shardkv_node.engine import filenames
from shardkv_node.engine.entries import WriteEntry
from shardkv_node.engine.identity import read_identity
from shardkv_node.engine.log_format import MANIFEST_MAGIC
from shardkv_node.engine.log_reader import ENTRY_DECODER, TornTail
from shardkv_node.engine.manifest import (
    CreatedEdit,
    DroppedEdit,
    Edit,
    FlushedEdit,
    LabelEdit,
    ManifestState,
    NumbersEdit,
    Position,
    TablesEdit,
    TermEdit,
    manifest_numbers,
    read_current,
    read_manifest,
)
from shardkv_node.engine.recovery import missing_files
from shardkv_node.engine.table_meta import TableMeta
from shardkv_node.engine.tools.cut_manifest import edit_groups, tablets_gone, unnamed_tables, why_cut_off
from shardkv_node.engine.tools.damage import Damage, damage_of
from shardkv_node.engine.tools.places import segment_numbers, table_names
from shardkv_node.engine.tools.walk_log import EDIT_DECODER, LogWalk, WalkedGroup
from shardkv_node.engine.tools.walk_table import TableWalk
from shardkv_node.engine.vfs import Vfs


@dataclass(slots=True)
class TabletEvidence:
    """One tablet. `label` None: nothing says it any more."""

    label: bytes | None
    flushed_seqno: int = 0
    tables: list[tuple[str, TableMeta | None]] = field(default_factory=list)
    """(file name, what the manifest says of it), in no order that matters. A file stands here once for each clip."""
    records_of: int = 0
    """As in the manifest."""


_Known = dict[str, dict[int, list[TableMeta]]]
"""By file name and tablet, what the edits seen so far say of a file: its clips. No tablet: the file is not needed."""


@dataclass(slots=True)
class Evidence:
    """Made by `gather`."""

    store_id: bytes
    tablets: dict[int, TabletEvidence]
    dropped: set[int]
    segments: list[int]
    term: int
    next_file: int
    next_tablet: int
    manifest_whole: bool
    losses: list[Damage] = field(default_factory=list)
    closed: Position | None = None
    """Where the log ended when the store was closed."""
    notes: list[str] = field(default_factory=list)
    """What was left out and is no loss, in sentences."""


def gather(vfs: Vfs, store: str) -> Evidence:
    """Read what there is. Raises `UnsupportedFormat`, and `Corruption` when nothing says which store this is."""
    losses: list[Damage] = []
    store_id = _store_id(vfs, store, losses)
    whole = _whole_manifest(vfs, store, store_id, losses)
    if whole is None:
        return _from_pieces(vfs, store, store_id, losses, set())
    number, state, torn = whole
    why = why_cut_off(vfs, store, number, state, torn)
    if why is not None:
        path = filenames.manifest_path(store, number)
        offset = torn.offset if torn is not None else vfs.size(path)
        losses.append(Damage(path, offset, 0, f"the manifest ends too early: {why}", "the edits behind it"))
        return _from_pieces(vfs, store, store_id, losses, tablets_gone(vfs, store, number))
    missing = missing_files(vfs, store, state)
    gone = filenames.segment_path(store, state.first_segment)
    losses += [Damage(gone, 0, 0, "the log segment is missing", "the writes in it")] if gone in missing else []
    found = _from_state(vfs, store, store_id, state, losses)
    if torn is not None:
        found.notes.append(_torn_note(torn, unnamed_tables(vfs, store, number)))
    return found


def _from_state(vfs: Vfs, store: str, store_id: bytes, state: ManifestState, losses: list[Damage]) -> Evidence:
    return Evidence(
        store_id=store_id,
        tablets={
            number: TabletEvidence(
                tablet.label,
                tablet.flushed_seqno,
                [(meta.file_name, meta) for level in tablet.levels for meta in level],
                tablet.records_of,
            )
            for number, tablet in state.tablets.items()
        },
        dropped=set(range(1, state.next_tablet)) - state.tablets.keys(),
        segments=[number for number in segment_numbers(vfs, store) if number >= state.first_segment],
        term=state.term,
        next_file=state.next_file,
        next_tablet=state.next_tablet,
        manifest_whole=True,
        losses=losses,
        closed=state.closed,
    )


def _store_id(vfs: Vfs, store: str, losses: list[Damage]) -> bytes:
    path = filenames.identity_path(store)
    try:
        found = read_identity(vfs, store)
        if found is not None:
            return found
        losses.append(Damage(path, 0, 0, "the file is missing"))
    except UnsupportedFormat:
        raise
    except StorageError as error:
        losses.append(damage_of(error, path))
    seen: Counter[bytes] = Counter()
    for number in manifest_numbers(vfs, store):
        walk = LogWalk(vfs, filenames.manifest_path(store, number), decoder=EDIT_DECODER, magic=MANIFEST_MAGIC)
        walk.close()
        seen.update([walk.header.store_id] if walk.header is not None else [])
    for number in segment_numbers(vfs, store):
        segment = LogWalk(vfs, filenames.segment_path(store, number), decoder=ENTRY_DECODER)
        segment.close()
        seen.update([segment.header.store_id] if segment.header is not None else [])
    if not seen:
        raise Corruption("No store id anywhere", path=path, offset=0, expected="one in any file", got="none")
    return seen.most_common(1)[0][0]


def _whole_manifest(
    vfs: Vfs, store: str, store_id: bytes, losses: list[Damage]
) -> tuple[int, ManifestState, TornTail | None] | None:
    """Number, state and torn tail of the manifest in force."""
    path = filenames.current_path(store)
    try:
        number = read_current(vfs, store)
    except StorageError as error:
        losses.append(damage_of(error, path))
        numbers = manifest_numbers(vfs, store)
        if not numbers:
            return None
        number = numbers[-1]  # the newest: an older one is removed when the next is in force
    path = filenames.manifest_path(store, number)
    try:
        return number, *read_manifest(vfs, store, number, store_id)
    except UnsupportedFormat:
        raise
    except (Corruption, StoreMismatch) as error:
        losses.append(damage_of(error, path))
        return None


def _torn_note(torn: TornTail, unnamed: list[str]) -> str:
    note = (
        f"{torn.path} had a torn tail at offset {torn.offset}: {torn.bytes} bytes that nothing acted on yet, and that "
        "are dropped as an open would."
    )
    if unnamed:
        note += (
            f" {len(unnamed)} tables it does not name are left out: what they hold is in the log and in other tables, "
            "unless a tablet was being imported."
        )
    return note


def _from_pieces(vfs: Vfs, store: str, store_id: bytes, losses: list[Damage], dropped: set[int]) -> Evidence:
    found = Evidence(store_id, {}, dropped, segment_numbers(vfs, store), 0, 1, 1, manifest_whole=False, losses=losses)
    known: _Known = {}
    for number in manifest_numbers(vfs, store):
        for edits in edit_groups(vfs, store, number):
            for edit in edits:
                _note_edit(found, edit)
                _note_users(known, edit)
    for name in table_names(vfs, store):
        _note_table(vfs, store, found, name, known.get(name))
    _note_log_tablets(vfs, store, found)
    for missing in sorted({name for name, users in known.items() if users} - set(table_names(vfs, store))):
        losses.append(Damage(filenames.table_path(store, missing), 0, 0, "the table is missing"))
    found.next_tablet = max([found.next_tablet, *(number + 1 for number in found.tablets)])
    return found


def _note_edit(found: Evidence, edit: Edit) -> None:
    if isinstance(edit, CreatedEdit):
        tablet = _tablet(found, edit.tablet)
        tablet.label, tablet.records_of = edit.label, edit.records_of
    elif isinstance(edit, LabelEdit) and edit.tablet not in found.dropped:
        _tablet(found, edit.tablet).label = edit.label
    elif isinstance(edit, DroppedEdit):
        found.dropped.add(edit.tablet)
        found.tablets.pop(edit.tablet, None)
    elif isinstance(edit, FlushedEdit) and edit.tablet not in found.dropped:
        tablet = _tablet(found, edit.tablet)
        tablet.flushed_seqno = max(tablet.flushed_seqno, edit.seqno)
    elif isinstance(edit, TermEdit):
        found.term = max(found.term, edit.term)
    elif isinstance(edit, NumbersEdit):
        found.next_file = max(found.next_file, edit.next_file)
        found.next_tablet = max(found.next_tablet, edit.next_tablet)


def _note_users(known: _Known, edit: Edit) -> None:
    """Keep account of which tablets have which files."""
    if isinstance(edit, CreatedEdit | DroppedEdit):  # a created one may have its tables listed anew
        for users in known.values():
            users.pop(edit.tablet, None)
    elif isinstance(edit, TablesEdit):
        for name in edit.removed:
            known.setdefault(name, {}).pop(edit.tablet, None)
        for _, meta in edit.added:
            known.setdefault(meta.file_name, {}).setdefault(edit.tablet, []).append(meta)


def _note_table(vfs: Vfs, store: str, found: Evidence, name: str, users: dict[int, list[TableMeta]] | None) -> None:
    """`users`: what the edits say; None: they never name the file."""
    number, _ = filenames.parse_table_name(name) or (0, "")
    found.next_file = max(found.next_file, number + 1)
    if users is not None:
        for tablet, metas in users.items():
            if tablet not in found.dropped:
                _tablet(found, tablet).tables += [(name, meta) for meta in metas]
        return
    walk = TableWalk(vfs, filenames.table_path(store, name))
    walk.close()
    if walk.properties is not None:
        owner = walk.properties.tablet
    elif len(found.tablets) == 1:
        owner = next(iter(found.tablets))
    else:
        lost = "all its rows: nothing says which tablet they are of"
        found.losses.append(Damage(os.path.join(filenames.table_directory(store), name), 0, 0, "no owner", lost))
        return
    if owner not in found.dropped:
        _tablet(found, owner).tables.append((name, None))


def _note_log_tablets(vfs: Vfs, store: str, found: Evidence) -> None:
    """Tablets that only the log knows."""
    for number in found.segments:
        for step in LogWalk(vfs, filenames.segment_path(store, number), decoder=ENTRY_DECODER).steps():
            for entry in step.entries if isinstance(step, WalkedGroup) else ():
                if isinstance(entry, WriteEntry) and entry.tablet not in found.dropped:
                    _tablet(found, entry.tablet)


def _tablet(found: Evidence, number: int) -> TabletEvidence:
    return found.tablets.setdefault(number, TabletEvidence(None))
