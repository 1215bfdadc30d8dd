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

from shardkv.errors import InvalidArgument
from shardkv_node.engine.columns import NO_EXPIRY, PUT
from shardkv_node.engine.dismantling import Dismantler
from shardkv_node.engine.memory_dump import MemoryDump
from shardkv_node.engine.puts import Puts
from shardkv_node.engine.store_tablets import StoreTablets, with_records
from shardkv_node.engine.tablet import Tablet
from shardkv_node.engine.tablet_pin import TabletPin
from shardkv_node.engine.tail import TAIL_BYTES_MAX, Tail
from shardkv_node.engine.tail_digest import TailDigest
from shardkv_node.engine.write import Write


class StoreMoves(StoreTablets):
    """The part of `Store` that is about tablets on their way from one store to another."""

    _dismantler: Dismantler
    _pins: dict[int, TabletPin]
    """Those that are open, by tablet."""
    _between_groups: list[Callable[[], None]]

    @abstractmethod
    def _require_idle(self) -> None: ...

    def between_groups(self, call: Callable[[], None]) -> None:
        """Run `call` while no group is in flight: now, or right after the one there is was applied or failed."""
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
        pin = self._pins[number] = TabletPin(self.directory, manifest, dump, tail, digest, release)
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
            on_write = self._pins[number].tail.on_write
            if on_write is not None:
                on_write()
