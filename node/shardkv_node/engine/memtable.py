"""`Memtable`: the newest row of each key of one tablet, in memory, until a flush has put it into tables.

A row is one packed `bytes` cell, which the garbage collector does not look into:

    cell = kind:u8 version:u64 big-endian [expiry_ms:u64 big-endian, only in PUT_EXPIRING] value

Invariants:
  - a key is never taken out again (a delete is a cell too), so the newest keys are the last of the dict;
  - `_order` holds the first `len(_order)` keys of the dict, sorted; scans complete it first.

The order costs more than the write itself, so it is fed only once a scan wanted it: the first scan sorts what there
is, and from then on each write feeds it in runs of at most `RUN_KEYS`, so that no later scan finds a long backlog.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from operator import itemgetter

from sortedcontainers import SortedList

from shardkv_node.engine.columns import (
    NO_EXPIRY,
    PUT,
    PUT_EXPIRING,
    Columns,
    collapse,
    expand_kinds,
    expand_u64,
    pack_u64,
)

CHUNK_ROWS_FIRST = 32
CHUNK_ROWS_MOST = 512
"""Chunks grow from the first to the second, so that a scan of a few rows does not pay for hundreds."""
RUN_KEYS = 4096
CELL_HEADER_BYTES = 9
EXPIRING_HEADER_BYTES = 17

KEY_OVERHEAD_BYTES = 33 + 33 + 60
"""Two bytes objects and a slot of the dict."""

_kind_of = itemgetter(0)


class Memtable:
    """Rows of one tablet; a `Source`. Owned by one thread at a time."""

    __slots__ = ("_order", "cells", "ordered", "resident_bytes")

    def __init__(self, *, ordered: bool = False) -> None:
        self.cells: dict[bytes, bytes] = {}
        self.resident_bytes = 0
        """Upper estimate of the memory held. Overwritten values stay counted until the flush, as the log holds them."""
        self.ordered = ordered
        """Scans are expected: writes keep the order up to date."""
        self._order: SortedList = SortedList()

    def __len__(self) -> int:
        return len(self.cells)

    def apply(
        self,
        keys: Sequence[bytes],
        kinds: int | bytes,
        version: int,
        values: Sequence[bytes],
        expiries: int | bytes = NO_EXPIRY,
    ) -> None:
        """Take the operations of one write request, in order. Requires: a version above all before."""
        cells = self.cells
        before = len(cells)
        stamp = version.to_bytes(8, "big")
        if expiries:
            cells.update(zip(keys, pack_cells(kinds, version, expiries, values), strict=True))
        elif isinstance(kinds, int):
            header = bytes((kinds,)) + stamp
            if len(keys) == 1:
                cells[keys[0]] = header + values[0]
            else:
                cells.update(zip(keys, [header + value for value in values], strict=True))
        else:
            headers = {kind: bytes((kind,)) + stamp for kind in set(kinds)}
            packed = [headers[kind] + value for kind, value in zip(kinds, values, strict=True)]
            cells.update(zip(keys, packed, strict=True))
        new = len(cells) - before
        self.resident_bytes += sum(map(len, values)) + CELL_HEADER_BYTES * len(keys)
        if new:
            self.resident_bytes += new * KEY_OVERHEAD_BYTES + sum(map(len, keys))
            if self.ordered and len(cells) - len(self._order) >= RUN_KEYS:
                self._feed_order()

    def get(self, key: bytes) -> bytes | None:
        """The cell of the key, or None when the memtable does not know it."""
        return self.cells.get(key)

    def chunks(self, start: bytes, stop: bytes | None, *, reverse: bool) -> Iterator[Columns]:
        """The rows with keys in [start, stop); see `Source`. The memtable must not change meanwhile."""
        self.ordered = True
        self._feed_order()
        keys = self._order.irange(start, stop, inclusive=(True, False), reverse=reverse)
        rows = CHUNK_ROWS_FIRST
        while run := list(islice(keys, rows)):
            rows = min(4 * rows, CHUNK_ROWS_MOST)
            if reverse:
                run.reverse()
            yield unpack_cells(run, list(map(self.cells.__getitem__, run)))

    def _feed_order(self) -> None:
        backlog = len(self.cells) - len(self._order)
        if not backlog:
            return
        newest = list(islice(reversed(self.cells), backlog))
        if len(self._order) < backlog:
            newest.extend(self._order)
            self._order = SortedList(newest)
        else:
            for low in range(0, backlog, RUN_KEYS):
                self._order.update(newest[low : low + RUN_KEYS])


def cell_version(cell: bytes) -> int:
    return int.from_bytes(cell[1:9], "big")


def cell_value(cell: bytes) -> bytes | None:
    """The value, or None when the cell says that the key does not exist."""
    kind = cell[0]
    if kind == PUT:
        return cell[CELL_HEADER_BYTES:]
    return cell[EXPIRING_HEADER_BYTES:] if kind == PUT_EXPIRING else None


def pack_cells(kinds: int | bytes, version: int, expiries: int | bytes, values: Sequence[bytes]) -> list[bytes]:
    """Cells with their expiries, for the rare request that has some."""
    stamp = version.to_bytes(8, "big")
    rows = zip(expand_kinds(kinds, len(values)), expand_u64(expiries, len(values)), values, strict=True)
    return [
        bytes((kind,)) + stamp + (expiry.to_bytes(8, "big") if kind == PUT_EXPIRING else b"") + value
        for kind, expiry, value in rows
    ]


def unpack_cells(keys: list[bytes], cells: list[bytes]) -> Columns:
    """Columns of rows whose keys ascend."""
    kinds = bytes(map(_kind_of, cells))
    versions = b"".join([cell[8:0:-1] for cell in cells])
    if PUT_EXPIRING not in kinds:
        values = [cell[CELL_HEADER_BYTES:] for cell in cells]
        return Columns(keys, collapse(kinds, 1), collapse(versions, 8), NO_EXPIRY, values)
    expiring = [kind == PUT_EXPIRING for kind in kinds]
    values = [
        cell[EXPIRING_HEADER_BYTES if long else CELL_HEADER_BYTES :] for cell, long in zip(cells, expiring, strict=True)
    ]
    expiries = [
        int.from_bytes(cell[9:17], "big") if long else NO_EXPIRY for cell, long in zip(cells, expiring, strict=True)
    ]
    return Columns(keys, collapse(kinds, 1), collapse(versions, 8), pack_u64(expiries), values)
