"""The transactions of a change: begin, commit, abort. One of the last two ends it, whoever sends it.

Invariants: both compare the revisions of every shard that carries the change, so exactly one is applied; both raise
the epoch. A function that finds the change over returns None: its sender waits for a newer view, and learns there
what became of it. Sending the same transaction again settles one whose outcome is not known.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from shardkv.control.draft import Draft
from shardkv.errors import InvalidArgument
from shardkv.topology.documents import (
    NODES,
    SHARD_ID_COUNTER,
    SHARDS,
    WANTED,
    Change,
    CounterDocument,
    ShardDocument,
    TopologyBound,
)
from shardkv.topology.view import Topology
from shardkv.wire.messages import MetaTxn

PARENTS_MAX = 64
"""Ancestors a shard lists, until the controller finds that nobody has a tablet of them. A node that missed more splits
and merges than that keeps what it has of older ones, and reports it."""


# Begin


def begin_move(
    draft: Draft, shard: ShardDocument, target: str, *, job: int, change: str, rate_bytes_s: int = 0
) -> None:
    """Let `target` fetch a shard. Requires: the target is registered and is not the owner."""
    _check_free(shard)
    nodes = draft.topology.nodes
    draft.rest_on(f"{NODES}{shard.node}", f"{NODES}{target}", f"{WANTED}{target}")
    begun = Change(
        id=change,
        kind="move",
        job=job,
        source_incarnation=nodes[shard.node].incarnation,
        target=target,
        target_incarnation=nodes[target].incarnation,
        rate_bytes_s=rate_bytes_s,
    )
    draft.put_shard(msgspec.structs.replace(shard, change=begun))


def begin_split(
    draft: Draft, shard: ShardDocument, at: TopologyBound, *, job: int, change: str, rate_bytes_s: int = 0
) -> None:
    """Let the owner of a shard make two of it, the upper one from token `at` on."""
    _check_free(shard)
    check_split_at(shard, at)
    children = _new_shard_ids(draft, 2)
    draft.rest_on(f"{NODES}{shard.node}")
    begun = Change(
        id=change,
        kind="split",
        job=job,
        source_incarnation=draft.topology.nodes[shard.node].incarnation,
        at=at,
        children=children,
        rate_bytes_s=rate_bytes_s,
    )
    draft.put_shard(msgspec.structs.replace(shard, change=begun))


def begin_merge(
    draft: Draft, left: ShardDocument, right: ShardDocument, *, job: int, change: str, rate_bytes_s: int = 0
) -> None:
    """Let the owner of two neighbours make one of them. Both carry the change."""
    for shard in (left, right):
        _check_free(shard)
    check_neighbours(left, right)
    if left.node != right.node:
        raise InvalidArgument(f"Shards {left.id} and {right.id} are on two nodes; one of them has to move first.")
    child = _new_shard_ids(draft, 1)
    draft.rest_on(f"{NODES}{left.node}")
    incarnation = draft.topology.nodes[left.node].incarnation
    for shard, partner in ((left, right), (right, left)):
        begun = Change(
            id=change,
            kind="merge",
            job=job,
            source_incarnation=incarnation,
            children=child,
            partner=partner.id,
            rate_bytes_s=rate_bytes_s,
        )
        draft.put_shard(msgspec.structs.replace(shard, change=begun))


def check_split_at(shard: ShardDocument, at: TopologyBound) -> None:
    """Raises InvalidArgument for a token that does not cut a shard into two."""
    inside = isinstance(at, type(shard.start)) and shard.start < at  # type: ignore[operator]
    if not inside or (shard.stop is not None and at >= shard.stop):  # type: ignore[operator]
        raise InvalidArgument(f"Shard {shard.id} cannot be split at {at!r}: that is not inside of it.")


def check_neighbours(left: ShardDocument, right: ShardDocument) -> None:
    """Raises InvalidArgument unless `right` begins where `left` stops."""
    if left.keyspace != right.keyspace or left.stop is None or left.stop != right.start:
        raise InvalidArgument(
            f"Shards {left.id} and {right.id} are no neighbours: the second must begin where the first stops."
        )


def _check_free(shard: ShardDocument) -> None:
    if shard.change is not None or shard.dropped:
        raise InvalidArgument(f"Shard {shard.id} is {'being dropped' if shard.dropped else 'in a change already'}.")


def _new_shard_ids(draft: Draft, count: int) -> list[int]:
    """Ids that were never given. Requires: no other ids are taken in the same transaction."""
    first = next_shard_id(draft.topology)
    draft.put(SHARD_ID_COUNTER, CounterDocument(first + count))
    return list(range(first, first + count))


def next_shard_id(topology: Topology) -> int:
    """The lowest id that no shard ever had. A store without the counter is of before shards could end."""
    counter = topology.counters.get(SHARD_ID_COUNTER)
    return counter.next if counter is not None else max(topology.shards, default=0) + 1


# Commit and abort


def carriers(topology: Topology, shard_id: int, change_id: str) -> list[ShardDocument]:
    """The shards that carry a change, in token order; empty when it is over. `shard_id`: one of them."""
    shard = topology.shards.get(shard_id)
    if shard is None or shard.change is None or shard.change.id != change_id:
        return []
    partner = topology.shards.get(shard.change.partner)
    if partner is None:
        return [shard]
    return sorted((shard, partner), key=lambda each: each.start)


def commit(topology: Topology, shard_id: int, change_id: str) -> MetaTxn | None:
    """The transaction by which the holder of the ready stagings, and nobody else, ends a change with success.

    Requires: every staging is complete, compared with the fenced source, and synced.
    """
    found = carriers(topology, shard_id, change_id)
    if not found or any(shard.change is None or shard.change.id != change_id for shard in found):
        return None
    draft = Draft(topology)
    for shard in found:
        draft.delete(f"{SHARDS}{shard.id}")
    for shard in outcome(found):
        draft.put_shard(shard)
    return draft.txn()


def outcome(carrying: list[ShardDocument]) -> list[ShardDocument]:
    """The shards there are after the change that these carry was committed."""
    shard = carrying[0]
    change = shard.change
    assert change is not None
    epoch = max(each.epoch for each in carrying) + 1
    made = msgspec.structs.replace(
        shard, epoch=epoch, owned_since=epoch, change=None, last_change=change.id, source=shard.node, problem=""
    )
    if change.kind == "move":
        return [msgspec.structs.replace(made, node=change.target)]
    parents = _parents(carrying)
    if change.kind == "split":
        lower, upper = change.children
        return [
            msgspec.structs.replace(made, id=lower, stop=change.at, parents=parents),
            msgspec.structs.replace(made, id=upper, start=change.at, parents=parents),
        ]
    return [msgspec.structs.replace(made, id=change.children[0], stop=carrying[-1].stop, parents=parents)]


def _parents(shards: Iterable[ShardDocument]) -> list[int]:
    """These and their own parents: a node may have missed the last split or merge, and the one before."""
    nearest = [shard.id for shard in shards]
    older = [parent for shard in shards for parent in shard.parents]
    return list(dict.fromkeys(nearest + older))[:PARENTS_MAX]


def abort(topology: Topology, shard_id: int, change_id: str, problem: str) -> MetaTxn | None:
    """The transaction by which anybody, at any time, ends a change without success. `problem`: a sentence."""
    draft = Draft(topology)
    draft_abort(draft, carriers(topology, shard_id, change_id), problem)
    return draft.txn() if draft else None


def draft_abort(draft: Draft, carrying: list[ShardDocument], problem: str) -> None:
    """As `abort`, as a part of a larger transaction."""
    for shard in carrying:
        draft.put_shard(msgspec.structs.replace(shard, change=None, epoch=shard.epoch + 1, problem=problem))


def adjust(draft: Draft, carrying: list[ShardDocument], *, paused: bool, rate_bytes_s: int) -> None:
    """Pause a change, let it go on, or give it another rate. Who carries it out notices; nothing else changes."""
    for shard in carrying:
        assert shard.change is not None
        change = msgspec.structs.replace(shard.change, paused=paused, rate_bytes_s=rate_bytes_s)
        draft.put_shard(msgspec.structs.replace(shard, change=change))


def abandon(draft: Draft, shard: ShardDocument, node: str) -> None:
    """Give a shard whose only copy is lost to `node`, empty. What is left of the old copy goes when it turns up.

    The old owner may still serve those who have not heard of it: only for a person who accepted the loss.
    """
    draft.rest_on(f"{NODES}{node}", f"{WANTED}{node}")
    epoch = shard.epoch + 1
    draft.put_shard(
        msgspec.structs.replace(
            shard, node=node, epoch=epoch, owned_since=epoch, change=None, last_change="", source=shard.node, problem=""
        )
    )
