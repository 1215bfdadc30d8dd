"""What two nodes say to each other while a shard moves: the node that fetches it asks, its owner answers.

Invariant: every message names the change and the starts of both nodes, and all but the first the round it belongs to;
an owner answers only what fits the change that its newest view of the topology has. So a message of an aborted change,
or of an earlier round, changes nothing.

What the manifest, a slice of the dump and a batch of the tail look like is the storage engine's business; here they
are bytes.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from shardkv.wire.messages import Message, Name, PayloadDecoder

PIECE_BYTES_MAX = 4 * 1024 * 1024
"""Most of a file in one answer: it is the time the loop is away for it."""
WAIT_MS_MAX = 10_000
"""For so long at most a tail is waited for."""

Natural = Annotated[int, msgspec.Meta(ge=0)]


class MoveBegin(Message):
    """Begin a round: pin what the shard has now, and hold what is written from now on. An earlier round ends."""

    change: Name
    shard: int
    source_incarnation: int
    target_incarnation: int
    round: Natural = 0
    """Given by the answer to MOVE_BEGIN."""


class MoveBegun(Message):
    round: int
    manifest: bytes
    """The shard's files and sequence numbers: an `ExportManifest`."""
    dump_rows: int
    """Rows of the dump, about."""


class MoveFile(MoveBegin):
    """A piece of a file of the manifest."""

    name: Name = ""
    offset: Natural = 0
    size: Annotated[int, msgspec.Meta(ge=1, le=PIECE_BYTES_MAX)] = 1


class MovePiece(Message):
    data: bytes
    crc32c: int


class MoveDump(MoveBegin):
    """Slice number `index` of what was in memory at the pin; from 0 on, one after the other."""

    index: Natural = 0


class MoveSlice(Message):
    slice: bytes | None
    """A `DumpSlice`; nil: there are no more."""


class MoveTail(MoveBegin):
    """What was written since the pin, after so many writes, which have all arrived. When there is nothing it is waited
    for, `wait_ms` at most."""

    after: Natural = 0
    wait_ms: Annotated[int, msgspec.Meta(ge=0, le=WAIT_MS_MAX)] = 0


class MoveNumbers(Message):
    """What both sides must agree on before the shard has a new owner."""

    last_seqno: int
    records_seqno: int
    items: int
    """Slices and writes that were handed over."""
    digest: str
    """Of all of them: 32 hex digits."""


class MoveTailReply(Message):
    batch: bytes
    """A `TailBatch`."""
    added: int
    """Writes since the pin: how far there is to go."""
    numbers: MoveNumbers | None = None
    """Once the shard is fenced and this batch is the last."""


class MoveFence(MoveBegin):
    """Take no more requests for the shard, durably, until its epoch rises. Answered when all that were taken before
    have been answered."""


class MoveFenced(Message):
    added: int
    """Writes since the pin; there will be no more."""


class MoveEnd(MoveBegin):
    """The round is not needed any more."""


decode_move_begin = PayloadDecoder(MoveBegin, "move_begin")
decode_move_begun = PayloadDecoder(MoveBegun)
decode_move_file = PayloadDecoder(MoveFile, "move_file")
decode_move_piece = PayloadDecoder(MovePiece)
decode_move_dump = PayloadDecoder(MoveDump, "move_dump")
decode_move_slice = PayloadDecoder(MoveSlice)
decode_move_tail = PayloadDecoder(MoveTail, "move_tail")
decode_move_tail_reply = PayloadDecoder(MoveTailReply)
decode_move_fence = PayloadDecoder(MoveFence, "move_fence")
decode_move_fenced = PayloadDecoder(MoveFenced)
decode_move_end = PayloadDecoder(MoveEnd, "move_end")
