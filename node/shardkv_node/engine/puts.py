"""`Puts`: write requests that only put, as columns, on their way through the store together.

Most requests are of this kind, and of one put each. Each request is logged, gets its version and is answered as if it
had come alone, only without an object and a few calls of its own. Whatever needs a look at one of them alone is a
`Write`: `apart` makes them.

Invariant: two puts of one key are in the order in which they came, in the log, in their versions and in the memtable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shardkv_node.engine.columns import NO_EXPIRY, PUT, SEQNO_MAX, make_version
from shardkv_node.engine.entries import WRITE, Token
from shardkv_node.engine.memtable import CELL_HEADER_BYTES, KEY_OVERHEAD_BYTES, Memtable
from shardkv_node.engine.tablet import Tablet

if TYPE_CHECKING:
    from shardkv_node.engine.write import Write

SEQNO_PLENTY = SEQNO_MAX - (1 << 24)
"""Up to here more numbers are left than any group has writes; beyond, each write is looked at alone."""
_PUT_STAMP = PUT << 64


@dataclass(slots=True, eq=False)
class Puts:
    """One request for each index: no conditions, no expiry, `existed` is not asked for. The caller has checked keys and
    values."""

    numbers: list[int]
    """Of the tablets."""
    keys: list[list[bytes]]
    values: list[list[bytes]]
    """One for each key."""
    apart: Callable[[], list[Write]]
    """The same requests as single writes, which are answered one by one; then `done` is not called."""
    done: Callable[[Puts], None]
    """Called once all of them were applied."""
    tokens: Sequence[Token | None] | None = None
    """None: no request has one."""

    tablets: list[Tablet] = field(default_factory=list)
    """Given at sequencing, as are the versions."""
    versions: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        """How many requests."""
        return len(self.keys)


def all_take(puts: Puts, tablets: Mapping[int, Tablet]) -> bool:
    """Whether every tablet is there and takes so many writes."""
    found = map(tablets.get, set(puts.numbers))
    return all(tablet is not None and not tablet.fenced and tablet.last_seqno < SEQNO_PLENTY for tablet in found)


def sequence_puts(
    puts: Puts, tablets: Mapping[int, Tablet], seqnos: MutableMapping[int, int], term: int
) -> list[tuple[object, ...]]:
    """Give each request its tablet and version; returns their log entries, each with the fields of a `WriteEntry`.

    `seqnos`: the last one given in this group, by tablet; kept up to date. Requires: `all_take`.
    """
    puts.tablets = [tablets[number] for number in puts.numbers]
    entries: list[tuple[object, ...]] = []
    versions = puts.versions = []
    first = make_version(term, 0)
    for number, tablet, keys, values in zip(puts.numbers, puts.tablets, puts.keys, puts.values, strict=True):
        seqnos[number] = seqno = seqnos.get(number, tablet.last_seqno) + 1
        versions.append(first | seqno)
        entries.append((WRITE, number, term, seqno, None, keys, PUT, NO_EXPIRY, values))
    return entries


def apply_puts(puts: Puts) -> int:
    """Make them visible; returns the bytes of memory they take. Requires: logged."""
    _forget_rows(puts.tablets, puts.keys)
    memtables = [tablet.active for tablet in puts.tablets]
    before = {memtable: memtable.resident_bytes for memtable in memtables}
    grown: dict[Memtable, int] = {}
    for memtable, keys, version, values in zip(memtables, puts.keys, puts.versions, puts.values, strict=True):
        if len(keys) > 1 or memtable.full_parts or memtable.newest_view is not None:
            memtable.apply(keys, PUT, version, values)
            continue
        cells, key, value = memtable.cells, keys[0], values[0]
        taken = len(value) + CELL_HEADER_BYTES
        if key not in cells:
            taken += len(key) + KEY_OVERHEAD_BYTES
            grown[memtable] = grown.get(memtable, 0) + 1
        cells[key] = (_PUT_STAMP | version).to_bytes(CELL_HEADER_BYTES, "big") + value
        memtable.resident_bytes += taken
    for memtable, count in grown.items():
        memtable.note_put(count, 0)
    return sum(memtable.resident_bytes - resident for memtable, resident in before.items())


def _forget_rows(tablets: Sequence[Tablet], written: Sequence[list[bytes]]) -> None:
    """What the row caches hold of these keys is old."""
    if any(tablet.rows is not None and tablet.rows.values for tablet in set(tablets)):
        for tablet, keys in zip(tablets, written, strict=True):
            if tablet.rows is not None and tablet.rows.values:
                tablet.rows.forget(keys)
