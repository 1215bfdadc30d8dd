"""Sequencing: gives the writes of a group their sequence numbers, answers `want_existed`, and makes their log entries.

Pure: nothing is changed but the writes' own result fields, so a group that cannot be logged leaves no trace.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shardkv.errors import InvalidArgument, StorageError
from shardkv_node.engine.columns import NO_EXPIRY, PUT, SEQNO_MAX
from shardkv_node.engine.entries import WriteEntry
from shardkv_node.engine.tablet import Tablet
from shardkv_node.engine.write import Write


def sequence(
    writes: Sequence[Write], tablets: Mapping[int, Tablet], term: int
) -> tuple[list[tuple[Write, Tablet]], list[WriteEntry]]:
    """The writes that can be taken, each with its tablet, and their log entries, in order.

    A write that cannot be taken gets its `error`. Sequence numbers of a tablet follow its `last_seqno` without a gap.
    `existed` is judged against what is applied and what stands earlier in the group.
    """
    accepted: list[tuple[Write, Tablet]] = []
    entries: list[WriteEntry] = []
    next_seqnos: dict[int, int] = {}
    pending: dict[int, dict[bytes, bool]] | None = {} if any(write.want_existed for write in writes) else None
    for write in writes:
        number = write.tablet
        tablet = tablets.get(number)
        if tablet is None:
            write.error = InvalidArgument(f"This store has no tablet {number}.", detail={"tablet": number})
            continue
        seqno = next_seqnos.get(number, tablet.last_seqno) + 1
        if seqno > SEQNO_MAX:
            write.error = StorageError(f"Tablet {number} has used up its {SEQNO_MAX} sequence numbers.")
            continue
        next_seqnos[number] = seqno
        if pending is not None:
            _note_existed(write, tablet, pending.setdefault(number, {}))
        entries.append(WriteEntry(number, term, seqno, write.token, write.keys, write.kinds, NO_EXPIRY, write.values))
        accepted.append((write, tablet))
    return accepted, entries


def _note_existed(write: Write, tablet: Tablet, pending: dict[bytes, bool]) -> None:
    """Fill in `existed` from `pending` (earlier in the group) and the tablet, and note what the write leaves behind."""
    kinds = write.kinds
    each = [kinds] * len(write.keys) if isinstance(kinds, int) else kinds
    existed = []
    for key, kind in zip(write.keys, each, strict=True):
        if write.want_existed:
            before = pending.get(key)
            existed.append(tablet.get(key) is not None if before is None else before)
        pending[key] = kind == PUT
    if write.want_existed:
        write.existed = existed
