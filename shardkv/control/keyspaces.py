"""Transactions that make and drop keyspaces, in pieces a store can take.

Invariant: a keyspace is listed only while all of its shards are there. Pieces compare the keyspace's document, so a
piece that comes late, when shards have been split or merged, or are being dropped, changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from shardkv.control.changes import carriers, next_shard_id
from shardkv.control.draft import Draft
from shardkv.errors import InvalidArgument
from shardkv.topology.documents import (
    KEYSPACES,
    SHARD_ID_COUNTER,
    SHARDS,
    WANTED,
    CounterDocument,
    KeyspaceDocument,
    Partition,
    Placing,
    ShardDocument,
)
from shardkv.topology.placement import place_keyspace
from shardkv.topology.view import Topology
from shardkv.wire.messages import MetaTxn

DEFAULT_KEYSPACE = "default"
PUTS_MAX = 60
"""In one transaction, with as many compares and those of the nodes: etcd takes 128 unless told otherwise."""
NAME_LENGTH_MAX = 100
LOOPBACK = ("127.", "[::1]", "localhost:")


def create_keyspace(
    topology: Topology, name: str, partition: Partition, *, shards: int, split_at: Sequence[bytes] = ()
) -> MetaTxn:
    """The first transaction of a new keyspace; `place_pieces` does what is left.

    Raises InvalidArgument when it exists, has an impossible name or shape, or there is no node to place it on.
    """
    nodes = active_nodes(topology)
    cuts = sorted(set(split_at) - {b""})
    if name in topology.keyspace_documents:
        dropping = topology.keyspace_documents[name].dropped
        raise InvalidArgument(f"Keyspace {name!r} {'is still being dropped' if dropping else 'exists'}.")
    if not name.replace("-", "").replace("_", "").isalnum() or len(name) > NAME_LENGTH_MAX:
        raise InvalidArgument(f"{name!r} cannot name a keyspace: use up to {NAME_LENGTH_MAX} letters, digits, - and _.")
    if shards < 1 or (cuts and partition == "hash"):
        raise InvalidArgument("A keyspace has at least one shard, and only a range keyspace is split at keys.")
    if not nodes:
        raise InvalidArgument("There is no node to place a keyspace on.", hint="Start a node first.")
    placing = Placing(len(cuts) + 1 if cuts else shards, cuts, next_shard_id(topology), nodes)
    return _first_piece(topology, KeyspaceDocument(name, partition, shards=placing.shards, placing=placing))


def active_nodes(topology: Topology) -> list[str]:
    """The registered nodes that are to have shards, the ones with fewest first."""
    counts = dict.fromkeys(topology.nodes, 0)
    for shard in topology.shards.values():
        if shard.node in counts:
            counts[shard.node] += 1
    active = [name for name in topology.nodes if wish_for(topology, name) == "active"]
    return sorted(active, key=lambda name: (counts[name], len(name), name))


def wish_for(topology: Topology, node: str) -> str:
    """What is wanted of a node: active, draining or removed."""
    wanted = topology.wanted.get(node)
    return wanted.state if wanted is not None else "active"


def starter_of(topology: Topology, node: str) -> Literal["launcher", "operator"]:
    """Who starts and stops a node. The launcher's listen where only their own machine reaches them."""
    wanted, known = topology.wanted.get(node), topology.nodes.get(node)
    if wanted is not None:
        return wanted.started_by
    return "operator" if known is not None and not known.address.startswith(LOOPBACK) else "launcher"


def _first_piece(topology: Topology, keyspace: KeyspaceDocument) -> MetaTxn:
    """The document and the ids; a keyspace of few shards is whole at once."""
    placing = keyspace.placing
    assert placing is not None
    draft = Draft(topology)
    draft.put(SHARD_ID_COUNTER, CounterDocument(placing.first_id + placing.shards))
    if placing.shards <= PUTS_MAX:
        keyspace = msgspec.structs.replace(keyspace, placing=None)
        _put_placed(draft, _placed(keyspace, placing))
    draft.put(f"{KEYSPACES}{keyspace.name}", keyspace)
    return draft.txn()


def _placed(keyspace: KeyspaceDocument, placing: Placing) -> list[ShardDocument]:
    return place_keyspace(
        keyspace.name,
        keyspace.partition,
        shards=placing.shards,
        split_at=placing.split_at,
        nodes=placing.nodes,
        first_id=placing.first_id,
    )


def _put_placed(draft: Draft, shards: list[ShardDocument]) -> None:
    """Onto nodes that are still wanted: a node is removed only by replacing the wish that is compared here."""
    for shard in shards:
        draft.rest_on(f"{WANTED}{shard.node}")
        draft.put_shard(shard)


def drop_keyspace(topology: Topology, name: str) -> MetaTxn:
    """The first transaction of a drop: it takes no more requests. Raises InvalidArgument when there is none."""
    keyspace = topology.keyspace_documents.get(name)
    if keyspace is None or keyspace.dropped:
        raise InvalidArgument(f"There is no keyspace {name!r}.")
    draft = Draft(topology)
    draft.put(f"{KEYSPACES}{name}", msgspec.structs.replace(keyspace, dropped=True, placing=None))
    return draft.txn()


def place_default(topology: Topology) -> MetaTxn | None:
    """The default keyspace, once as many nodes have registered as were wanted; None: nothing to do (yet)."""
    wanted = topology.cluster
    if wanted is None or DEFAULT_KEYSPACE in topology.keyspace_documents or len(topology.nodes) < wanted.nodes_wanted:
        return None
    nodes = active_nodes(topology)
    if SHARD_ID_COUNTER in topology.counters or not nodes:  # it was placed once, and dropped since
        return None
    cuts = wanted.split_at if wanted.partition == "range" else []
    placing = Placing(wanted.shards if not cuts else len({*cuts, b""}), cuts, next_shard_id(topology), nodes)
    return _first_piece(
        topology, KeyspaceDocument(DEFAULT_KEYSPACE, wanted.partition, shards=placing.shards, placing=placing)
    )


def place_piece(topology: Topology) -> MetaTxn | None:
    """The next shards of a keyspace that is not whole yet; the last piece makes it usable."""
    for keyspace in topology.keyspace_documents.values():
        placing = keyspace.placing
        if placing is None or keyspace.dropped:
            continue
        nodes = [name for name in placing.nodes if wish_for(topology, name) == "active"] or active_nodes(topology)
        if not nodes:
            continue
        placed = _placed(keyspace, msgspec.structs.replace(placing, nodes=nodes))
        missing = [shard for shard in placed if shard.id not in topology.shards]
        draft = Draft(topology)
        draft.rest_on(f"{KEYSPACES}{keyspace.name}")
        _put_placed(draft, missing[:PUTS_MAX])
        if len(missing) <= PUTS_MAX:
            draft.put(f"{KEYSPACES}{keyspace.name}", msgspec.structs.replace(keyspace, placing=None))
        return draft.txn()
    return None


def drop_piece(topology: Topology, *, holders: dict[int, set[str]], unheard: set[str]) -> MetaTxn | None:
    """The next step of a drop.

    `holders`: for each shard the nodes that report a tablet of it; `unheard`: nodes that may hold anything, since
    they have not reported on this topology. A shard's document goes when nobody can have a tablet of it any more.
    """
    for keyspace in topology.keyspace_documents.values():
        if keyspace.dropped:
            draft = Draft(topology)
            shards = [shard for shard in topology.shards.values() if shard.keyspace == keyspace.name]
            _mark_dropped(draft, [shard for shard in shards if not shard.dropped])
            if not draft and not unheard:
                _forget_dropped(draft, [shard for shard in shards if not holders.get(shard.id)])
            if not shards:
                draft.delete(f"{KEYSPACES}{keyspace.name}")
            if draft:
                return draft.txn()
    return None


def _mark_dropped(draft: Draft, shards: list[ShardDocument]) -> None:
    """Ends what change they are in, too: of a merge both of its shards, at once."""
    marked: set[int] = set()
    for shard in shards:
        if len(draft) >= PUTS_MAX - 1:
            return
        carrying = carriers(draft.topology, shard.id, shard.change.id) if shard.change else [shard]
        for each in carrying:
            if each.id not in marked:
                marked.add(each.id)
                draft.put_shard(msgspec.structs.replace(each, dropped=True, change=None, epoch=each.epoch + 1))


def _forget_dropped(draft: Draft, shards: list[ShardDocument]) -> None:
    for shard in shards[:PUTS_MAX]:
        draft.delete(f"{SHARDS}{shard.id}")
