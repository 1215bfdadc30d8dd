"""`why_cut_off`: whether a manifest that reads well was cut off, by what the store must have beside it.

Nothing is deleted before the edit that makes it unneeded is on disk. So the state of a manifest that only lost edits
nothing acted on has all of its files, and with the log it has every row, whatever tables of unfinished jobs lie about.
Where a file of it is gone, later edits were there: bytes behind the last edit, or tables that no edit names, say so
too. A file that is gone without these is a file that was lost.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from shardkv_node.engine import filenames
from shardkv_node.engine.entries import WriteEntry
from shardkv_node.engine.log_format import MANIFEST_MAGIC
from shardkv_node.engine.log_reader import ENTRY_DECODER, TornTail
from shardkv_node.engine.manifest import Edit, ManifestState, TablesEdit
from shardkv_node.engine.recovery import missing_files
from shardkv_node.engine.tools.places import segment_numbers, table_names
from shardkv_node.engine.tools.walk_log import EDIT_DECODER, LogWalk, WalkedGroup
from shardkv_node.engine.vfs import Vfs


def why_cut_off(vfs: Vfs, store: str, number: int, state: ManifestState, torn: TornTail | None) -> str | None:
    """What shows that manifest `number`, which holds `state`, ends too early; None: nothing does."""
    missing = missing_files(vfs, store, state)
    if missing and (torn is not None or unnamed_tables(vfs, store, number)):
        return f"it asks for {os.path.relpath(missing[0], store)}, which later edits made unneeded"
    unknown = next((tablet for tablet in _log_tablets(vfs, store, state) if tablet >= state.next_tablet), None)
    return None if unknown is None else f"the log has writes of tablet {unknown}, which a later edit created"


def unnamed_tables(vfs: Vfs, store: str, number: int) -> list[str]:
    """Names of the tables on disk that no edit of manifest `number` names."""
    named: set[str] = set()
    for edits in edit_groups(vfs, store, number):
        for edit in edits:
            if isinstance(edit, TablesEdit):
                named.update(edit.removed, (meta.file_name for _, meta in edit.added))
    return [name for name in table_names(vfs, store) if name not in named]


def tablets_gone(vfs: Vfs, store: str, number: int) -> set[int]:
    """Tablets that were dropped before manifest `number` was begun, as its first group shows."""
    snapshot = ManifestState()
    snapshot.apply(next(edit_groups(vfs, store, number)))
    return set(range(1, snapshot.next_tablet)) - snapshot.tablets.keys()


def edit_groups(vfs: Vfs, store: str, number: int) -> Iterator[list[Edit]]:
    """The readable groups of edits of a manifest."""
    walk = LogWalk(vfs, filenames.manifest_path(store, number), decoder=EDIT_DECODER, magic=MANIFEST_MAGIC)
    for step in walk.steps():
        if isinstance(step, WalkedGroup):
            yield step.entries


def _log_tablets(vfs: Vfs, store: str, state: ManifestState) -> Iterator[int]:
    for number in segment_numbers(vfs, store):
        if number >= state.first_segment:
            for step in LogWalk(vfs, filenames.segment_path(store, number), decoder=ENTRY_DECODER).steps():
                for entry in step.entries if isinstance(step, WalkedGroup) else ():
                    if isinstance(entry, WriteEntry):
                        yield entry.tablet
