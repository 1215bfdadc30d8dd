"""What a log segment says, a window of it at once: most of it as `WriteRun`, so that replay and flush work per run.

A log of single puts has one group, one entry and one row per put. Here consecutive entries of that kind become the
columns of one run; every other entry is handed on as it is. Nothing is reordered, and each entry is checked as
strictly as if it had come alone: a run has one tablet and term, one kind, and seqnos without a gap.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, groupby
from typing import cast

import msgspec

from shardkv.errors import Corruption
from shardkv_node.engine.columns import NO_EXPIRY
from shardkv_node.engine.entries import Entry, WriteEntry, shape_error
from shardkv_node.engine.log_reader import ENTRY_DECODER, GroupRun, SegmentReader
from shardkv_node.engine.vfs import Vfs


class WriteRun(msgspec.Struct, gc=False):
    """Writes of one operation each, into one tablet, without expiry; the first has `seqno`, each further one 1 more."""

    tablet: int
    term: int
    seqno: int
    kind: int
    keys: list[bytes]
    """In the order of the log; a key may stand in it more than once, and the last one wins."""
    values: list[bytes]

    def clip(self, above: int, upto: int) -> None:
        """Leave only the writes with seqnos in (above, upto], maybe none."""
        low, high = max(0, above + 1 - self.seqno), max(0, upto + 1 - self.seqno)
        if low or high < len(self.keys):
            self.keys, self.values = self.keys[low:high], self.values[low:high]
            self.seqno += low


def read_runs(vfs: Vfs, path: str, *, end: int | None = None) -> Iterator[WriteRun | Entry]:
    """The entries of one segment in order, up to `end` (None: the last segment, up to its torn tail if it has one).

    Raises `Corruption`. Holds a window of the file in memory, or one group if that is larger.
    """
    reader: SegmentReader[Entry] = SegmentReader(vfs, path, decoder=ENTRY_DECODER, end=end)
    try:
        for groups in reader.runs():
            for _offset, found in entry_runs(reader, groups):
                yield found
    finally:
        reader.close()


def entry_runs(reader: SegmentReader[Entry], groups: GroupRun) -> Iterator[tuple[int, WriteRun | Entry]]:
    """The entries of these groups in order, each with the offset of the group that it, or its first one, lies in.

    Raises `Corruption` for a payload without known entries, and for one whose columns contradict each other.
    """
    decoded = reader.decode_run(groups)
    entries = list(chain.from_iterable(decoded))
    offsets = groups.offsets
    if len(entries) != len(decoded) or not all(decoded):
        offsets = [offset for offset, inside in zip(offsets, decoded, strict=True) for _ in inside]
    low = 0
    for shape, alike in groupby(map(_shape, entries)):
        high = low + len(list(alike))
        run = _run(cast(list[WriteEntry], entries[low:high]), *shape) if shape is not None and high - low > 1 else None
        if run is not None:
            yield offsets[low], run
        else:
            for offset, entry in zip(offsets[low:high], entries[low:high], strict=True):
                yield offset, _checked(reader.path, offset, entry)
        low = high


def _shape(entry: Entry) -> tuple[int, int, int] | None:
    """What is the same in all entries of a run; None for one that belongs in none."""
    if (
        type(entry) is WriteEntry
        and len(entry.keys) == 1 == len(entry.values)
        and entry.expiries == NO_EXPIRY
        and isinstance(entry.kinds, int)
    ):
        return entry.tablet, entry.term, entry.kinds
    return None


def _run(entries: list[WriteEntry], tablet: int, term: int, kind: int) -> WriteRun | None:
    """Entries of one shape as a run, or None when their seqnos do not follow each other."""
    seqno = entries[0].seqno
    if [entry.seqno for entry in entries] != list(range(seqno, seqno + len(entries))):
        return None
    keys = [entry.keys[0] for entry in entries]
    return WriteRun(tablet, term, seqno, kind, keys, [entry.values[0] for entry in entries])


def _checked(path: str, offset: int, entry: Entry) -> Entry:
    problem = shape_error(entry)
    if problem is not None:
        raise Corruption("A log entry contradicts itself", path=path, offset=offset, expected="n of each", got=problem)
    return entry
