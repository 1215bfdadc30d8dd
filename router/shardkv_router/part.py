"""One shard's share of a request on its way to the node that owns the shard: what it asks, by when, who waits for it.

The state of its journey is the `Forwarder`'s, which see.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from shardkv.errors import OutcomeUnknown, ShardKVError
from shardkv.transport.peer import Peer
from shardkv.wire.messages import Op

REFUSED_PAUSE_S = 0.02
REFUSED_PAUSE_MOST_S = 0.16
"""How long to wait before asking a node again that refused a shard it does not know to be its own yet: twice as long
every time, up to the second."""
PART_BYTES = 512
"""What a waiting part takes beside its payload, about."""

OnDone = Callable[[msgspec.Raw | ShardKVError], None]


class Part:
    """One shard's share of a request. `done` runs once, with the reply's payload or an error.

    `repeatable`: whether it may be sent again even when it may have been carried out; None: if it is no write.
    `waits`: for a shard that is away it is parked; otherwise it ends in ShardUnavailable at once.
    """

    __slots__ = (
        "_repeatable",
        "answer_by",
        "asked",
        "deadline",
        "done",
        "doubt",
        "epoch",
        "finished",
        "gives_up_at",
        "op",
        "pause_s",
        "payload",
        "shard_id",
        "waits",
    )

    def __init__(
        self,
        op: Op,
        payload: msgspec.Raw,
        shard_id: int,
        deadline: float | None,
        done: OnDone,
        *,
        repeatable: bool | None = None,
        waits: bool = True,
    ) -> None:
        self.op = op
        self.waits = waits
        self._repeatable = repeatable
        self.payload = payload
        self.shard_id = shard_id
        self.deadline = deadline
        self.done = done
        self.answer_by: float | None = None
        """When an unanswered part is given up, sent or not."""
        self.gives_up_at: float | None = None
        """When a parked part is given up; set when it is parked first."""
        self.asked: tuple[Peer, int] | None = None
        """Who was asked last, and the number of that request there."""
        self.epoch: int | None = None
        """Of the shard, when it was asked last."""
        self.pause_s = REFUSED_PAUSE_S
        self.doubt: OutcomeUnknown | None = None
        """Why it is not known whether the write was applied when it was sent before."""
        self.finished = False

    @property
    def repeatable(self) -> bool:
        return self.op != Op.WRITE if self._repeatable is None else self._repeatable

    @property
    def size_bytes(self) -> int:
        """What it takes to keep it waiting."""
        return len(self.payload) + PART_BYTES
