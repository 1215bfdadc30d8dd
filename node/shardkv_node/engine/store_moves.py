"""`StoreMoves`: what a `Store` does when a tablet moves to another store, on either side.

The store the tablet is in:     `pin_tablet`, then files, dump and tail are read from the pin (tablet_pin.py)
The store it goes to:           `begin_staging`, `install_staging`, `stage`, `sync_log`, `adopt_staging` (staging.py)

Invariants:
  - writes to a tablet that is not pinned cost nothing more than a look whether any is;
  - a tail holds every write that was applied since its pin, in the order of application, whatever way it came;
  - a staging tablet takes no writes but those of `stage`, and no other tablet ever shows its rows.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

from shardkv.errors import InvalidArgument, StorageError
from shardkv_node.engine import filenames
from shardkv_node.engine.backpressure import Backpressure
from shardkv_node.engine.columns import NO_EXPIRY, PUT, TERM_MAX
from shardkv_node.engine.dismantling import Dismantler
from shardkv_node.engine.entries import WriteEntry
from shardkv_node.engine.manifest import LabelEdit, TermEdit
from shardkv_node.engine.memory_dump import MemoryDump
from shardkv_node.engine.puts import Puts
from shardkv_node.engine.staging import Staging, StagingImport, apply_entries
from shardkv_node.engine.store_tablets import StoreTablets, with_records
from shardkv_node.engine.tablet import Tablet
from shardkv_node.engine.tablet_export import ExportManifest
from shardkv_node.engine.tablet_pin import TabletPin
from shardkv_node.engine.tail import TAIL_BYTES_MAX, Tail, TailBatch
from shardkv_node.engine.tail_digest import TailDigest
from shardkv_node.engine.write import Write

STAGED_UNSYNCED_BYTES = 1024 * 1024
"""With more than this unsynced after a batch, a sync is begun where no other mode of durability sees to it."""


class StoreMoves(StoreTablets):
    """The part of `Store` that is about tablets on their way from one store to another."""

    _dismantler: Dismantler
    _pins: dict[int, TabletPin]
    """Those that are open, by tablet."""
    _between_groups: list[Callable[[], None]]

    backpressure: Backpressure

    @abstractmethod
    def _make_room(self) -> None: ...
    @abstractmethod
    def _tick(self) -> int: ...
    @abstractmethod
    def schedule_sync(self) -> None: ...
    @abstractmethod
    def sync_log(self, done: Callable[[StorageError | None], None]) -> None: ...

    def between_groups(self, call: Callable[[], None]) -> None:
        """Run `call`, which must not raise, while no group is in flight: now, or right after the one there is was
        applied or failed."""
        if self._in_flight is None:
            call()
        else:
            self._between_groups.append(call)

    def _run_between_groups(self) -> None:
        calls, self._between_groups = self._between_groups, []
        for call in calls:
            call()

    # --- the store a tablet is in ---

    def pin_tablet(self, number: int, *, tail_bytes_max: int = TAIL_BYTES_MAX) -> TabletPin:
        """The tablet with everything in it now, and a tail of what is applied from now on. Close it after use.

        Writes, flushes, compactions and a drop of the tablet may go on; single puts by a `QuickLane` go through groups
        meanwhile. `tail_bytes_max`: more than this is not held for the asker, who pins anew then.
        Raises `InvalidArgument` while another pin of the tablet is open. Requires: no group in flight.
        """
        self._require_open()
        self._require_idle()
        self._end_quick_puts()
        tablet = self._tablet(number)
        if number in self._pins:
            raise InvalidArgument(f"Tablet {number} is pinned already.", hint="Close that pin first.")
        parts = [self._tablets[part] for part in with_records(tablet)]
        manifest, unpin = self._pinned_manifest(tablet, [part.last_seqno for part in parts])
        dump = MemoryDump(parts, self._dismantler)
        digest = TailDigest()

        def release(_: TabletPin) -> None:
            del self._pins[number]
            unpin()

        tail = Tail(digest, bytes_max=tail_bytes_max)
        pin = self._pins[number] = TabletPin(self.directory, tablet, manifest, dump, tail, digest, release)
        return pin

    def _feed_tails(self, accepted: Sequence[tuple[Write, Tablet] | Puts]) -> None:
        """Hand what was just applied to the tails that want it."""
        fed: set[int] = set()
        pins = self._pins
        for one in accepted:
            if isinstance(one, Puts):
                for number, keys, version, values in zip(one.numbers, one.keys, one.versions, one.values, strict=True):
                    if number in pins:
                        pins[number].tail.add(version, keys, PUT, NO_EXPIRY, values)
                        fed.add(number)
                continue
            write, tablet = one
            number = tablet.records_of or tablet.number
            if number in pins:
                pins[number].tail.add(
                    write.version,
                    write.keys,
                    write.kinds,
                    write.expiries,
                    write.values,
                    records=tablet.records_of > 0,
                )
                fed.add(number)
        self._tell_tails(fed)

    def _feed_quick_put(self, number: int, key: bytes, value: bytes, version: int) -> None:
        """As `_feed_tails`, for a put by the lane."""
        if number in self._pins:
            self._pins[number].tail.add(version, [key], PUT, NO_EXPIRY, [value])
            self._tell_tails({number})

    def _tell_tails(self, fed: set[int]) -> None:
        for number in fed:
            pin = self._pins.get(number)  # another one's callback may have closed it
            if pin is not None and pin.tail.on_write is not None:
                pin.tail.on_write()

    # --- the store it goes to ---

    def begin_staging(
        self, directory: str, manifest: ExportManifest, *, before: Staging | None = None
    ) -> StagingImport:
        """A tablet to be brought here: `manifest` is that of its pin, `directory` where its files are, or will be.

        `before`: the staging tablet of an earlier round from this directory; files that were verified for it are not
        read again. Raises what `write_refusal` says.
        """
        refusal = self.write_refusal()
        if refusal is not None:
            raise refusal
        return StagingImport(
            self._vfs,
            directory,
            manifest,
            table_directory=filenames.table_directory(self.directory),
            file_number=self._state.next_file,
            random_bytes=self._random_bytes,
            options=self.maintenance.table_options(),
            verified=set() if before is None else set(before.verified),
        )

    def install_staging(self, found: StagingImport, label: bytes, *, before: Staging | None = None) -> Staging:
        """Make the staging tablet of what was fetched; durable on return. Raises as `install_import`.

        `before`: that of an earlier round, which is dropped by the same edit: at no time are there both, or neither.
        Requires: no group in flight.
        """
        old = None if before is None else self._tablet(before.number)
        tablet = self._install(found, label, instead_of=old)
        tablet.fenced = True
        return Staging(tablet.number, found)

    def stage(self, staging: Staging, batch: TailBatch) -> None:
        """Log and apply the writes of the batch that are not in the staging tablet yet.

        Not synced on return: see `sync_log`; without it the disk has them when the durability mode has it so, in
        `always` with the next group. The owner's duties are those before a group: ask `stalled` and `write_delay_s`.
        Raises what `write_refusal` says, `StorageError` (the store is poisoned then), `InvalidArgument` for a batch
        that does not follow what came before; then nothing was done. Requires: no group in flight.
        """
        refusal = self.write_refusal()
        if refusal is not None:
            raise refusal
        self._require_idle()
        tablet = self._tablet(staging.number)
        writes = staging.news_of(batch)
        if not writes:
            return
        self._end_quick_puts()
        self._raise_term(max(write.term for write in writes) + 1)
        if tablet.records is None and any(write.records for write in writes):
            self._make_records_of([tablet])
        self._make_room()
        parts = [tablet, *([tablet.records] if tablet.records is not None else [])]
        entries = [write.entry(parts[write.records].number) for write in writes]
        self._log_staged(entries)
        for part in parts:
            before = part.active.resident_bytes
            apply_entries(part.active, [entry for entry in entries if entry.tablet == part.number])
            self._active_bytes += part.active.resident_bytes - before
        staging.note(writes)
        for part, seqno in zip(parts, staging.seqnos.values(), strict=False):
            part.last_seqno = seqno
            if part.rows is not None and part.rows.values:
                part.rows.clear()
        if self.options.durability == "interval":
            self.schedule_sync()
        elif self.options.durability == "always" and self._log.offset - self._log.synced_offset > STAGED_UNSYNCED_BYTES:
            self.sync_log(
                lambda _: None
            )  # beside what goes on, not when a group or the end of the segment waits for it

    def adopt_staging(self, number: int, label: bytes) -> None:
        """Give a tablet its label for good, and let it take writes; durable on return.

        Also for a staging tablet found after a restart, and for one that was adopted already.
        """
        tablet = self._tablet(number)
        self.maintenance.commit([LabelEdit(part, label) for part in with_records(tablet)])
        for part in with_records(tablet):
            self._tablets[part].label = label
        tablet.fenced = False

    def _log_staged(self, entries: Sequence[WriteEntry]) -> None:
        before = self._log.offset
        try:
            self._log.append(entries, self._tick())
        except StorageError as error:
            raise self.health.poison(error) from error
        if self.maintenance.most_level0_tables >= self.options.l0_slow_tables:
            self.backpressure.note_group(self._log.offset - before, self.maintenance.most_level0_tables)

    def _raise_term(self, least: int) -> None:
        """See that what is written from now on has this term or a higher one; durable on return."""
        if least > TERM_MAX:
            raise StorageError(f"The tablet holds rows of term {least - 1}, the last there is.")
        if least > self.term:
            self.maintenance.commit([TermEdit(least)])
            self.term = least
