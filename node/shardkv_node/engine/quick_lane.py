"""`QuickLane`: single puts into one tablet, without the ceremony of a group.

Whether a write may be taken is judged by `Store.log_group`, for each group anew: is the disk full, the memtable, must
writers wait? For a put of a hundred bytes the judging costs five times what the put does. So the store judges once and
grants the lane *credit*: so many bytes, for so long. A put that the credit does not cover goes through a group.

Invariants:
  - a put is logged as a group of its own, then applied; `write` has returned before the put does;
  - nothing that the credit was granted on changes without `revoke`: the log segment and the memtable, a snapshot's
    claim to the rows as they were, a pin's to every write, a fence, the term and the health of the store, and, in the
    interval mode, the sync under way;
  - what the lane wrote is part of the sums of store and memtable only after `revoke`, which returns it.

A put that must be synced before it is acknowledged is logged here by `log`, and synced and applied by the owner, as a
group is; nobody else's turn comes in between. Not for writes with conditions, expiry or a token.
"""

from __future__ import annotations

from collections.abc import Callable, Container

import msgspec

from shardkv.errors import StorageError
from shardkv.hybrid_clock import COUNTER_BITS, HybridClock
from shardkv_node.engine.columns import NO_EXPIRY, PUT, SEQNO_MAX, make_version
from shardkv_node.engine.entries import WRITE
from shardkv_node.engine.health import Health
from shardkv_node.engine.log_writer import LogWriter
from shardkv_node.engine.memtable import CELL_HEADER_BYTES, KEY_OVERHEAD_BYTES
from shardkv_node.engine.tablet import Tablet

CREDIT_BYTES = 64 * 1024
"""Of memory, at most: so much later than a group would have been is a quick put stopped by a disk that fills up."""
CREDIT_MS = 200
ROW_BYTES = CELL_HEADER_BYTES + KEY_OVERHEAD_BYTES
"""What a row takes beside key and value. More than what its group in the log takes beside them."""

_encode = msgspec.msgpack.Encoder().encode


class QuickLane:
    """Belongs to the owner of the store, who calls it between two groups only. `now_ms`: milliseconds since 1970."""

    __slots__ = (
        "_cells",
        "_clock",
        "_credit",
        "_first_seqno",
        "_granted",
        "_health",
        "_held",
        "_log",
        "_log_credit",
        "_now_ms",
        "_parts",
        "_rows",
        "_stamp",
        "_tablet",
        "_term",
        "_until",
        "_versions",
    )

    def __init__(
        self, tablet: Tablet, term: int, log: LogWriter, clock: HybridClock, now_ms: Callable[[], int], health: Health
    ) -> None:
        self._tablet = tablet
        self._set_term(term)
        self._log = log
        self._clock = clock
        self._now_ms = now_ms
        self._health = health
        self._cells = tablet.active.cells
        self._parts = tablet.active.full_parts
        self._held: Container[bytes] = ()
        """Keys of cached rows."""
        self._rows = 0
        self._first_seqno = tablet.last_seqno
        self._granted = 0
        self._credit = 0
        self._log_credit = 0
        self._until = 0

    def _set_term(self, term: int) -> None:
        self._term = term
        self._versions = make_version(term, 0)
        self._stamp = PUT << 64 | self._versions
        """The header of a cell, as one number, for seqno 0."""

    def put(self, key: bytes, value: bytes) -> int:
        """Log and apply one put; returns its version, or 0 when it must go through a group.

        Requires: no group in flight; the sizes of key and value were checked. Raises `StorePoisoned`.
        """
        credit = self._credit - len(key) - len(value) - ROW_BYTES
        if credit < 0:
            return 0
        hlc = self._clock.tick(self._now_ms())
        if hlc > self._until:
            return 0
        tablet = self._tablet
        seqno = tablet.last_seqno + 1
        entry = (WRITE, tablet.number, self._term, seqno, None, (key,), PUT, NO_EXPIRY, (value,))
        try:
            self._log.append_payload(_encode((entry,)), hlc)
            tablet.last_seqno = seqno
            self._credit = credit
            if key in self._held:
                self._forget(key)
            cells = self._cells
            for part in self._parts:
                if key in part:
                    cells = part
            cells[key] = (self._stamp | seqno).to_bytes(CELL_HEADER_BYTES, "big") + value
        except StorageError as error:
            raise self._health.poison(error) from error
        except BaseException as error:  # an interrupt between log and apply: what the log holds is not known
            self._health.poison(error)
            raise
        return self._versions | seqno

    def log(self, key: bytes, value: bytes) -> int:
        """Log one put, and no more; else as `put`. The owner must now sync it, then `apply` it, or poison the store."""
        credit = self._log_credit - len(key) - len(value) - ROW_BYTES
        if credit < 0:
            return 0
        hlc = self._clock.tick(self._now_ms())
        if hlc > self._until:
            return 0
        tablet = self._tablet
        seqno = tablet.last_seqno + 1
        entry = (WRITE, tablet.number, self._term, seqno, None, (key,), PUT, NO_EXPIRY, (value,))
        try:
            self._log.append_payload(_encode((entry,)), hlc)
            tablet.last_seqno = seqno
            self._log_credit = credit
        except StorageError as error:
            raise self._health.poison(error) from error
        except BaseException as error:
            self._health.poison(error)
            raise
        return self._versions | seqno

    def apply(self, key: bytes, value: bytes, version: int) -> int:
        """Make the put that was logged and synced visible. Returns the memory it takes, which is not counted here."""
        self._forget(key)
        memtable = self._tablet.active
        before = memtable.resident_bytes
        memtable.apply((key,), PUT, version, (value,))
        return memtable.resident_bytes - before

    def _forget(self, key: bytes) -> None:
        if self._tablet.rows is not None:
            self._tablet.rows.forget((key,))

    @property
    def tablet(self) -> int:
        """Number of the tablet it leads to."""
        return self._tablet.number

    @property
    def watched(self) -> bool:
        """A snapshot must be told what each row was before it is replaced."""
        return self._tablet.active.newest_view is not None

    @property
    def fenced(self) -> bool:
        """The tablet takes no writes now."""
        return self._tablet.fenced

    def grant(self, log: LogWriter, term: int, credit: int, *, synced: bool) -> None:
        """Let puts through that take so many bytes of memory together: by `put`, or by `log` when they are to be
        `synced`. Requires: the credit before was revoked."""
        tablet = self._tablet
        if tablet.last_seqno + credit > SEQNO_MAX:
            return
        if term != self._term:
            self._set_term(term)
        self._log = log
        self._cells = tablet.active.cells
        self._parts = tablet.active.full_parts
        self._held = tablet.rows.values if tablet.rows is not None else ()
        self._rows = len(self._cells)
        self._first_seqno = tablet.last_seqno
        self._until = self._clock.tick(self._now_ms()) + (CREDIT_MS << COUNTER_BITS)
        if synced:
            self._log_credit = credit
        else:
            self._granted = self._credit = credit

    def revoke(self) -> tuple[int, int]:
        """End the credit. Returns what `put` did since it was granted: (puts, bytes of memory)."""
        used = self._granted - self._credit
        self._granted = self._credit = self._log_credit = 0
        if not used:
            return 0, 0
        puts = self._tablet.last_seqno - self._first_seqno
        new = len(self._cells) - self._rows
        used -= (puts - new) * KEY_OVERHEAD_BYTES
        self._tablet.active.note_put(new, used)
        return puts, used
