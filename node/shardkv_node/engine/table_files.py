"""`TableFiles`: the open tables of a store, which tablet uses which, and the end of those nobody uses.

Invariants:
  - a file is deleted only after no tablet in the manifest names it and no `pin` holds it: `assign` is called after the
    edit that changed a tablet's tables is durable, never before;
  - a file that several tablets share is one `Table`, with one set of blocks in the cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from shardkv.errors import StorageError
from shardkv_node.engine import filenames
from shardkv_node.engine.block_cache import BlockCache
from shardkv_node.engine.chores import Chores
from shardkv_node.engine.clipped_table import ClippedTable, view
from shardkv_node.engine.open_files import OpenFiles
from shardkv_node.engine.table_meta import TableMeta
from shardkv_node.engine.table_reader import Table
from shardkv_node.engine.vfs import Vfs

_FREED_BLOCKS = 64
"""Blocks freed in one step: some 6,000 objects, half a millisecond."""


class TableFiles:
    """`on_failure` is told of a file that could not be deleted, from wherever chores run; the next open sweeps it."""

    def __init__(
        self,
        vfs: Vfs,
        directory: str,
        cache: BlockCache,
        chores: Chores,
        *,
        open_files_max: int,
        on_failure: Callable[[StorageError], None],
    ) -> None:
        self._vfs = vfs
        self._directory = directory
        self._cache = cache
        self._chores = chores
        self._files = OpenFiles(vfs, open_files_max)
        self._on_failure = on_failure
        self._tables: dict[str, Table] = {}
        self._names: dict[int, set[str]] = {}
        self._users: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._tables)

    def open(self, meta: TableMeta) -> Table:
        """A table not yet in use. Raises `Corruption`, `StorageError`."""
        path = filenames.table_path(self._directory, meta.file_name)
        return Table.open(self._vfs, path, meta, self._cache, self._files)

    def adopt(self, tables: Iterable[Table]) -> None:
        """Keep these, opened by `open`; `assign` or `discard` comes next."""
        self._tables.update((table.meta.file_name, table) for table in tables)

    def open_all(self, levels: Sequence[Sequence[TableMeta]]) -> None:
        """Open and keep what is not open yet."""
        for metas in levels:
            for meta in metas:
                if meta.file_name not in self._tables:
                    self.adopt([self.open(meta)])

    def assign(self, tablet: int, levels: Sequence[Sequence[TableMeta]]) -> list[list[Table | ClippedTable]]:
        """The tablet's tables are these from now on. Deletes files it used and nobody uses any more."""
        before, now = self._names.get(tablet, set()), {meta.file_name for metas in levels for meta in metas}
        self._names[tablet] = now
        self.pin(now - before)
        self.unpin(before - now)
        return [[view(self._tables[meta.file_name], meta) for meta in metas] for metas in levels]

    def forget(self, tablet: int) -> None:
        """The tablet is no more."""
        self.assign(tablet, [])
        del self._names[tablet]

    def pin(self, names: Iterable[str]) -> None:
        """Keep these files until `unpin`, whoever else uses them."""
        self._users.update(names)

    def unpin(self, names: Iterable[str]) -> None:
        """Undo one `pin` of each; deletes those it was the last use of."""
        unused = []
        for name in names:
            self._users[name] -= 1
            if not self._users[name]:
                unused.append(name)
        self.discard(unused)

    def discard(self, names: Iterable[str]) -> None:
        """Close and delete files nobody uses."""
        for name in names:
            self._users.pop(name, None)
            self._free(self._tables.pop(name).close())
            self.remove(filenames.table_path(self._directory, name))

    def _free(self, blocks: list[Any]) -> None:
        def step() -> bool:
            del blocks[-_FREED_BLOCKS:]
            return bool(blocks)

        self._chores.submit(step)

    def remove(self, path: str) -> None:
        """Delete a file nothing needs any more, soon; if the disk will not, the next open sweeps it."""
        self._chores.submit(lambda: self._remove(path))

    def _remove(self, path: str) -> bool:
        try:
            self._vfs.remove(path)
        except StorageError as error:
            self._on_failure(error)
        return False

    def points(self, meta: TableMeta) -> Iterable[tuple[bytes, int]]:
        """Where the bytes of a table in use lie, from its index (`Table.points`), without reading data."""
        return view(self._tables[meta.file_name], meta).points()

    def metas(self) -> list[TableMeta]:
        """What every open file is. May be called from any thread: the copy is one step of the interpreter."""
        return [table.meta for table in list(self._tables.values())]

    def close_all(self) -> None:
        self._files.close_all()
