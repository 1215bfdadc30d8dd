"""One request and its fate, without I/O: what to send next, what an answer or a broken connection means for it.

A call is WAITING until it is DONE or FAILED; while it waits, `error` is why it has to be sent again (None: go on at
once). Both clients drive calls the same way: send `payload()`, hand the outcome to `settle`, repeat while waiting.

Invariants: a write that may have been applied is sent again only with the token it had, by which it is made once; one
without a token is not sent again. Without an answer, or a refusal for good, it fails with OutcomeUnknown, whatever it
was refused with since. What was refused with a retriable error, or is a read, may be sent again. A call that FAILED
always has an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import msgspec

from shardkv.client.answers import Answer, DecodeAnswer, decode_page_answer, decode_read_answer, decode_write_answer
from shardkv.errors import (
    FINAL_REFUSALS,
    BatchTooLarge,
    DeadlineExceeded,
    OutcomeUnknown,
    RemoteProtocolError,
    RouterUnavailable,
    ShardKVError,
    from_wire,
)
from shardkv.wire.messages import (
    OK,
    Conditions,
    Message,
    Op,
    PartialRead,
    PartialReadReply,
    RawReply,
    Read,
    ReadReply,
    Scan,
    ShardProblem,
    Token,
    Write,
    WriteReply,
    WriteResult,
    decode_page,
    decode_partial_read_reply,
    decode_read_reply,
    decode_write_reply,
    raw,
    reply_error,
)

APPLIED, EXISTED = int(WriteResult.APPLIED), int(WriteResult.APPLIED_EXISTED)
REFUSED, UNKNOWN = int(WriteResult.REFUSED), int(WriteResult.UNKNOWN)
_REFUSED = bytes((REFUSED,))


class State(Enum):
    WAITING = 0
    DONE = 1
    FAILED = 2


@dataclass(frozen=True, slots=True)
class Lost:
    """No answer came: the connection broke, or was never there. `sent`: the request may have arrived."""

    reason: str
    sent: bool
    timed_out: bool = False


Outcome = RawReply | Answer[Any] | Lost | ShardKVError

Payload = Message | msgspec.Raw
"""What a request asks for, encoded already or to be encoded in one go with its frame."""


class Call:
    """A request without special rules: sent until it is answered or refused for good."""

    state = State.WAITING
    error: ShardKVError | None = None
    lane: Lane | None = None
    """That of a write which may be sent again; see `Lanes`."""
    decode_answer: DecodeAnswer | None = None
    """Takes a frame that holds the answer and nothing else; for another it raises UNDECODABLE."""
    op: Op
    result: Any
    _message: Payload
    _decode: Callable[[msgspec.Raw], Any]

    def __init__(self, op: Op, message: Payload, decode: Callable[[msgspec.Raw], Any]) -> None:
        self.op = op
        self._message = message
        self._decode = decode

    def message(self) -> Payload:
        """What to send now, in this turn: it may be changed for the next one."""
        return self._message

    def payload(self) -> msgspec.Raw:
        """`message`, encoded."""
        return raw(self.message())

    def take(self, payload: msgspec.Raw) -> None:
        """An answer came."""
        self.take_reply(self._decode(payload))

    def take_reply(self, reply: Any) -> None:
        """An answer came, and was decoded."""
        self.result = reply
        self._done()

    def refuse(self, error: ShardKVError) -> None:
        """An error came: the request was not applied."""
        self.error = error
        if not error.retriable:
            self.state = State.FAILED

    def lose(self, lost: Lost) -> None:
        """No answer will come."""
        if not lost.timed_out:
            self.error = RouterUnavailable(lost.reason)

    def give_up(self, error: ShardKVError) -> None:
        """It could not be sent, and will not be."""
        self.state, self.error = State.FAILED, error

    def expire(self, timeout_s: float) -> None:
        """The time ran out while it waited; the last refusal says more than that it did."""
        self.state = State.FAILED
        self.error = self.error or DeadlineExceeded(f"No answer came within {timeout_s:g} s.")

    def explained(self, error: ShardKVError) -> ShardKVError:
        """The error this call failed with, as its caller is told: what was done before may be added."""
        return error

    def _done(self) -> None:
        self.state = State.DONE
        self.error = None


class ReadCall(Call):
    """Values of keys. A reply that does not fit in a frame is asked for again in halves."""

    op = Op.READ
    decode_answer: DecodeAnswer | None = staticmethod(decode_read_answer)
    _decode = staticmethod(decode_read_reply)
    want_versions: ClassVar[bool] = False
    values: Sequence[bytes | None] = ()
    _parts: list[tuple[int, int]] | None = None
    """What is still to be asked for, when that is not all at once."""

    def __init__(self, keys: list[bytes]) -> None:
        self.keys = keys
        self._message = Read(keys)

    def take_reply(self, reply: ReadReply) -> None:
        start, stop = self._asked
        if len(reply.values) != stop - start:
            raise RemoteProtocolError(f"The reply has {len(reply.values)} values for {stop - start} keys.")
        if reply.versions is not None:
            self.take_versions(reply.versions)
        if self._parts is None:
            self.values = reply.values
            self._done()
            return
        self.values = [*self.values, *reply.values]
        self._parts.pop()
        self.error = None
        if self._parts:
            self._ask_next()
        else:
            self._done()

    def take_versions(self, versions: list[int]) -> None:
        """Nobody asked for them."""

    def refuse(self, error: ShardKVError) -> None:
        start, stop = self._asked
        if isinstance(error, BatchTooLarge) and stop - start > 1:
            middle = (start + stop) // 2
            self._parts = [*(self._parts or ())[:-1], (middle, stop), (start, middle)]
            self._ask_next()
        else:
            super().refuse(error)

    @property
    def _asked(self) -> tuple[int, int]:
        """The places of the keys that are asked for now."""
        return self._parts[-1] if self._parts else (0, len(self.keys))

    def _ask_next(self) -> None:
        start, stop = self._asked
        self._message = Read(self.keys[start:stop], self.want_versions)


class VersionedReadCall(ReadCall):
    """Values of keys and their versions, 0 where there is no value."""

    want_versions = True

    def __init__(self, keys: list[bytes]) -> None:
        super().__init__(keys)
        self.versions: list[int] = []
        self._ask_next()

    def take_versions(self, versions: list[int]) -> None:
        self.versions += versions

    def _done(self) -> None:
        if len(self.versions) != len(self.keys):
            raise RemoteProtocolError("The reply to a read of versions does not have one for each key.")
        super()._done()


class PartialReadCall(ReadCall):
    """Values of keys, and versions when they are wanted, without those of shards that cannot be read now."""

    decode_answer = None
    _decode = staticmethod(decode_partial_read_reply)

    def __init__(self, keys: list[bytes], *, with_versions: bool) -> None:
        super().__init__(keys)
        self._with_versions = with_versions
        self.versions: list[int] = []
        self.lacking: set[int] = set()
        """The places of keys that were not read."""
        self.problems: list[ShardProblem] = []
        """Why."""
        self._ask_next()

    def take_reply(self, reply: ReadReply) -> None:
        assert isinstance(reply, PartialReadReply)
        start, _ = self._asked
        if (reply.missing or reply.problems) and not (
            reply.problems and max(reply.missing, default=len(reply.values)) < len(reply.values)
        ):
            raise RemoteProtocolError("A partial reply does not say which keys are missing, or not why.")
        self.lacking.update(start + place for place in reply.missing)
        self.problems += reply.problems
        super().take_reply(reply)

    def take_versions(self, versions: list[int]) -> None:
        self.versions += versions

    def _ask_next(self) -> None:
        start, stop = self._asked
        self._message = PartialRead(self.keys[start:stop], self._with_versions, partial=True)


class PageCall(Call):
    """One page of a scan. When values are so large that a page does not fit in a frame, a single row is asked for."""

    decode_answer = staticmethod(decode_page_answer)

    def __init__(self, scan: Scan) -> None:
        super().__init__(Op.SCAN, scan, decode_page)
        self._scan = scan

    def refuse(self, error: ShardKVError) -> None:
        if isinstance(error, BatchTooLarge) and self._scan.limit > 1:
            self._message = self._scan = msgspec.structs.replace(self._scan, limit=1)
        else:
            super().refuse(error)


class Lane:
    """One sequence of writes, one after the other; see `Lanes`."""

    __slots__ = ("_number", "name")

    def __init__(self, name: bytes) -> None:
        self.name = name
        self._number = 0

    def next_token(self) -> Token:
        """That of the next write."""
        self._number += 1
        return Token(self.name, self._number)


class WriteCall(Call):
    """Puts and deletes, or an incr. `results` holds one WriteResult for each, in order; what was refused is sent again
    alone.

    The operations of one shard are applied or refused together, so sending the refused ones keeps shards atomic.
    `may_cut`: nothing need be atomic, so what the cluster finds too large is sent in halves.
    """

    op = Op.WRITE
    decode_answer = staticmethod(decode_write_answer)
    _decode = staticmethod(decode_write_reply)
    doubt: OutcomeUnknown | None = None
    """Why it is not known what became of the operations whose result is UNKNOWN."""
    reply: WriteReply | None = None
    """When one reply told of all operations."""
    problems: Sequence[ShardProblem] = ()
    _later: Sequence[Sequence[int]] = ()

    def __init__(
        self,
        kinds: int | bytes,
        keys: list[bytes],
        values: list[bytes],
        *,
        want_existed: bool,
        may_cut: bool = False,
        conditions: Conditions | None = None,
        ttl_ms: int | None = None,
    ) -> None:
        self._message = self._write = Write(None, conditions, kinds, keys, values, want_existed, ttl_ms)
        self.results = bytearray(_REFUSED) * len(keys)
        self._may_cut = may_cut
        self._pending: Sequence[int] = range(len(keys))

    def use(self, lane: Lane) -> None:
        """Send the writes of this call in this lane, so that they may be sent again. Before the first is sent."""
        self.lane = lane
        self._write.token = lane.next_token()

    def take_reply(self, reply: WriteReply) -> None:
        if len(reply.results) != len(self._pending):
            raise RemoteProtocolError(f"The reply has {len(reply.results)} results for {len(self._pending)} writes.")
        whole = len(self._pending) == len(self.results)
        if whole and self.doubt is None:
            self.results[:] = reply.results
        else:
            for index, result in zip(self._pending, reply.results, strict=True):
                if result != REFUSED or self.results[index] != UNKNOWN:  # a refusal does not say what was made before
                    self.results[index] = result
        if whole:
            self.reply = reply
        if max(reply.results) >= REFUSED:
            self._take_problems(reply.problems)
        elif self._later:
            *self._later, indexes = self._later
            self._ask_for(indexes)
        else:
            self._done()

    def _take_problems(self, problems: list[ShardProblem]) -> None:
        self.problems = problems
        errors = [
            from_wire(told.code, told.message, {"shard": told.shard, **told.detail}, told.hint) for told in problems
        ]
        self.error = _worst(errors) if errors else RemoteProtocolError("A write was refused and nothing says why.")
        in_doubt = UNKNOWN in self.results
        if in_doubt and self.doubt is None:
            unknown = [error for error in errors if isinstance(error, OutcomeUnknown)]
            self.doubt = unknown[0] if unknown else OutcomeUnknown("Nothing says what became of a write.")
        if not all(error.retriable or isinstance(error, OutcomeUnknown) for error in errors) or (
            in_doubt and self.lane is None
        ):
            self.give_up(self.error)
        elif in_doubt:
            self._ask_again([index for index in self._pending if self.results[index] in (REFUSED, UNKNOWN)])
        else:
            self._later = ()
            self._ask_for([index for index, result in enumerate(self.results) if result == REFUSED])

    def _ask_for(self, indexes: Sequence[int]) -> None:
        """Send these operations next, which were not applied."""
        self.doubt = None
        self._ask(indexes, self.lane.next_token() if self.lane is not None else None)

    def _ask_again(self, indexes: Sequence[int]) -> None:
        """Send these operations next, all or some of which may have been applied: with the token they had.

        All of a shard's, or none, so that they are what its record of the token is about.
        """
        token = self._write.token
        self._ask(indexes, token and Token(token.lane, token.number, again=True))

    def _ask(self, indexes: Sequence[int], token: Token | None) -> None:
        self._pending = indexes
        write = self._write
        write.token = token
        self._message = write
        if len(indexes) < len(write.keys):
            self._message = msgspec.structs.replace(
                write,
                kinds=write.kinds if isinstance(write.kinds, int) else bytes(map(write.kinds.__getitem__, indexes)),
                keys=[write.keys[index] for index in indexes],
                values=[write.values[index] for index in indexes],
            )

    def refuse(self, error: ShardKVError) -> None:
        if isinstance(error, OutcomeUnknown):
            self._be_in_doubt(error)
        elif self.doubt is not None and not isinstance(error, FINAL_REFUSALS):
            self.error = error
            if not error.retriable:
                self.give_up(error)
        elif self._may_cut and isinstance(error, BatchTooLarge) and len(self._pending) > 1:
            middle = len(self._pending) // 2
            self._later = [*self._later, self._pending[middle:]]
            self._ask_for(self._pending[:middle])
        else:
            self._mark(REFUSED)
            super().refuse(error)

    def lose(self, lost: Lost) -> None:
        if not lost.sent:
            super().lose(lost)
            return
        unknown = OutcomeUnknown(
            f"{lost.reason} The write may or may not have been applied.",
            hint="Read the key to find out, or write it again if that does no harm.",
        )
        self._be_in_doubt(unknown)
        if lost.timed_out:
            self.give_up(unknown)

    def give_up(self, error: ShardKVError) -> None:
        super().give_up(self.doubt or error)

    def expire(self, timeout_s: float) -> None:
        super().expire(timeout_s)
        self.error = self.doubt or self.error

    def _be_in_doubt(self, error: OutcomeUnknown) -> None:
        """What was sent may have been applied: send it again, if that cannot apply it twice."""
        self._mark(UNKNOWN)
        self.doubt = self.error = error
        if self.lane is None:
            self.state = State.FAILED
        else:
            self._ask_again(self._pending)

    def _mark(self, result: int) -> None:
        for index in self._pending:
            self.results[index] = result


def settle(call: Call, outcome: Outcome) -> None:
    """Tell `call` what came of sending it."""
    try:
        if type(outcome) is Answer:
            call.take_reply(outcome.payload)
        elif isinstance(outcome, Lost):
            call.lose(outcome)
        elif isinstance(outcome, ShardKVError):
            call.refuse(outcome)
        elif outcome.status == OK:
            call.take(outcome.payload)
        else:
            call.refuse(reply_error(outcome.payload))
    except ShardKVError as error:
        call.lose(Lost(f"The answer cannot be read: {error.message}", sent=True))
        call.state, call.error = State.FAILED, call.error if isinstance(call, WriteCall) else error


def raise_failure(calls: Sequence[Call]) -> None:
    """Raises the worst error of the calls that failed: an unknown outcome before a refusal.

    For writes its detail has `applied`, `refused`, `unknown` (operations of all calls) and `shards` (those to blame).
    """
    errors = [call.error for call in calls if call.state is State.FAILED and call.error is not None]
    if not errors:
        return
    writes = [call for call in calls if isinstance(call, WriteCall)]
    errors += [write.doubt for write in writes if write.state is State.WAITING and write.doubt is not None]
    error = _worst(errors)
    raise _with_counts(error, writes) if writes else calls[0].explained(error)


def _worst(errors: Sequence[ShardKVError]) -> ShardKVError:
    lasting = [error for error in errors if not error.retriable]
    unknown = [error for error in lasting if isinstance(error, OutcomeUnknown)]
    return (unknown or lasting or list(errors))[0]


def _with_counts(error: ShardKVError, writes: Sequence[WriteCall]) -> ShardKVError:
    counts = Counter[int]()
    for write in writes:
        counts.update(write.results)
    applied, refused, unknown = counts[APPLIED] + counts[EXISTED], counts[REFUSED], counts[UNKNOWN]
    shards = {problem.shard for write in writes for problem in write.problems if write.state is State.FAILED}
    if isinstance(error.detail.get("shard"), int):
        shards.add(error.detail["shard"])
    shards.update(error.detail.get("shards", ()))
    counted = {"applied": applied, "refused": refused, "unknown": unknown, "shards": sorted(shards)}
    message = error.message
    total = applied + refused + unknown
    if total > 1:
        message += f" Of {total} operations {applied} were applied, {refused} were not, {unknown} may have been."
    return from_wire(error.code, message, {**error.detail, **counted}, error.hint)
