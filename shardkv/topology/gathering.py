"""Splitting a request over shards and gathering the answers into one reply.

Invariant: the reply is formed once, when the last part has ended. A read fails whole when one part fails (the error
names the shard), unless it may be partial: then shards that are away are missing from it, and named. A write reports
what became of each operation, shard by shard.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from operator import itemgetter

import msgspec

from shardkv.errors import (
    BatchTooLarge,
    DeadlineExceeded,
    InvalidArgument,
    OutcomeUnknown,
    RemoteProtocolError,
    ShardKVError,
    ShardUnavailable,
    UnavailableError,
)
from shardkv.topology.documents import ShardDocument
from shardkv.topology.view import KeyspaceView
from shardkv.wire.messages import (
    PartialReadReply,
    Read,
    ReadReply,
    ShardProblem,
    SharedWrite,
    Write,
    WriteReply,
    WriteResult,
    decode_read_reply,
    decode_write_reply,
    raw,
)

SHARDS_NAMED = 5
"""In an error message."""
DISPENSABLE = (UnavailableError, OutcomeUnknown, DeadlineExceeded)
"""What makes a shard missing from a partial answer, at once. One that is moving is asked again, as for any answer."""

Split = list[tuple[int, list[int]]]
"""(shard id, indexes of its keys in the request), shards in token order, indexes ascending."""


def split_by_shard(view: KeyspaceView, keys: Sequence[bytes]) -> Split:
    """Which keys go to which shard."""
    found = defaultdict[int, list[int]](list)
    for index, position in enumerate(view.positions(keys)):
        found[position].append(index)
    return [(view.shards[position].id, found[position]) for position in sorted(found)]


def pick(column: Sequence[bytes], indexes: list[int]) -> list[bytes]:
    """The items of a column at `indexes`."""
    return [column[indexes[0]]] if len(indexes) == 1 else list(itemgetter(*indexes)(column))


class ReadGather:
    """Gathers a read of several shards; `done` runs once with the reply or the first error.

    More than `bytes_max` of answers are BatchTooLarge, and are not kept. `versions`: they were asked for, too.
    """

    def __init__(
        self,
        count: int,
        parts: int,
        bytes_max: int,
        done: Callable[[ReadReply | ShardKVError], None],
        *,
        versions: bool = False,
    ) -> None:
        self._values: list[bytes | None] = [None] * count
        self._versions = [0] * count if versions else None
        self._room = bytes_max
        self._left = parts
        self._done = done
        self._error: ShardKVError | None = None

    def more(self, parts: int) -> None:
        """So many parts more are to be waited for."""
        self._left += parts

    def part(self, indexes: list[int]) -> Callable[[msgspec.Raw | ShardKVError], None]:
        """The callback of the part that asked for the keys at `indexes`."""

        def ended(answer: msgspec.Raw | ShardKVError) -> None:
            if isinstance(answer, ShardKVError):
                self._fail(answer)
            elif self._fits(len(answer)):
                self._take(indexes, answer)
            self._ended_one()

        return ended

    def _ended_one(self) -> None:
        self._left -= 1
        if not self._left:
            self._done(self._error or self._reply())

    def _reply(self) -> ReadReply:
        return ReadReply(self._values, self._versions)

    def _take(self, indexes: list[int], answer: msgspec.Raw) -> None:
        reply = _read_reply(answer, len(indexes), versions=self._versions is not None)
        if reply is None:
            self._fail(RemoteProtocolError("A node answered a read with something else."))
            return
        for index, value in zip(indexes, reply.values, strict=True):
            self._values[index] = value
        if self._versions is not None:
            for index, version in zip(indexes, reply.versions or (), strict=True):
                self._versions[index] = version

    def _fits(self, size_bytes: int) -> bool:
        """Whether the reply can take this many bytes more; if not, it becomes an error."""
        self._room -= size_bytes
        if self._room < 0:
            message = f"The values of {len(self._values)} keys do not fit into one reply."
            self._fail(BatchTooLarge(message, hint="Ask for fewer keys at once."))
        return self._error is None

    def _fail(self, error: ShardKVError) -> None:
        self._error = self._error or error
        self._values = [None] * len(self._values)


class PartialReadGather(ReadGather):
    """Gathers a read that does without shards that are away."""

    def __init__(
        self,
        count: int,
        parts: int,
        bytes_max: int,
        done: Callable[[ReadReply | ShardKVError], None],
        *,
        versions: bool = False,
    ) -> None:
        super().__init__(count, parts, bytes_max, done, versions=versions)
        self._missing: list[int] = []
        self._problems: list[ShardProblem] = []

    def part_of(self, shard: ShardDocument, indexes: list[int]) -> Callable[[msgspec.Raw | ShardKVError], None]:
        """The callback of the part that asked `shard` for the keys at `indexes`."""
        ended = self.part(indexes)

        def ended_or_missing(answer: msgspec.Raw | ShardKVError) -> None:
            if isinstance(answer, DISPENSABLE):
                self._missing += indexes
                self._problems.append(missing_shard(shard, answer))
                self._ended_one()
            else:
                ended(answer)

        return ended_or_missing

    def _reply(self) -> ReadReply:
        return PartialReadReply(self._values, self._versions, sorted(self._missing), self._problems)


class WriteGather:
    """Gathers a write to several shards; `done` runs once with a reply that tells every operation's fate."""

    def __init__(self, count: int, parts: int, done: Callable[[WriteReply], None]) -> None:
        self._results = bytearray(count)
        self._problems: list[ShardProblem] = []
        self._left = parts
        self._done = done

    def more(self, parts: int) -> None:
        """So many parts more are to be waited for."""
        self._left += parts

    def part(self, shard_id: int, indexes: list[int]) -> Callable[[msgspec.Raw | ShardKVError], None]:
        """The callback of the part with the operations at `indexes`."""

        def ended(answer: msgspec.Raw | ShardKVError) -> None:
            count = len(indexes)
            if isinstance(answer, ShardKVError):
                results = self._failed(shard_id, count, answer)
            else:
                told = _write_results(answer, count)
                results = told if told is not None else self._failed(shard_id, count, _NONSENSE)
            if any(results):
                for index, result in zip(indexes, results, strict=True):
                    self._results[index] = result
            self._left -= 1
            if not self._left:
                self._done(WriteReply(bytes(self._results), None, self._problems))

        return ended

    def _failed(self, shard_id: int, count: int, error: ShardKVError) -> bytes:
        self._problems.append(ShardProblem(shard_id, error.code, error.message, error.detail, error.hint))
        fate = WriteResult.UNKNOWN if isinstance(error, OutcomeUnknown) else WriteResult.REFUSED
        return bytes((fate,)) * count


_NONSENSE = OutcomeUnknown("A node answered a write with something else.", hint="Read the keys before writing again.")


def _read_reply(answer: msgspec.Raw, count: int, *, versions: bool) -> ReadReply | None:
    """A node's reply to a read, or None when it is no such reply or not as long as asked."""
    try:
        reply = decode_read_reply(answer)
    except InvalidArgument:
        return None
    fits = len(reply.values) == count and (not versions or len(reply.versions or ()) == count)
    return reply if fits else None


def _write_results(answer: msgspec.Raw, count: int) -> bytes | None:
    """The results of a node's reply to a write, or None as above."""
    try:
        results = decode_write_reply(answer).results
    except InvalidArgument:
        return None
    return results if len(results) == count else None


def missing_shard(shard: ShardDocument, error: ShardKVError) -> ShardProblem:
    """Why what a shard has is missing from a partial answer; the detail has its tokens."""
    error = as_read(error)
    detail = {**error.detail, "shard": shard.id, "start": shard.start, "stop": shard.stop}
    return ShardProblem(shard.id, error.code, error.message, detail, error.hint)


def as_read(error: ShardKVError) -> ShardKVError:
    """Reading changes nothing: an unknown outcome is just a shard that was away."""
    if isinstance(error, OutcomeUnknown):
        return ShardUnavailable(f"A node went away while it was read: {error.message}")
    return error


def one_shard(view: KeyspaceView, keys: Sequence[bytes], others: Sequence[bytes]) -> int:
    """The shard all these keys are of. Raises InvalidArgument, with a key of each shard, when they are of several."""
    everything = [*keys, *others]
    split = split_by_shard(view, everything)
    if len(split) == 1:
        return split[0][0]
    named = [f"{everything[indexes[0]][:40]!r} is of shard {shard_id}" for shard_id, indexes in split[:SHARDS_NAMED]]
    hint = (
        "Keys with the same {tag} share a shard."
        if view.partition == "hash"
        else "Keys that lie close together mostly do."
    )
    raise InvalidArgument(
        f"A write with conditions keeps to one shard, and its keys are of {len(split)}: {', '.join(named)}.",
        detail={"shards": [shard_id for shard_id, _ in split]},
        hint=hint,
    )


def read_part(read: Read, indexes: list[int]) -> msgspec.Raw:
    """The payload of one shard's share of a read."""
    return raw(Read(pick(read.keys, indexes), read.want_versions))


def write_part(write: Write, indexes: list[int]) -> msgspec.Raw:
    """The payload of one shard's share of a write, which has no conditions."""
    return raw(
        Write(
            token=write.token,
            conditions=None,
            kinds=_picked_kinds(write.kinds, indexes),
            keys=pick(write.keys, indexes),
            values=pick(write.values, indexes),
            want_existed=write.want_existed,
            ttl_ms=write.ttl_ms,
        )
    )


def node_part(write: Write, indexes: list[int], shards: list[tuple[int, int, int]]) -> msgspec.Raw:
    """The payload of a node's share of a write, which has no conditions: of these (shard, epoch, count)."""
    return raw(
        SharedWrite(
            token=write.token,
            conditions=None,
            kinds=_picked_kinds(write.kinds, indexes),
            keys=pick(write.keys, indexes),
            values=pick(write.values, indexes),
            want_existed=write.want_existed,
            ttl_ms=write.ttl_ms,
            shards=shards,
        )
    )


def _picked_kinds(kinds: int | bytes, indexes: list[int]) -> int | bytes:
    return kinds if isinstance(kinds, int) else bytes(map(kinds.__getitem__, indexes))
