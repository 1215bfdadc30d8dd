"""Where the shards of a new keyspace go: a pure plan, made once and written by one transaction."""

from __future__ import annotations

from collections.abc import Sequence

from shardkv.topology.documents import FIRST_EPOCH, Partition, ShardDocument
from shardkv.topology.tokens import initial_starts


def place_keyspace(
    name: str,
    partition: Partition,
    *,
    shards: int,
    split_at: list[bytes],
    nodes: Sequence[str],
    first_id: int,
) -> list[ShardDocument]:
    """The shards of a new keyspace, dealt round robin to `nodes` (at least one) in the order given.

    Ids count up from `first_id`, which must be above every id ever used.
    """
    starts = initial_starts(partition, shards, split_at)
    stops = [*starts[1:], None]
    return [
        ShardDocument(
            id=first_id + number,
            keyspace=name,
            start=start,
            stop=stop,
            epoch=FIRST_EPOCH,
            node=nodes[number % len(nodes)],
        )
        for number, (start, stop) in enumerate(zip(starts, stops, strict=True))
    ]
