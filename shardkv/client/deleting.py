"""The call behind `delete_range`: step after step, each asked for where the one before ended. Without I/O.

Invariants: `deleted` counts what the cluster said was deleted, also with an error. A step without a limit is sent again
when its answer was lost: what it deleted is then deleted, but not counted. One with a limit is not: it could delete
more than that.
"""

from __future__ import annotations

from shardkv.client.calls import Call, Lost, State
from shardkv.errors import OutcomeUnknown, RemoteProtocolError, RouterUnavailable, ShardKVError, from_wire
from shardkv.wire.messages import NOTHING, DeleteRange, DeleteRangeReply, Op, decode_delete_range_reply


class DeleteRangeCall(Call):
    """Deletes the keys of [start, stop), at most `limit` of them."""

    def __init__(self, start: bytes, stop: bytes | None, limit: int | None) -> None:
        super().__init__(Op.DELETE_RANGE, NOTHING, decode_delete_range_reply)
        self._start = start
        self._stop = stop
        self._left = limit
        self._in_doubt = False
        """A step was sent whose answer will never come."""
        self.deleted = 0
        self._ask()

    def take_reply(self, reply: DeleteRangeReply) -> None:
        self._count(reply.deleted)
        self.error = None
        if reply.frontier is None or self._left == 0:
            self._done()
            return
        if reply.frontier <= self._start:
            raise RemoteProtocolError(f"A step of a delete covered nothing: it ended at {reply.frontier[:40]!r}.")
        self._start = reply.frontier
        self._ask()

    def refuse(self, error: ShardKVError) -> None:
        self._count(error.detail.get("deleted", 0))
        if self._left == 0:
            self._done()
            return
        self._ask()
        super().refuse(error)

    def lose(self, lost: Lost) -> None:
        if not lost.sent:
            super().lose(lost)
            return
        self._in_doubt = True
        self.error = RouterUnavailable(lost.reason)
        if self._left is not None or lost.timed_out:
            self.state = State.FAILED

    def explained(self, error: ShardKVError) -> ShardKVError:
        """With the number of keys deleted before it; OutcomeUnknown when there may have been more."""
        message, hint = error.message, error.hint
        if self._in_doubt or isinstance(error, OutcomeUnknown):
            message += f" At least {self.deleted} keys of the range were deleted."
            hint = "Delete the range again to go on, if its keys may all go."
        elif self.deleted:
            message += f" {self.deleted} keys of the range were deleted before that."
            hint = "Delete the range again to go on."
        code = OutcomeUnknown.code if self._in_doubt else error.code
        return from_wire(code, message, {**error.detail, "deleted": self.deleted}, hint)

    def _count(self, deleted: int) -> None:
        self.deleted += deleted
        if self._left is not None:
            self._left = max(0, self._left - deleted)

    def _ask(self) -> None:
        self._message = DeleteRange(self._start, self._stop, self._left)
