"""`Tail`: the writes applied to a tablet since it was pinned, in order, for the store it moves to.

The store adds each write when it applies it; the asker takes them batch after batch. Asking for what comes after write
number n says that everything up to n has arrived, and lets go of it; until then the same batch can be had again.

    batch = [after, writes]                                             msgpack
    write = [records, term, seqno, keys, kinds, expiries, values]      as `WriteEntry`; records: of the records tablet

Invariants:
  - what is held is bounded in bytes; a tail that would pass the bound drops all it has, says `overflowed` for good, and
    costs nothing more: its asker pins anew;
  - writes of the tablet, and writes of its records tablet, have seqnos without a gap from those of the pin on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice

import msgspec

from shardkv.errors import InvalidArgument, ShardUnavailable
from shardkv_node.engine.columns import SEQNO_BITS, SEQNO_MAX, make_version
from shardkv_node.engine.entries import WriteEntry, shape_error
from shardkv_node.engine.tail_digest import TailDigest, item_hash

TAIL_BYTES_MAX = 64 * 1024 * 1024
BATCH_BYTES = 128 * 1024
"""Of a batch, about: coding or applying one takes a few milliseconds."""
_WRITE_BYTES = 300
_OPERATION_BYTES = 82
"""What a write held, and each of its operations, takes beside keys and values, about."""


class TailWrite(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One write as it was applied. On the wire: fields are added only at the end, with a default."""

    records: bool
    term: int
    seqno: int
    keys: list[bytes]
    kinds: int | bytes
    expiries: int | bytes
    values: list[bytes]

    @property
    def hash(self) -> int:
        """Its item of the digest."""
        version = make_version(self.term, self.seqno)
        return item_hash(version, self.keys, self.kinds, self.expiries, self.values, records=self.records)

    def entry(self, tablet: int) -> WriteEntry:
        """Its log entry, with its own term and seqno, as a write of this tablet."""
        return WriteEntry(tablet, self.term, self.seqno, None, self.keys, self.kinds, self.expiries, self.values)


class TailBatch(msgspec.Struct, array_like=True, frozen=True):
    """Writes number `after` + 1 and the following of a tail, counted from its pin."""

    after: int
    writes: list[TailWrite]


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(TailBatch).decode


def encode_tail(batch: TailBatch) -> bytes:
    return _encode(batch)


def decode_tail(data: bytes) -> TailBatch:
    """Raises `InvalidArgument` for what is no batch."""
    try:
        batch = _decode(data)
    except msgspec.MsgspecError as error:
        raise InvalidArgument(f"This is no batch of a tail: {error}.") from error
    problem = next((found for write in batch.writes if (found := shape_error(write.entry(0))) is not None), None)
    if problem is not None:
        raise InvalidArgument(f"A write of a tail contradicts itself: {problem}.")
    return batch


class Tail:
    """Belongs to the owner of the store. `digest` gets every write once; `on_write`, which must not raise, is called
    after writes came."""

    def __init__(self, digest: TailDigest, *, bytes_max: int = TAIL_BYTES_MAX) -> None:
        self.overflowed = False
        """More came than may be held: not all of it can be had any more."""
        self.added = 0
        """Writes since the pin."""
        self.held_bytes = 0
        """Of writes that are not known to have arrived, about."""
        self.on_write: Callable[[], None] | None = None
        self._digest = digest
        self._bytes_max = bytes_max
        self._held: deque[TailWrite] = deque()
        self._sizes: deque[int] = deque()
        self._digested = 0
        """So many of the writes are in the digest."""

    def add(
        self,
        version: int,
        keys: Sequence[bytes],
        kinds: int | bytes,
        expiries: int | bytes,
        values: Sequence[bytes],
        *,
        records: bool = False,
    ) -> None:
        """Hold a write that was applied. For the store. Requires: nobody changes the lists later."""
        if self.overflowed:
            return
        size = _WRITE_BYTES + _OPERATION_BYTES * len(keys) + sum(map(len, keys)) + sum(map(len, values))
        self.added += 1
        self.held_bytes += size
        if self.held_bytes > self._bytes_max:
            self.overflowed = True
            self.held_bytes = 0
            self._held.clear()
            self._sizes.clear()
            return
        term, seqno = version >> SEQNO_BITS, version & SEQNO_MAX
        self._held.append(TailWrite(records, term, seqno, keys, kinds, expiries, values))  # type: ignore[arg-type]
        self._sizes.append(size)

    def batch(self, after: int, *, bytes_max: int = BATCH_BYTES) -> TailBatch:
        """The writes behind number `after`, of about so many bytes but one at least, or none when there are none yet.

        All up to `after` have arrived. Raises `ShardUnavailable` once the tail has overflowed, `InvalidArgument` for
        a number that is behind what has arrived, or was never given out.
        """
        if self.overflowed:
            raise ShardUnavailable(
                "More was written while the tablet moves than may be held for it.",
                hint="Pin it anew: only files made since then are shipped again.",
            )
        first = self.added - len(self._held)
        if not first <= after <= max(first, self._digested):
            raise InvalidArgument(f"A tail was asked for what follows write {after}; it is at {first}.")
        for _ in range(after - first):
            self._held.popleft()
            self.held_bytes -= self._sizes.popleft()
        taken, count = 0, 0
        for size in self._sizes:
            if count and taken + size > bytes_max:
                break
            taken += size
            count += 1
        writes = list(islice(self._held, count))
        self._digest_upto(after, writes)
        return TailBatch(after, writes)

    def _digest_upto(self, after: int, writes: list[TailWrite]) -> None:
        for write in writes[self._digested - after :]:
            self._digest.add(write.hash)
        self._digested = max(self._digested, after + len(writes))

    @property
    def given(self) -> int:
        """Number of the last write that was given out: all up to it are in the digest."""
        return self._digested
