"""`MemoryDump`: what a tablet has in memory and in no table, as it is at one moment, slice by slice.

    slice = [index, records, rows]          msgpack; rows = Columns (keys, kinds, versions, expiries, values)

Memtables come oldest first, so of a key that comes twice the later row is the newest. A slice is some 2,000 rows, or
less when they are large: making one takes a few milliseconds, in which nobody else is served. Rows are in key order
inside a slice only; order over all of them would make the memtables sort, and go on sorting, what nobody scans.

Invariant: the rows given are those of the moment, however much is written meanwhile; what is written is noted by the
memtable for as long as the dump is not closed, so it should not be left open for long.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import msgspec

from shardkv.errors import InvalidArgument
from shardkv_node.engine.columns import Columns
from shardkv_node.engine.dismantling import Dismantler
from shardkv_node.engine.memtable import Memtable, unpack_cells
from shardkv_node.engine.memtable_view import MemtableView
from shardkv_node.engine.tablet import Tablet
from shardkv_node.engine.tail_digest import item_hash

SLICE_ROWS = 2048
SLICE_BYTES = 256 * 1024


class DumpSlice(msgspec.Struct, array_like=True, frozen=True):
    """On the wire: fields are added only at the end, with a default."""

    index: int
    """From 0 on."""
    records: bool
    """The rows are of the records tablet."""
    rows: Columns

    @property
    def hash(self) -> int:
        """Its item of the digest."""
        rows = self.rows
        return item_hash(rows.versions, rows.keys, rows.kinds, rows.expiries, rows.values, records=self.records)


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(DumpSlice).decode


def encode_slice(found: DumpSlice) -> bytes:
    return _encode(found)


def decode_slice(data: bytes) -> DumpSlice:
    """Raises `InvalidArgument` for what is no slice of a dump."""
    try:
        found = _decode(data)
    except msgspec.MsgspecError as error:
        raise InvalidArgument(f"This is no slice of a dump: {error}.") from error
    problem = found.rows.check() or _disorder(found.rows.keys)
    if problem is not None:
        raise InvalidArgument(f"A slice of a dump contradicts itself: {problem}.")
    return found


def _disorder(keys: list[bytes]) -> str | None:
    return None if all(map(bytes.__lt__, keys, keys[1:])) else "its keys do not ascend"


class MemoryDump:
    """Made by `Store.pin_tablet`. Belongs to the owner of the store."""

    def __init__(self, tablets: list[Tablet], dismantler: Dismantler) -> None:
        """Of a tablet, and of the one with its records."""
        self._dismantler = dismantler
        self._pinned: list[Memtable] = []
        self._views: list[MemtableView] = []
        self._slices = self._all([(bool(tablet.records_of), self._pin(tablet)) for tablet in tablets])
        self._last: DumpSlice | None = None
        self._given = 0
        self._ended = False
        self.rows = sum(map(len, self._pinned))
        """How many rows it is, about."""

    def slice(self, index: int) -> DumpSlice | None:
        """Slice number `index`, from 0 on: the next one, or once more the one before. None: there are no more.

        Raises `InvalidArgument` for another one.
        """
        if self._last is not None and index == self._last.index:
            return self._last
        if index != self._given:
            raise InvalidArgument(f"A dump was asked for slice {index}; the next one is {self._given}.")
        if self._ended:
            return None
        found = next(self._slices, None)
        if found is None:
            self.close()
            return None
        self._last = DumpSlice(index, *found)
        self._given += 1
        return self._last

    def close(self) -> None:
        """Let go of the memtables. Safe to call twice."""
        self._ended = True
        self._slices = iter(())
        self._last = None
        for view in self._views:
            view.close()
        for memtable in self._pinned:
            self._dismantler.unpin(memtable)
        self._views, self._pinned = [], []

    def _pin(self, tablet: Tablet) -> list[tuple[dict[bytes, bytes], MemtableView | None]]:
        """The parts of its memtables, oldest first; the active ones with the view that knows how they were."""
        parts: list[tuple[dict[bytes, bytes], MemtableView | None]] = []
        for memtable in tablet.memtables():
            if not memtable:
                continue
            memtable.pins += 1
            self._pinned.append(memtable)
            view = MemtableView(memtable) if memtable is tablet.active else None
            if view is not None:
                self._views.append(view)
            parts += [(part, view) for part in (*memtable.full_parts, memtable.cells)]
        return parts

    def _all(
        self, tablets: list[tuple[bool, list[tuple[dict[bytes, bytes], MemtableView | None]]]]
    ) -> Iterator[tuple[bool, Columns]]:
        for records, parts in tablets:
            for part, view in parts:
                keys = list(part)  # it may grow meanwhile
                low = 0
                while low < len(keys):
                    some = keys[low : low + SLICE_ROWS]
                    cells = list(map(part.__getitem__, some))
                    taken = _fitting(some, cells)
                    low += taken
                    rows = _rows(some[:taken], cells[:taken], view)
                    if rows is not None:
                        yield records, rows


def _fitting(keys: list[bytes], cells: list[bytes]) -> int:
    """How many of the first rows make a slice: one at least."""
    for count, size in enumerate(accumulate(len(key) + len(cell) for key, cell in zip(keys, cells, strict=True))):
        if size > SLICE_BYTES:
            return max(1, count)
    return len(keys)


def _rows(keys: list[bytes], cells: list[bytes], view: MemtableView | None) -> Columns | None:
    """These rows as they were, in key order; None where none of them was there."""
    before = cells if view is None else view.cells_before(keys, cells)
    rows = sorted((key, cell) for key, cell in zip(keys, before, strict=True) if cell is not None)
    return unpack_cells([key for key, _ in rows], [cell for _, cell in rows]) if rows else None
