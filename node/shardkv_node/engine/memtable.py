"""`Memtable`: the newest row of each key of one tablet, in memory, until a flush has put it into tables.

A row is one packed `bytes` cell, which the garbage collector does not look into:

    cell = kind:u8 version:u64 big-endian [expiry_ms:u64 big-endian, only in PUT_EXPIRING] value

Invariants:
  - a key is never taken out again (a delete is a cell too), so the newest keys are the last of a dict;
  - a key is in one part only: `cells`, which takes the new keys, or one of those filled before;
  - nothing here works on more than about `PART_ROWS` rows at once. A larger dict would stall its owner for tens of
    milliseconds when it grows; the order is fed, and a dropped memtable dismantled, in steps.

The order costs more than the write itself, so it is fed only once a scan wanted it: `feed_order` brings up what is
there step by step, and from then on each write feeds its share, so that no later scan finds a long backlog.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from operator import itemgetter
from typing import TYPE_CHECKING

from shardkv_node.engine.columns import (
    DELETE,
    NO_EXPIRY,
    PUT,
    PUT_EXPIRING,
    Columns,
    collapse,
    expand_kinds,
    expand_u64,
    pack_u64,
)
from shardkv_node.engine.key_runs import RUN_KEYS, KeyRuns

if TYPE_CHECKING:
    from shardkv_node.engine.memtable_view import MemtableView

PART_ROWS = 160_000
"""A part gets no new keys beyond this. CPython grows a dict of 16-byte keys at 87,000 rows in 5 ms, the next time, at
175,000, in 10 ms, then 40 ms."""
DISMANTLED_ROWS = 2048
"""Rows freed in one step, in about half a millisecond."""
CELL_HEADER_BYTES = 9
EXPIRING_HEADER_BYTES = 17

KEY_OVERHEAD_BYTES = 33 + 33 + 60
"""Two bytes objects and a slot of the dict."""

_kind_of = itemgetter(0)


class Memtable:
    """Rows of one tablet; a `Source`. Owned by one thread at a time."""

    __slots__ = (
        "_backlog",
        "_fed",
        "_order",
        "_unfed",
        "cells",
        "dropped",
        "full_parts",
        "newest_view",
        "ordered",
        "pins",
        "resident_bytes",
    )

    def __init__(self, *, ordered: bool = False) -> None:
        self.cells: dict[bytes, bytes] = {}
        """The part that takes new keys."""
        self.full_parts: list[dict[bytes, bytes]] = []
        self.resident_bytes = 0
        """Upper estimate of the memory held. Overwritten values stay counted until the flush, as the log holds them."""
        self.ordered = ordered
        """Scans are expected: writes keep the order up to date."""
        self.pins = 0
        """Readers that go on after the store dropped it; with `dropped` the business of `Dismantler`."""
        self.dropped = False
        self.newest_view: MemtableView | None = None
        """Is told the cell before, when a key is written for the first time since it was made."""
        self._order = KeyRuns()
        self._fed = 0
        """So many of the first keys of `cells` are in the order or in the backlog."""
        self._backlog: list[bytes] = []
        self._unfed: list[dict[bytes, bytes]] = []
        """Parts filled before a scan wanted the order."""

    def __len__(self) -> int:
        return len(self.cells) + sum(map(len, self.full_parts))

    def apply(
        self,
        keys: Sequence[bytes],
        kinds: int | bytes,
        version: int,
        values: Sequence[bytes],
        expiries: int | bytes = NO_EXPIRY,
    ) -> None:
        """Take the operations of one write request, in order. Requires: a version above all before."""
        if self.newest_view is not None:
            self._save(self.newest_view.undo, keys)
        if len(keys) == 1 and not expiries and isinstance(kinds, int):
            packed = [bytes((kinds,)) + version.to_bytes(8, "big") + values[0]]
        else:
            packed = pack_cells(kinds, version, expiries, values)
        self._put(keys, packed, values)

    def apply_run(self, keys: list[bytes], kind: int, version: int, values: list[bytes]) -> None:
        """Take write requests of one operation each, without expiry: the first has `version`, each further one 1 more.

        Requires: a version above all before, and no view, which would have to be told.
        """
        stamp = kind << 64 | version
        packed = [
            header.to_bytes(CELL_HEADER_BYTES, "big") + value
            for header, value in zip(range(stamp, stamp + len(values)), values, strict=True)
        ]
        self._put(keys, packed, values)

    def apply_rows(self, rows: Columns) -> None:
        """Take rows with the versions they have. Requires: no row here is newer, and no view that must be told."""
        self._put(rows.keys, _pack_rows(rows), rows.values)

    def _put(self, keys: Sequence[bytes], packed: list[bytes], values: Sequence[bytes]) -> None:
        cells = self.cells
        before = len(cells)
        if self.full_parts:
            self._update_parts(keys, packed)
        elif len(keys) == 1:
            cells[keys[0]] = packed[0]
        else:
            cells.update(zip(keys, packed, strict=True))
        new = len(cells) - before
        taken = sum(map(len, values)) + CELL_HEADER_BYTES * len(keys)
        if new:
            taken += new * KEY_OVERHEAD_BYTES + sum(map(len, keys))
        self.note_put(new, taken)

    def note_put(self, new: int, taken: int) -> None:
        """Count what was put into `cells`, so many of it `new` rows: the bytes `taken`, and the share of the order."""
        self.resident_bytes += taken
        if new:
            if self.ordered and len(self.cells) - self._fed >= RUN_KEYS:
                for _ in range(1 + new // RUN_KEYS):
                    self.feed_order()
            if len(self.cells) >= PART_ROWS:
                self._end_part()

    def get(self, key: bytes) -> bytes | None:
        """The cell of the key, or None when the memtable does not know it."""
        cell = self.cells.get(key)
        if cell is None:
            for part in self.full_parts:
                cell = part.get(key)
                if cell is not None:
                    break
        return cell

    def chunks(self, start: bytes, stop: bytes | None, *, reverse: bool) -> Iterator[Columns]:
        """The rows with keys in [start, stop); see `Source`. The memtable must not change meanwhile.

        Brings the whole order up to date first: at once, unless `feed_order` was called until it said so.
        """
        for keys in self.key_chunks(start, stop, reverse=reverse):
            yield unpack_cells(keys, self.cells_of(keys))

    def key_chunks(self, start: bytes, stop: bytes | None, *, reverse: bool) -> Iterator[list[bytes]]:
        """The keys of `chunks`."""
        while not self.feed_order():
            pass
        return self._order.chunks(start, stop, reverse=reverse)

    def cells_of(self, keys: list[bytes]) -> list[bytes]:
        """The cells of keys that are all here."""
        if not self.full_parts:
            return list(map(self.cells.__getitem__, keys))
        found = list(map(self.cells.get, keys))
        for part in self.full_parts:
            found = [cell or other for cell, other in zip(found, map(part.get, keys), strict=True)]
        return found  # type: ignore[return-value]  # no None is left, since the order knows no other keys

    def feed_order(self) -> bool:
        """Bring up to `RUN_KEYS` keys into order. Returns whether all of them are now."""
        if self._fed == len(self.cells) and not self._backlog and not self._unfed:
            return True
        self.ordered = True
        if not self._backlog:
            if self._unfed:
                self._backlog = list(self._unfed.pop())
            else:
                self._backlog = list(islice(reversed(self.cells), len(self.cells) - self._fed))
                self._fed = len(self.cells)
        if self._backlog:
            self._order.add(self._backlog[-RUN_KEYS:])
            del self._backlog[-RUN_KEYS:]
        return not self._backlog and not self._unfed and self._fed == len(self.cells)

    def dismantle(self) -> bool:
        """Free a bounded part of the memory of a memtable that nobody reads any more. False: nothing is left."""
        if self._backlog or self._unfed:
            self._backlog, self._unfed = [], []
            return True
        if self._order.drop_run():
            return True
        if not self.cells and self.full_parts:
            self.cells = self.full_parts.pop()
        pop = self.cells.popitem
        for _ in range(min(DISMANTLED_ROWS, len(self.cells))):
            pop()
        return bool(self.cells or self.full_parts)

    def _save(self, undo: dict[bytes, bytes | None], keys: Sequence[bytes]) -> None:
        """Note the cells of these keys as they are, where that was not done yet."""
        unsaved = set(keys).difference(undo)
        undo.update(zip(unsaved, map(self.get, unsaved), strict=True))

    def _end_part(self) -> None:
        """Start a new dict for the keys to come."""
        if not self._fed:
            self._unfed.append(self.cells)
        else:
            self._backlog += islice(reversed(self.cells), len(self.cells) - self._fed)
        self.full_parts.append(self.cells)
        self.cells = {}
        self._fed = 0

    def _update_parts(self, keys: Sequence[bytes], packed: list[bytes]) -> None:
        """Put each cell where its key is, or into `cells`."""
        rows = dict(zip(keys, packed, strict=True))
        for part in self.full_parts:
            for key in rows.keys() & part.keys():
                part[key] = rows.pop(key)
        self.cells.update(rows)


def cell_version(cell: bytes) -> int:
    return int.from_bytes(cell[1:9], "big")


def cell_expiry(cell: bytes) -> int:
    """When the cell ends, in milliseconds since 1970; NO_EXPIRY if it does not."""
    return int.from_bytes(cell[9:17], "big") if cell[0] == PUT_EXPIRING else NO_EXPIRY


def cell_value(cell: bytes, clock: Callable[[], int]) -> bytes | None:
    """The value, or None when the cell says that the key does not exist. `clock`: asked for the time if it matters."""
    kind = cell[0]
    if kind == PUT:
        return cell[CELL_HEADER_BYTES:]
    if kind == PUT_EXPIRING and int.from_bytes(cell[9:17], "big") > clock():
        return cell[EXPIRING_HEADER_BYTES:]
    return None


def pack_cells(kinds: int | bytes, version: int, expiries: int | bytes, values: Sequence[bytes]) -> list[bytes]:
    """The cells of one write request, one for each value."""
    stamp = version.to_bytes(8, "big")
    if not expiries:
        if isinstance(kinds, int):
            header = bytes((kinds,)) + stamp
            return [header + value for value in values]
        headers = {kind: bytes((kind,)) + stamp for kind in set(kinds)}
        return [headers[kind] + value for kind, value in zip(kinds, values, strict=True)]
    if kinds == PUT_EXPIRING and isinstance(expiries, int):
        header = bytes((PUT_EXPIRING,)) + stamp + expiries.to_bytes(8, "big")
        return [header + value for value in values]
    rows = zip(expand_kinds(kinds, len(values)), expand_u64(expiries, len(values)), values, strict=True)
    return [
        bytes((kind,)) + stamp + (expiry.to_bytes(8, "big") if kind == PUT_EXPIRING else b"") + value
        for kind, expiry, value in rows
    ]


def _pack_rows(rows: Columns) -> list[bytes]:
    """The cells of rows that have a version each: what `unpack_cells` unpacks."""
    n = len(rows)
    kinds, versions = expand_kinds(rows.kinds, n), expand_u64(rows.versions, n)
    cells = [
        (kind << 64 | version).to_bytes(CELL_HEADER_BYTES, "big") + value
        for kind, version, value in zip(kinds, versions, rows.values, strict=True)
    ]
    if PUT_EXPIRING in kinds:
        for row, (kind, expiry) in enumerate(zip(kinds, expand_u64(rows.expiries, n), strict=True)):
            if kind == PUT_EXPIRING:
                cells[row] = cells[row][:CELL_HEADER_BYTES] + expiry.to_bytes(8, "big") + rows.values[row]
    return cells


def unpack_cells(keys: list[bytes], cells: list[bytes]) -> Columns:
    """Columns of rows whose keys ascend."""
    kinds = bytes(map(_kind_of, cells))
    versions = b"".join([cell[8:0:-1] for cell in cells])
    if PUT_EXPIRING not in kinds:
        deletes = kinds.count(DELETE) == len(cells)
        values = [b""] * len(cells) if deletes else [cell[CELL_HEADER_BYTES:] for cell in cells]
        return Columns(keys, collapse(kinds, 1), collapse(versions, 8), NO_EXPIRY, values)
    expiring = [kind == PUT_EXPIRING for kind in kinds]
    values = [
        cell[EXPIRING_HEADER_BYTES if long else CELL_HEADER_BYTES :] for cell, long in zip(cells, expiring, strict=True)
    ]
    expiries = [
        int.from_bytes(cell[9:17], "big") if long else NO_EXPIRY for cell, long in zip(cells, expiring, strict=True)
    ]
    return Columns(keys, collapse(kinds, 1), collapse(versions, 8), pack_u64(expiries), values)
