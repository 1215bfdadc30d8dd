"""`StoreTablets`: what a `Store` does with whole tablets: make, drop, measure, fence, split, merge, export and import.

Invariants:
  - a tablet's number is never given out again, also not after a crash;
  - each change is one group of manifest edits: it has happened, durably, when the call returns, or not at all.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence

import msgspec

from shardkv.errors import InvalidArgument, ShardUnavailable, StorageError
from shardkv.topology.documents import HASH_TOKENS
from shardkv_node.engine import filenames
from shardkv_node.engine.columns import TERM_MAX
from shardkv_node.engine.health import Health
from shardkv_node.engine.log_writer import LogWriter
from shardkv_node.engine.maintenance import Maintenance
from shardkv_node.engine.manifest import Edit, ManifestState, NumbersEdit, Position, TermEdit
from shardkv_node.engine.memtable import Memtable
from shardkv_node.engine.options import Options
from shardkv_node.engine.reads import Reads
from shardkv_node.engine.rewriting import Levels, Rewriting
from shardkv_node.engine.table_meta import TableMeta
from shardkv_node.engine.tablet import Tablet
from shardkv_node.engine.tablet_export import ExportManifest, TabletExport
from shardkv_node.engine.tablet_import import TabletImport
from shardkv_node.engine.tablet_merge import TabletMerge
from shardkv_node.engine.tablet_size import TabletSize, middle_of, size_of
from shardkv_node.engine.tablet_split import TokenSplit, cut_levels
from shardkv_node.engine.vfs import Vfs
from shardkv_node.engine.write import Group


class StoreTablets(Reads):
    """The part of `Store` that is about whole tablets."""

    directory: str
    store_id: bytes
    term: int
    closed: bool
    health: Health
    maintenance: Maintenance
    options: Options
    _vfs: Vfs
    _random_bytes: Callable[[int], bytes]
    _state: ManifestState
    _tablets: dict[int, Tablet]
    _splits: dict[int, Rewriting]
    """Splits and merges under way, by the number of each tablet that is split or merged."""
    _log: LogWriter
    _in_flight: Group | None
    _active_bytes: int

    @abstractmethod
    def write_refusal(self) -> StorageError | None: ...
    @abstractmethod
    def _require_open(self) -> None: ...
    @abstractmethod
    def _require_idle(self) -> None: ...
    @abstractmethod
    def _end_quick_puts(self) -> None: ...
    @abstractmethod
    def _close_quick_lane(self, number: int) -> None: ...
    @abstractmethod
    def freeze_is_cheap(self) -> bool: ...
    @abstractmethod
    def _freeze(self) -> None: ...

    # --- make and drop ---

    @property
    def tablets(self) -> dict[int, bytes]:
        """Label of every tablet, by number, but for those with records. A copy."""
        return {number: tablet.label for number, tablet in self._tablets.items() if not tablet.records_of}

    def tablets_labelled(self, label: bytes) -> list[int]:
        """Numbers of the tablets with this label, oldest first."""
        return sorted(number for number, found in self.tablets.items() if found == label)

    def create_tablet(self, label: bytes) -> int:
        """Make an empty tablet; durable on return. Its number was never used in this store before."""
        return self.create_tablets([label])[0]

    def create_tablets(self, labels: Sequence[bytes]) -> list[int]:
        """As `create_tablet`, for all of these by one edit. Returns their numbers."""
        self._require_open()
        made = [self._new_tablet(number, label, 0) for number, label in enumerate(labels, self._state.next_tablet)]
        self.maintenance.change_tablets([(tablet, []) for tablet in made], [], self._position)
        return [tablet.number for tablet in made]

    def drop_tablet(self, number: int) -> None:
        """Forget a tablet and delete its data; durable on return. Requires: no group in flight."""
        self._require_open()
        self._require_idle()
        self._close_quick_lane(number)
        tablet = self._tablet(number)
        self.maintenance.change_tablets([], with_records(tablet), self._position)
        self._note_dropped(tablet)

    def _note_dropped(self, tablet: Tablet) -> None:
        self._active_bytes -= tablet.active.resident_bytes
        if tablet.records is not None:
            self._active_bytes -= tablet.records.active.resident_bytes
        split = self._splits.pop(tablet.number, None)
        if split is not None:
            split.give_up(InvalidArgument(f"Tablet {tablet.number} was dropped while it was being split or merged."))

    # --- records of tokens ---

    def _make_records(self, numbers: set[int]) -> None:
        """See that each of these tablets can have records; what is made is durable on return."""
        tablets = [self._tablets[number] for number in numbers if number in self._tablets]
        without = [tablet for tablet in tablets if tablet.records is None and not tablet.fenced]
        if without:
            self._make_records_of(without)

    def _make_records_of(self, tablets: Sequence[Tablet]) -> None:
        made = [self._records_tablet(tablet, n, 0) for n, tablet in enumerate(tablets, self._state.next_tablet)]
        self.maintenance.change_tablets([(records, []) for records in made], [], self._position)
        self._join_records(made)

    def _records_tablet(self, tablet: Tablet, number: int, last_seqno: int) -> Tablet:
        return Tablet(number, tablet.label, last_seqno, Memtable(), clock=self.time_ms, records_of=tablet.number)

    def _join_records(self, tablets: Iterable[Tablet]) -> None:
        """Have the tablets whose records these are find them."""
        for tablet in tablets:
            if tablet.records_of in self._tablets:
                self._tablets[tablet.records_of].records = tablet

    def _halves_of_records(
        self, tablet: Tablet, halves: Sequence[Tablet], first: int
    ) -> list[tuple[Tablet, list[list[TableMeta]]]]:
        """All records of a tablet for each of its halves: nothing tells which half a record is of."""
        if tablet.records is None:
            return []
        levels, seqno = self.maintenance.levels_of(tablet.records.number), tablet.records.last_seqno
        return [(self._records_tablet(half, first + place, seqno), levels) for place, half in enumerate(halves)]

    # --- size ---

    def tablet_size(self, number: int) -> TabletSize:
        """What the tablet holds, about: see tablet_size.py."""
        return size_of(self._tablet(number))

    def middle_key(self, number: int) -> bytes | None:
        """The key at which to split the tablet into halves of about the same stored bytes; what is in no table yet is
        not counted. None when it is too small: when no two data blocks differ in their last key.
        """
        return middle_of(self._tablet(number).tables())

    # --- fence ---

    def fence_tablet(self, number: int) -> None:
        """Take no more writes for the tablet until `lift_fence`: they are refused with `ShardUnavailable`.

        A write that was logged before is still applied. Reads go on. A fence is forgotten when the store is closed.
        """
        self._end_quick_puts()
        self._tablet(number).fenced = True

    def lift_fence(self, number: int) -> None:
        """Take writes again. Raises `InvalidArgument` while the tablet is being split: end or cancel that first."""
        tablet = self._tablet(number)
        self._require_unsplit(number)
        tablet.fenced = False

    def in_tables(self, number: int) -> bool:
        """Whether all the tablet was told is in tables; if not, `flush`, and wait for `on_progress`."""
        return self._in_flight is None and self._tablet(number).in_tables

    def is_fenced(self, number: int) -> bool:
        """Whether writes are refused, by `fence_tablet` or for the last stretch of a split or merge."""
        return self._tablet(number).fenced

    def last_seqnos(self, number: int) -> tuple[int, int]:
        """Of the newest write of the tablet, and of its records; 0: there is none."""
        self._end_quick_puts()
        tablet = self._tablet(number)
        return tablet.last_seqno, 0 if tablet.records is None else tablet.records.last_seqno

    def flushed_seqnos(self, number: int) -> tuple[int, int]:
        """As `last_seqnos`, of what is in tables."""
        parts = [self._state.tablets[part].flushed_seqno for part in with_records(self._tablet(number))]
        return parts[0], parts[1] if len(parts) > 1 else 0

    def flush_soon(self) -> None:
        """Freeze what is in memory and have it written to tables, if that can be done now without holding up the
        caller; if not, ask again. Raises what `write_refusal` says."""
        refusal = self.write_refusal()
        if refusal is not None:
            raise refusal
        room = len(self.maintenance.frozen) < self.options.frozen_memtables_max
        if self._in_flight is None and room and self.freeze_is_cheap():
            self._freeze()

    # --- split ---

    def split_tablet(
        self, number: int, at_key: bytes, labels: tuple[bytes, bytes], *, keep_whole: bool = False
    ) -> tuple[int, int]:
        """Replace a tablet by two: one with its keys below `at_key`, one with the others. Returns their numbers.

        Durable on return; nothing is read or copied: the halves share the files of the whole until compactions have
        rewritten them. Rows keep their versions, and later writes to a half get higher ones. `at_key` may lie outside
        of what the tablet holds: then one half is empty. What is written to which half is the owner's to see to.
        Raises `ShardUnavailable` unless `in_tables`: fence the tablet, flush, and wait for that. Snapshots of the
        whole stay as they are. Requires: no group in flight.
        `keep_whole`: the whole stays beside them, fenced: drop it, or, to take the split back, drop the halves.
        """
        self._require_open()
        self._require_idle()
        self._close_quick_lane(number)
        tablet = self._tablet(number)
        self._require_unsplit(number)
        if not tablet.in_tables:
            raise ShardUnavailable(
                f"Tablet {number} holds rows that are in no table yet.",
                detail={"tablet": number},
                hint="Flush, wait for it with the tablet fenced, and split it then.",
            )
        left, right = self._halves(tablet, self._state.next_tablet, labels)
        below, above = cut_levels(self._state.tablets[number].levels, at_key)
        made = [(left, below), (right, above), *self._halves_of_records(tablet, (left, right), right.number + 1)]
        self.maintenance.change_tablets(made, [] if keep_whole else with_records(tablet), self._position)
        tablet.fenced = True
        self._join_records([half for half, _ in made])
        self.maintenance.schedule()
        return left.number, right.number

    def split_tablet_by_token(
        self, number: int, token: int, labels: tuple[bytes, bytes], *, keep_whole: bool = False
    ) -> TokenSplit:
        """Begin to replace a tablet by two: one with the keys whose hash token is below `token`, one with the others.

        The token is that of topology/tokens.py, so keys with the same `{tag}` stay together. The tablet's tables are
        rewritten by jobs, which takes as long as a compaction of all of it; `outcome` of what is returned tells when
        that has ended, and `on_progress` is called. Meanwhile reads and writes go on. For its last stretch, a flush
        and the rewriting of what was just written, the split fences the tablet: writes are refused with
        `ShardUnavailable`, and may be retried until the halves are there. After a crash, a failure or `cancel` the
        tablet is there as before. One that was fenced already stays so, but for a crash.
        `keep_whole`: as in `split_tablet`.
        Raises what `write_refusal` says.
        """
        refusal = self.write_refusal()
        if refusal is not None:
            raise refusal
        tablet = self._tablet(number)
        self._require_unsplit(number)
        if not 0 <= token <= HASH_TOKENS:
            raise InvalidArgument(f"A hash token lies in 0..{HASH_TOKENS}, not at {token}.")
        self._end_quick_puts()
        first = self._state.next_tablet
        self.maintenance.commit([NumbersEdit(self._state.next_file, first + 2)])
        split = TokenSplit(
            self.maintenance,
            tablet,
            self._halves(tablet, first, labels),
            token,
            last_bytes_max=self.options.memtable_bytes_max,
            flush=self.flush_soon,
            in_tables=self.in_tables,
            install=lambda split, left, right: self._install_split(split, left, right, keep_whole=keep_whole),
        )
        self._splits[number] = split
        self._advance_splits()
        return split

    def _install_split(self, split: TokenSplit, left: Levels, right: Levels, *, keep_whole: bool) -> None:
        self._close_quick_lane(split.tablet.number)
        halves = split.halves
        for half in halves:
            half.last_seqno = split.tablet.last_seqno
        also = [self.maintenance.numbers_after(meta for levels in (left, right) for metas in levels for meta in metas)]
        records = self._halves_of_records(split.tablet, halves, self._state.next_tablet)
        made = [(halves[0], left), (halves[1], right), *records]
        dropped = [] if keep_whole else with_records(split.tablet)
        self.maintenance.change_tablets(made, dropped, self._position, also)
        self._join_records([half for half, _ in made])

    # --- merge ---

    def merge_tablets(self, left: int, right: int, boundary: bytes | int, label: bytes) -> TabletMerge:
        """Begin to make one tablet with all that is in two; `outcome` of what is returned has its number in the end.

        `boundary`: a key, where `left` has the keys below it, and `right` those from it on; then files are shared, and
        it takes as long as a flush and a rewriting of the records of tokens. Or a hash token, in the same way; then the
        tables of both are rewritten by jobs, which takes as long as a compaction of all of it.
        Both tablets stay, fenced from the last stretch on: writes are refused with `ShardUnavailable`. Drop both, or,
        to take the merge back, drop the merged one and lift their fences. After a crash, a failure or `cancel` both are
        there as before. Raises what `write_refusal` says.
        """
        refusal = self.write_refusal()
        if refusal is not None:
            raise refusal
        sources = self._tablet(left), self._tablet(right)
        for number in (left, right):
            self._require_unsplit(number)
        if left == right:
            raise InvalidArgument(f"Tablet {left} cannot be merged with itself.")
        if isinstance(boundary, int) and not 0 <= boundary < HASH_TOKENS:
            raise InvalidArgument(f"A hash token lies in 0..{HASH_TOKENS - 1}, not at {boundary}.")
        self._end_quick_puts()
        number = self._state.next_tablet
        self.maintenance.commit([NumbersEdit(self._state.next_file, number + 1)])
        merge = TabletMerge(
            self.maintenance,
            sources,
            self._new_tablet(number, label, 0),
            boundary,
            last_bytes_max=self.options.memtable_bytes_max,
            flush=self.flush_soon,
            in_tables=self.in_tables,
            install=self._install_merge,
        )
        self._splits.update({left: merge, right: merge})
        self._advance_splits()
        return merge

    def _install_merge(self, merge: TabletMerge, levels: Levels, records: Levels) -> None:
        merged = merge.merged
        merged.last_seqno = max(tablet.last_seqno for tablet in merge.sources)
        metas = (meta for one in (levels, records) for level in one for meta in level)
        also = [self.maintenance.numbers_after(metas)]
        made = [(merged, levels)]
        last = max((tablet.records.last_seqno for tablet in merge.sources if tablet.records is not None), default=0)
        if last:
            made.append((self._records_tablet(merged, self._state.next_tablet, last), records))
        self.maintenance.change_tablets(made, [], self._position, also)
        self._join_records([one for one, _ in made])

    def _advance_splits(self) -> None:
        dead = self.closed or self.health.poisoned
        refusal = self.write_refusal() if dead else None
        for number, split in list(self._splits.items()):
            if refusal is not None:
                split.give_up(refusal)
            split.advance()
            if split.outcome is not None:
                self._splits.pop(number, None)
                self.maintenance.schedule()

    # --- export and import ---

    def export_tablet(self, number: int, directory: str) -> None:
        """Write the tablet's tables, with all it holds in them now, to a directory that is new or empty.

        What is in no table yet is not exported: flush, and wait until `in_tables`, to have everything. Complete and
        durable on return. To keep the owner free meanwhile, use `pin_export`. Raises as `TabletExport.write`.
        """
        export = self.pin_export(number)
        try:
            export.write(directory)
        finally:
            export.close()

    def pin_export(self, number: int) -> TabletExport:
        """The tablet's tables as they are now, for `write`, which may run in any thread. Close it after use.

        Writes, flushes, compactions, splits and a drop of the tablet may go on.
        """
        self._require_open()
        tablet = self._tablet(number)
        seqnos = [self._state.tablets[part].flushed_seqno for part in with_records(tablet)]
        manifest, unpin = self._pinned_manifest(tablet, seqnos)
        return TabletExport(self._vfs, self.directory, manifest, lambda _: unpin())

    def _pinned_manifest(self, tablet: Tablet, seqnos: Sequence[int]) -> tuple[ExportManifest, Callable[[], None]]:
        """What lists the tablet's tables, and those with its records; they stay until the function is called.

        `seqnos`: up to where it has all writes; of the tablet, and of its records if there are any.
        """
        parts = [self.maintenance.levels_of(part) for part in with_records(tablet)]
        for levels in parts:
            self.maintenance.pin(levels)
        tables = [[(level, meta) for level, metas in enumerate(levels) for meta in metas] for levels in parts]
        manifest = ExportManifest(self.store_id, tablet.number, tablet.label, seqnos[0], tables[0])
        if tablet.records is not None:
            manifest = msgspec.structs.replace(manifest, records_seqno=seqnos[1], records=tables[1])

        def unpin() -> None:
            for levels in parts:
                self.maintenance.unpin(levels)

        return manifest, unpin

    def import_tablet(self, directory: str, label: bytes) -> int:
        """Make a tablet of an export, which stays as it is. Returns its number; durable on return.

        To keep the owner free meanwhile, use `begin_import`. Raises as `TabletImport.fetch` and `install_import`.
        Requires: no group in flight.
        """
        self._require_idle()
        found = self.begin_import(directory)
        found.fetch()
        return self.install_import(found, label)

    def begin_import(self, directory: str) -> TabletImport:
        """An import to `fetch`, which may be done in any thread. Raises what `write_refusal` says."""
        refusal = self.write_refusal()
        if refusal is not None:
            raise refusal
        return TabletImport(
            self._vfs,
            directory,
            table_directory=filenames.table_directory(self.directory),
            file_number=self._state.next_file,
            job_id=self._random_bytes(4).hex(),
        )

    def install_import(self, found: TabletImport, label: bytes) -> int:
        """Make a tablet of what was fetched. Returns its number; durable on return. Requires: no group in flight.

        Rows keep their versions; the store's term is raised where later writes would not get higher ones. Times to
        live are judged by this store's clock from now on. When this raises, what was fetched is removed, now or at
        the next open.
        """
        return self._install(found, label).number

    def _install(self, found: TabletImport, label: bytes, *, instead_of: Tablet | None = None) -> Tablet:
        """As `install_import`; a tablet is dropped by the same edit."""
        try:
            self._require_open()
            self._require_idle()
            term = max(self.term, found.highest_term + 1)
            if term > TERM_MAX:
                raise StorageError(f"The tablet holds rows of term {term - 1}, the last there is.")
            files = self.maintenance.files
            files.adopt([files.open(meta) for meta in {meta.file_name: meta for meta in found.metas}.values()])
        except BaseException:
            found.abandon()
            raise
        self._end_quick_puts()
        tablet = self._new_tablet(self._state.next_tablet, label, found.last_seqno)
        made = [(tablet, found.levels)]
        if found.records_seqno:
            made.append((self._records_tablet(tablet, tablet.number + 1, found.records_seqno), found.records))
        also: list[Edit] = [] if term == self.term else [TermEdit(term)]
        also.append(self.maintenance.numbers_after(found.metas))
        dropped = [] if instead_of is None else with_records(instead_of)
        self.maintenance.change_tablets(made, dropped, self._position, also)
        self._join_records([one for one, _ in made])
        self.term = term
        if instead_of is not None:
            self._note_dropped(instead_of)
        self.maintenance.schedule()
        return tablet

    # --- inside ---

    @property
    def _position(self) -> Position:
        return self._log.number, self._log.offset

    def _new_tablet(self, number: int, label: bytes, last_seqno: int) -> Tablet:
        return Tablet(number, label, last_seqno, Memtable(), clock=self.time_ms)

    def _halves(self, tablet: Tablet, first: int, labels: tuple[bytes, bytes]) -> tuple[Tablet, Tablet]:
        left, right = labels
        seqno = tablet.last_seqno
        return self._new_tablet(first, left, seqno), self._new_tablet(first + 1, right, seqno)

    def _require_unsplit(self, number: int) -> None:
        split = self._splits.get(number)
        if split is not None and split.outcome is None:
            raise InvalidArgument(
                f"Tablet {number} is being split or merged.",
                hint="Wait until that has ended, or cancel it, and try again.",
            )


def with_records(tablet: Tablet) -> list[int]:
    """The numbers of the tablet and of the one with its records, if it has one."""
    return [tablet.number] if tablet.records is None else [tablet.number, tablet.records.number]
