"""`Columns`: a run of rows held as one column per field. Blocks hold it, memtables yield it, merges eat it.

Invariants:
  - keys ascend strictly inside one `Columns`;
  - all columns have one entry per key, or are one int that stands for every row (a collapsed column).

Columns are what makes "Python per batch, C per key" possible: a slice, a bisect, a merge or an encode is one call
into C for all rows. It is a msgspec struct with array layout, so its msgpack form is the body of a data block.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate
from operator import add

import msgspec

# Kinds of cells. On disk in log and tables: never renumber; 0 stays reserved.
PUT = 1
DELETE = 2
DEDUPE = 3  # reserved, not written: records of idempotency tokens are puts that expire, in a tablet of their own
PUT_EXPIRING = 4  # a put that reads as absent once its expiry has come

NO_EXPIRY = 0

SEQNO_BITS = 40
SEQNO_MAX = (1 << SEQNO_BITS) - 1
TERM_MAX = (1 << 24) - 1

_SWAP = sys.byteorder == "big"


def make_version(term: int, seqno: int) -> int:
    """The version of every row of the write request (term, seqno)."""
    return (term << SEQNO_BITS) | seqno


class Columns(msgspec.Struct, array_like=True, gc=False):
    """Rows in key order. See the module for the invariants; `check()` tests the lengths."""

    keys: list[bytes]
    kinds: int | bytes
    """PUT, DELETE...: one int for all rows, or one byte per row."""
    versions: int | bytes
    """One int for all rows, or n little-endian u64."""
    expiries: int | bytes
    """Milliseconds since 1970, 0 = never: one int for all rows, or n little-endian u64."""
    values: list[bytes]
    """b"" for a delete."""

    def __len__(self) -> int:
        return len(self.keys)

    def slice(self, low: int, high: int) -> Columns:
        """Rows [low, high)."""
        kinds, versions, expiries = self.kinds, self.versions, self.expiries
        return Columns(
            self.keys[low:high],
            kinds if isinstance(kinds, int) else kinds[low:high],
            versions if isinstance(versions, int) else versions[8 * low : 8 * high],
            expiries if isinstance(expiries, int) else expiries[8 * low : 8 * high],
            self.values[low:high],
        )

    def kind(self, index: int) -> int:
        kinds = self.kinds
        return kinds if isinstance(kinds, int) else kinds[index]

    def version(self, index: int) -> int:
        return _u64_at(self.versions, index)

    def expiry(self, index: int) -> int:
        return _u64_at(self.expiries, index)

    def check(self) -> str | None:
        """What is wrong with the lengths of the columns, or None. Constant time; keys are not looked at."""
        n, kinds, versions, expiries = len(self.keys), self.kinds, self.versions, self.expiries
        if len(self.values) != n:
            return f"{len(self.values)} values for {n} keys"
        if not isinstance(kinds, int) and len(kinds) != n:
            return f"{len(kinds)} bytes of kinds for {n} keys"
        if not isinstance(versions, int) and len(versions) != 8 * n:
            return f"{len(versions)} bytes of versions for {n} keys"
        if not isinstance(expiries, int) and len(expiries) != 8 * n:
            return f"{len(expiries)} bytes of expiries for {n} keys"
        return None


EMPTY = Columns([], PUT, 0, NO_EXPIRY, [])
"""No rows. Never changed in place."""


def _u64_at(column: int | bytes, index: int) -> int:
    return column if isinstance(column, int) else int.from_bytes(column[8 * index : 8 * index + 8], "little")


def expand_kinds(column: int | bytes, n: int) -> bytes:
    """One byte per row."""
    return bytes((column,)) * n if isinstance(column, int) else column


def expand_u64(column: int | bytes, n: int) -> Sequence[int]:
    """One int per row."""
    if isinstance(column, int):
        return [column] * n
    numbers = array("Q", column)
    if _SWAP:
        numbers.byteswap()
    return numbers


def pack_u64(numbers: Iterable[int]) -> bytes:
    """n little-endian u64."""
    packed = array("Q", numbers)
    if _SWAP:
        packed.byteswap()
    return packed.tobytes()


def collapse(column: bytes, width: int) -> int | bytes:
    """The column as one int when every row holds the same, as it is otherwise. `width`: bytes per row, 1 or 8."""
    first = column[:width]
    n = len(column) // width
    return int.from_bytes(first, "little") if n and first * n == column else column


def row_ends(columns: Columns) -> list[int]:
    """For each row, the bytes of the keys and values up to its end."""
    return list(accumulate(map(add, map(len, columns.keys), map(len, columns.values))))


def concat(parts: Sequence[Columns]) -> Columns:
    """The rows of all parts, one after the other; keys ascend in the result only if they do across the parts.

    Requires: at least one part. May return the part itself.
    """
    if len(parts) == 1:
        return parts[0]
    keys: list[bytes] = []
    values: list[bytes] = []
    for part in parts:
        keys += part.keys
        values += part.values
    return Columns(
        keys,
        _concat_column([part.kinds for part in parts], parts, 1),
        _concat_column([part.versions for part in parts], parts, 8),
        _concat_column([part.expiries for part in parts], parts, 8),
        values,
    )


def _concat_column(columns: list[int | bytes], parts: Sequence[Columns], width: int) -> int | bytes:
    first = columns[0]
    if isinstance(first, int) and columns.count(first) == len(columns):
        return first
    return b"".join(
        column.to_bytes(width, "little") * len(part) if isinstance(column, int) else column
        for column, part in zip(columns, parts, strict=True)
    )
