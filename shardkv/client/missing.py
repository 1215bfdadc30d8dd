"""What a partial result lacks: of which shards, in which range of keys, and why."""

from __future__ import annotations

from dataclasses import dataclass, replace

from shardkv.errors import InvalidArgument, ShardKVError, from_wire
from shardkv.topology.documents import HASH_TOKENS
from shardkv.wire.messages import ShardProblem

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
