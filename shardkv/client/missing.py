"""Partial results, and what they lack: of which shards, in which range of keys, and why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Self, TypeVar

from shardkv.errors import InvalidArgument, ShardKVError, from_wire
from shardkv.topology.documents import HASH_TOKENS
from shardkv.wire.messages import ShardProblem

Key = TypeVar("Key")
Value = TypeVar("Value")

FAIL, PARTIAL = "fail", "partial"
"""The values of `on_shard_error`."""


@dataclass(frozen=True, slots=True)
class Missing:
    """The keys of one shard in [start, stop), `stop` None for no end: not read, whether they exist or not."""

    shard: int
    start: bytes
    stop: bytes | None
    tokens: tuple[int, int] | None
    """In a hash keyspace, the half-open range of the shard's tokens: a key is missing if its token
    (`shardkv.topology.tokens.hash_token`) is in it. None in a range keyspace: there [start, stop) says it all."""
    error: ShardKVError
    """Why."""


class PartialDict(dict[Key, Value]):
    """What could be read, by key. A key that could not is not in it; one that does not exist is, with None."""

    __slots__ = ("missing",)

    def __init__(self, items: Iterable[tuple[Key, Value]] = (), missing: Sequence[Missing] = ()) -> None:
        super().__init__(items)
        self.missing = list(missing)
        """Of which shards keys were asked for that could not be read, each shard once; empty: all were read."""


class PartialCount(int):
    """How many keys the shards hold that could be counted."""

    missing: list[Missing]
    """What was not counted; empty: all was."""

    def __new__(cls, count: int = 0, missing: Sequence[Missing] = ()) -> Self:
        made = super().__new__(cls, count)
        made.missing = list(missing)
        return made


def missing_of(problem: ShardProblem, start: bytes, stop: bytes | None) -> Missing:
    """What a page that covers [start, stop) lacks because of this problem."""
    error = from_wire(problem.code, problem.message, problem.detail, problem.hint)
    low, high = problem.detail.get("start"), problem.detail.get("stop")
    if isinstance(low, bytes):
        end = high if isinstance(high, bytes) else None
        ends = [bound for bound in (stop, end) if bound is not None]
        return Missing(problem.shard, max(start, low), min(ends, default=None), None, error)
    tokens = (low, high if isinstance(high, int) else HASH_TOKENS) if isinstance(low, int) else (0, HASH_TOKENS)
    return Missing(problem.shard, start, stop, tokens, error)


def add_missing(known: list[Missing], more: Missing) -> None:
    """Note it, as one with what is known of the same shard when the two ranges touch."""
    for index, other in enumerate(known):
        if other.shard != more.shard:
            continue
        if other.stop is not None and other.stop == more.start:
            known[index] = replace(other, stop=more.stop)
            return
        if more.stop is not None and more.stop == other.start:
            known[index] = replace(other, start=more.start)
            return
    known.append(more)


def wants_partial(on_shard_error: object) -> bool:
    """Whether a call may do without some shards. Raises InvalidArgument."""
    if on_shard_error not in (FAIL, PARTIAL):
        raise InvalidArgument(f'on_shard_error is "{FAIL}" or "{PARTIAL}", not {on_shard_error!r}.')
    return on_shard_error == PARTIAL
