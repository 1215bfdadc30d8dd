"""`MemtableView`: a memtable as it was when the view was made, however much is written to it since.

Each view has an undo map: for every key that was written while the view was the newest one, the cell before, or None
where there was none. Views of one memtable form a chain, oldest first; a key is looked up in the maps from the view's
own to the newest, then in the memtable. So a write fills one map, however many views there are, and none without any.

Invariant: the first map of the chain, from the view's own on, that knows a key holds its cell at the time of the view.
"""

from __future__ import annotations

from collections.abc import Iterator

from shardkv_node.engine.columns import Columns
from shardkv_node.engine.memtable import Memtable, unpack_cells


class MemtableView:
    """A `Source`. `close` it when nobody reads it any more. Belongs to the owner of the memtable."""

    __slots__ = ("_memtable", "_newer", "_older", "undo")

    def __init__(self, memtable: Memtable) -> None:
        self._memtable = memtable
        self._newer: MemtableView | None = None
        self._older: MemtableView | None = memtable.newest_view
        self.undo: dict[bytes, bytes | None] = {}
        if self._older is not None:
            self._older._newer = self
        memtable.newest_view = self

    def get(self, key: bytes) -> bytes | None:
        """The cell the key had, or None when the memtable did not know it."""
        view: MemtableView | None = self
        while view is not None:
            if key in view.undo:
                return view.undo[key]
            view = view._newer
        return self._memtable.get(key)

    def chunks(self, start: bytes, stop: bytes | None, *, reverse: bool) -> Iterator[Columns]:
        """The rows with keys in [start, stop); see `Source`. The memtable must not change meanwhile."""
        for keys in self._memtable.key_chunks(start, stop, reverse=reverse):
            cells = self.cells_before(keys, self._memtable.cells_of(keys))
            rows = [(key, cell) for key, cell in zip(keys, cells, strict=True) if cell is not None]
            if rows:
                yield unpack_cells([key for key, _ in rows], [cell for _, cell in rows])

    def cells_before(self, keys: list[bytes], cells: list[bytes]) -> list[bytes | None]:
        """Of keys whose cells are these now, the cells they had; None where there was none."""
        before: list[bytes | None] = list(cells)
        for undo in self._undos():
            before = list(map(undo.get, keys, before))
        return before

    def close(self) -> None:
        """Take the view out of the chain; what its map knows passes to the next older one, which may need it."""
        older, newer = self._older, self._newer
        if older is not None:
            older.undo = {**self.undo, **older.undo}
            older._newer = newer
        if newer is not None:
            newer._older = older
        else:
            self._memtable.newest_view = older
        self.undo = {}

    def _undos(self) -> list[dict[bytes, bytes | None]]:
        """The maps of the chain that hold anything, newest first: in this order, the oldest has the last word."""
        found: list[dict[bytes, bytes | None]] = []
        view: MemtableView | None = self
        while view is not None:
            if view.undo:
                found.append(view.undo)
            view = view._newer
        return found[::-1]
