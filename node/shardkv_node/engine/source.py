"""What a merge reads from (`Source`) and what a scan returns (`Page`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import msgspec

from shardkv_node.engine.columns import Columns


class Source(Protocol):
    """Rows in key order with at most one row per key: a table, a level of disjoint tables, a memtable."""

    def chunks(self, start: bytes, stop: bytes | None, *, reverse: bool) -> Iterator[Columns]:
        """The rows with keys in [start, stop) (None: to the end), deletes included.

        Rows ascend inside a chunk. Chunks come in ascending order, or in descending order when `reverse`.
        A chunk is small: one block, or some 512 rows of a memtable.
        """
        ...


class Page(msgspec.Struct):
    """One bounded piece of a scan, with what it covers.

    `frontier` says where coverage ends. Forward, the page covers [start, frontier) and the next page starts there;
    in reverse it covers [frontier, stop) and the next page stops there; None: all of [start, stop) is covered.
    A page may be empty and still have a frontier, after a long run of deletes.
    """

    keys: list[bytes]
    """Live keys, ascending, or descending in a reverse scan."""
    values: list[bytes]
    """One per key; empty when only keys were asked for."""
    frontier: bytes | None
