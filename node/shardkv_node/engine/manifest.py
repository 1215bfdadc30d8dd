"""The manifest: which tables, tablets and watermarks make up the store. Framed and checked like the log.

A manifest is a sequence of edits; applying them in order to an empty `ManifestState` gives the store's shape.

    1 store      store_id[16]                 first edit of every manifest
    2 created    tablet, label, position, records_of
                                              position = (segment, offset) of the log when it happened; records_of: the
                                              tablet whose records of tokens it holds, 0: it holds rows of users
    3 dropped    tablet, position             its entries in the log are void from the first to the last
    4 tables     tablet, added, removed       added = [(level, TableMeta)...], removed = [file name...]
    5 flushed    tablet, seqno                every write up to seqno is in tables
    6 term       term                         rises at every open, before the store serves
    7 numbers    next_file, next_tablet       never given out below these
    8 segment    number                       the first log segment that is still needed
    9 closed     position                     closed in order, the log on disk up to here: the last edit of all
   10 label      tablet, label                the tablet has another label from now on

Removing a table and adding it again in one edit changes its clip (`TableMeta.start`, `stop`), or moves it to another
level. Tablets may share a table, each through a clip of its own: a file is in use while any of them names it. A split
is one group: both halves created, with their tables and the watermark of the whole, and the whole dropped.

Types are on disk: never renumber; fields are added at the end with a default.

Invariants:
  - an edit is synced before anything acts on it: inputs are deleted after their removal is durable, never before;
  - one group of edits is applied whole or, as a torn tail, not at all;
  - CURRENT names a manifest that is complete and synced; every open, and a manifest grown large, starts a new one.
After a failed append the owner must write and delete nothing more.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import google_crc32c
import msgspec

from shardkv.errors import Corruption
from shardkv_node.engine import filenames
from shardkv_node.engine.log_format import MANIFEST_MAGIC
from shardkv_node.engine.log_reader import SegmentReader, TornTail, check_identity
from shardkv_node.engine.log_writer import LogWriter
from shardkv_node.engine.table_meta import TableMeta
from shardkv_node.engine.vfs import Vfs

Position = tuple[int, int]
"""(segment number, offset) in the log."""

LEVELS_MAX = 8
"""A level at or past this in a manifest is damage."""


class StoreEdit(msgspec.Struct, array_like=True, tag=1):
    store_id: bytes


class CreatedEdit(msgspec.Struct, array_like=True, tag=2):
    tablet: int
    label: bytes
    position: Position
    records_of: int = 0


class DroppedEdit(msgspec.Struct, array_like=True, tag=3):
    tablet: int
    position: Position


class TablesEdit(msgspec.Struct, array_like=True, tag=4):
    tablet: int
    added: list[tuple[int, TableMeta]]
    removed: list[str]


class FlushedEdit(msgspec.Struct, array_like=True, tag=5):
    tablet: int
    seqno: int


class TermEdit(msgspec.Struct, array_like=True, tag=6):
    term: int


class NumbersEdit(msgspec.Struct, array_like=True, tag=7):
    next_file: int
    next_tablet: int


class SegmentEdit(msgspec.Struct, array_like=True, tag=8):
    number: int


class ClosedEdit(msgspec.Struct, array_like=True, tag=9):
    position: Position


class LabelEdit(msgspec.Struct, array_like=True, tag=10):
    tablet: int
    label: bytes


Edit = (
    StoreEdit
    | CreatedEdit
    | DroppedEdit
    | TablesEdit
    | FlushedEdit
    | TermEdit
    | NumbersEdit
    | SegmentEdit
    | ClosedEdit
    | LabelEdit
)

_DECODER: msgspec.msgpack.Decoder[list[Edit]] = msgspec.msgpack.Decoder(list[Edit])
_encode = msgspec.msgpack.Encoder().encode


@dataclass(slots=True)
class TabletState:
    """What the manifest knows of one tablet. In `levels`, level 0 is oldest first, the others are in key order."""

    label: bytes
    created: Position
    flushed_seqno: int = 0
    levels: list[list[TableMeta]] = field(default_factory=lambda: [[]])
    records_of: int = 0


@dataclass(slots=True)
class ManifestState:
    """The store's shape after some edits."""

    store_id: bytes = b""
    tablets: dict[int, TabletState] = field(default_factory=dict)
    term: int = 0
    next_file: int = 1
    next_tablet: int = 1
    first_segment: int = 1
    closed: Position | None = None
    """Where the log ended when the store was closed; None: it was not, or is open."""

    def apply(self, edits: Sequence[Edit]) -> None:
        """Apply in order. Raises `ValueError` with what is wrong for an edit that contradicts the state."""
        for edit in edits:
            self._apply_one(edit)

    def _apply_one(self, edit: Edit) -> None:
        if isinstance(edit, TablesEdit):
            self._change_tables(edit)
        elif isinstance(edit, FlushedEdit):
            self._tablet(edit.tablet).flushed_seqno = edit.seqno
        elif isinstance(edit, SegmentEdit):
            self.first_segment = edit.number
        elif isinstance(edit, NumbersEdit):
            self.next_file, self.next_tablet = edit.next_file, edit.next_tablet
        elif isinstance(edit, CreatedEdit):
            if edit.tablet in self.tablets:
                raise ValueError(f"tablet {edit.tablet} is created twice")
            self.tablets[edit.tablet] = TabletState(edit.label, edit.position, records_of=edit.records_of)
            self.next_tablet = max(self.next_tablet, edit.tablet + 1)
        elif isinstance(edit, DroppedEdit):
            self._tablet(edit.tablet)
            del self.tablets[edit.tablet]
        elif isinstance(edit, TermEdit):
            self.term = edit.term
        elif isinstance(edit, LabelEdit):
            self._tablet(edit.tablet).label = edit.label
        elif isinstance(edit, ClosedEdit):
            self.closed = edit.position
        else:
            self.store_id = edit.store_id

    def check(self, edits: Sequence[Edit]) -> None:
        """Raise `ValueError` for a change of tables that this state could not take. Nothing is changed."""
        created: set[int] = set()
        for edit in edits:
            if isinstance(edit, CreatedEdit):
                created.add(edit.tablet)
            elif isinstance(edit, TablesEdit):
                changed_levels([] if edit.tablet in created else self._tablet(edit.tablet).levels, edit)

    def _tablet(self, tablet: int) -> TabletState:
        found = self.tablets.get(tablet)
        if found is None:
            raise ValueError(f"tablet {tablet} does not exist")
        return found

    def _change_tables(self, edit: TablesEdit) -> None:
        tablet = self._tablet(edit.tablet)
        tablet.levels = changed_levels(tablet.levels, edit)

    def snapshot(self) -> list[Edit]:
        """Edits that build this state from nothing."""
        edits: list[Edit] = [
            StoreEdit(self.store_id),
            TermEdit(self.term),
            SegmentEdit(self.first_segment),
        ]
        for number, tablet in self.tablets.items():
            added = [(level, meta) for level, metas in enumerate(tablet.levels) for meta in metas]
            edits.append(CreatedEdit(number, tablet.label, tablet.created, tablet.records_of))
            edits.append(FlushedEdit(number, tablet.flushed_seqno))
            edits.append(TablesEdit(number, added, []))
        edits.append(NumbersEdit(self.next_file, self.next_tablet))
        return edits

    def table_names(self) -> set[str]:
        """File names of all tables in force."""
        return {meta.file_name for tablet in self.tablets.values() for level in tablet.levels for meta in level}


def changed_levels(levels: Sequence[Sequence[TableMeta]], edit: TablesEdit) -> list[list[TableMeta]]:
    """The levels after the edit. Raises `ValueError` when they would contradict themselves."""
    removed = set(edit.removed)
    missing = removed - {meta.file_name for level in levels for meta in level}
    if missing:
        raise ValueError(f"table {min(missing)} is removed and was never added")
    pieces = [(level, meta) for level, meta in edit.added if meta.file_name in removed]
    after = [
        [meta for old in metas for meta in _kept(old, level, removed, pieces)] for level, metas in enumerate(levels)
    ]
    for level, meta in [*pieces, *((level, meta) for level, meta in edit.added if meta.file_name not in removed)]:
        if not 0 <= level < LEVELS_MAX:
            raise ValueError(f"table {meta.file_name} is added to level {level}")
        while len(after) <= level:
            after.append([])
        after[level].append(meta)
    for number, metas in enumerate(after[1:], 1):
        metas.sort(key=lambda meta: meta.low)
        for left, right in pairwise(metas):
            if left.high > right.low:
                raise ValueError(f"tables {left.file_name} and {right.file_name} overlap on level {number}")
    return after


def _kept(meta: TableMeta, level: int, removed: set[str], pieces: list[tuple[int, TableMeta]]) -> list[TableMeta]:
    """What stands in the place of `meta` after an edit; takes it out of `pieces`.

    A table that is removed and added again at its level with other clips keeps its place: on level 0 place is age.
    """
    if meta.file_name not in removed:
        return [meta]
    stays = [piece for piece in pieces if piece[0] == level and piece[1].file_name == meta.file_name]
    for piece in stays:
        pieces.remove(piece)
    return [piece for _level, piece in stays]


class ManifestWriter:
    """The manifest in force, open for appending."""

    def __init__(self, vfs: Vfs, store: str, number: int, writer: LogWriter) -> None:
        self._vfs = vfs
        self._store = store
        self._writer = writer
        self.number = number

    @classmethod
    def start(cls, vfs: Vfs, store: str, number: int, state: ManifestState, hlc: int) -> ManifestWriter:
        """Write manifest `number` that holds `state`, and make it the one in force. All durable on return."""
        writer = LogWriter.create(
            vfs,
            filenames.manifest_path(store, number),
            store_id=state.store_id,
            number=number,
            magic=MANIFEST_MAGIC,
            payloads=[_encode(state.snapshot())],
            hlc=hlc,
        )
        try:
            vfs.write_atomic(filenames.current_path(store), current_text(number))
        except BaseException:
            writer.close()
            raise
        return cls(vfs, store, number, writer)

    @property
    def bytes(self) -> int:
        return self._writer.offset

    def append(self, edits: Sequence[Edit], hlc: int) -> None:
        """Make the edits durable as one group, then cover them with a sync mark."""
        end = self._writer.append(edits, hlc)
        self._writer.sync()
        self._writer.note_synced(end)
        self._writer.mark(hlc)

    def close(self) -> None:
        self._writer.close()


def current_text(number: int) -> bytes:
    """What CURRENT holds: `<manifest name> <crc32c of the name in hex>`, one line."""
    name = filenames.manifest_name(number).encode()
    return b"%s %08x\n" % (name, google_crc32c.value(name))


def read_current(vfs: Vfs, store: str) -> int:
    """Number of the manifest in force. Raises `Corruption`."""
    path = filenames.current_path(store)
    text = vfs.read_all(path)
    number = filenames.parse_manifest_name(text.partition(b" ")[0].decode("ascii", "replace"))
    if number is None or text != current_text(number):
        raise Corruption(
            "Damaged pointer", path=path, offset=0, expected="a manifest's name and checksum", got=text[:64]
        )
    return number


def read_manifest(vfs: Vfs, store: str, number: int, store_id: bytes) -> tuple[ManifestState, TornTail | None]:
    """The state the manifest holds, and its torn tail if it has one. Raises `Corruption`."""
    path = filenames.manifest_path(store, number)
    if not vfs.exists(path):
        raise Corruption("No manifest where CURRENT says", path=path, offset=0, expected="a manifest", got="no file")
    reader: SegmentReader[Edit] = SegmentReader(vfs, path, decoder=_DECODER, magic=MANIFEST_MAGIC)
    state = ManifestState()
    try:
        check_identity(reader.header, path, store_id, number)
        for group in reader.groups():
            try:
                state.apply(reader.decode(group))
            except ValueError as error:
                raise Corruption(
                    "A manifest contradicts itself",
                    path=path,
                    offset=group.offset,
                    expected="edits that fit",
                    got=error,
                ) from error
    finally:
        reader.close()
    if state.store_id != store_id:
        got = state.store_id.hex() or "nothing"
        raise Corruption("A manifest without its state", path=path, offset=0, expected=store_id.hex(), got=got)
    return state, reader.torn_tail


def manifest_numbers(vfs: Vfs, store: str) -> list[int]:
    """Numbers of all manifests in the directory, ascending."""
    found = (filenames.parse_manifest_name(os.path.basename(name)) for name in vfs.list(store))
    return sorted(number for number in found if number is not None)
