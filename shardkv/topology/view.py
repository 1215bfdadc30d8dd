"""The topology as one process sees it: a read-only view at a store revision, made anew by every delta.

Invariant: a view never changes; `with_entries` returns the next one. The shards of a keyspace are sorted by start,
the first starts at the lowest token and each stops where the next one starts (`check` says so in tests).
Routing one key is one `bisect`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

from shardkv.errors import LocalProtocolError, UnknownKeyspace
from shardkv.topology.documents import (
    CLUSTER_KEY,
    KEYSPACES,
    NODES,
    ROUTERS,
    SHARDS,
    ClusterDocument,
    KeyspaceDocument,
    NodeDocument,
    Partition,
    RouterDocument,
    ShardDocument,
    TopologyBound,
    decode_document,
)
from shardkv.topology.tokens import TOKEN_OF, TOKENS_OF


class KeyspaceView:
    """One keyspace's shards in token order."""

    __slots__ = ("_later_starts", "_starts", "_token", "_tokens", "name", "partition", "shards")

    def __init__(self, name: str, partition: Partition, shards: Iterable[ShardDocument]) -> None:
        self.name = name
        self.partition = partition
        self.shards: list[ShardDocument] = sorted(shards, key=lambda shard: shard.start)
        self._starts: list[Any] = [shard.start for shard in self.shards]
        self._later_starts = self._starts[1:]
        self._token, self._tokens = TOKEN_OF[partition], TOKENS_OF[partition]

    def shard_for(self, key: bytes) -> ShardDocument:
        """The shard that `key` belongs to. Requires at least one shard."""
        return self.shards[bisect_right(self._starts, self._token(key)) - 1]

    def positions(self, keys: Sequence[bytes]) -> list[int]:
        """For each key the position of its shard in `shards`."""
        return list(map(bisect_right, repeat(self._later_starts), self._tokens(keys)))

    def shards_in(self, start: bytes, stop: bytes | None) -> list[ShardDocument]:
        """The shards that may hold keys of [start, stop), in token order. A hash keyspace: all of them."""
        if self.partition == "hash":
            return self.shards
        first = bisect_right(self._starts, start) - 1
        last = len(self.shards) if stop is None else max(first + 1, bisect_left(self._starts, stop))
        return self.shards[first:last]

    def check(self) -> None:
        """Raises LocalProtocolError when the shards do not cover the token space exactly once."""
        lowest: TopologyBound = 0 if self.partition == "hash" else b""
        stops = [shard.stop for shard in self.shards]
        if not self.shards or self._starts[0] != lowest or stops != [*self._starts[1:], None]:
            raise LocalProtocolError(f"The shards of keyspace {self.name!r} do not cover it exactly once.")


@dataclass(frozen=True, slots=True)
class Topology:
    """Everything known at store revision `revision`."""

    revision: int = 0
    cluster: ClusterDocument | None = None
    keyspaces: dict[str, KeyspaceView] = field(default_factory=dict)
    shards: dict[int, ShardDocument] = field(default_factory=dict)
    nodes: dict[str, NodeDocument] = field(default_factory=dict)
    routers: dict[str, RouterDocument] = field(default_factory=dict)

    def keyspace(self, name: str) -> KeyspaceView:
        """Raises UnknownKeyspace, naming those that exist."""
        view = self.keyspaces.get(name)
        if view is None:
            known = ", ".join(sorted(self.keyspaces)) or "none yet"
            raise UnknownKeyspace(f"There is no keyspace {name!r}; known keyspaces: {known}.")
        return view

    def with_entries(self, revision: int, entries: Iterable[tuple[str, bytes | None]]) -> Topology:
        """The view after a delta of (store key, document or None for deleted)."""
        tables: dict[str, dict[Any, Any]] = {
            SHARDS: dict(self.shards),
            NODES: dict(self.nodes),
            ROUTERS: dict(self.routers),
            KEYSPACES: {name: KeyspaceDocument(name, view.partition) for name, view in self.keyspaces.items()},
            CLUSTER_KEY: {CLUSTER_KEY: self.cluster},
        }
        touched: set[str] = set()
        for key, value in entries:
            touched |= _apply(tables, key, value)
        return Topology(
            revision=revision,
            cluster=tables[CLUSTER_KEY].get(CLUSTER_KEY),
            keyspaces=self._keyspaces_after(tables, touched),
            shards=tables[SHARDS],
            nodes=tables[NODES],
            routers=tables[ROUTERS],
        )

    def _keyspaces_after(self, tables: dict[str, dict[Any, Any]], touched: set[str]) -> dict[str, KeyspaceView]:
        """Only keyspaces with a changed shard are built anew; one without shards is not usable and not listed."""
        members: dict[str, list[ShardDocument]] = {name: [] for name in touched}
        for shard in tables[SHARDS].values():
            if shard.keyspace in members:
                members[shard.keyspace].append(shard)
        views = {name: view for name, view in self.keyspaces.items() if name not in touched}
        for name, shards in members.items():
            document = tables[KEYSPACES].get(name)
            if document is not None and shards:
                views[name] = KeyspaceView(name, document.partition, shards)
        return views


def _apply(tables: dict[str, dict[Any, Any]], key: str, value: bytes | None) -> set[str]:
    """Put one entry into its table; return the keyspaces whose view it changes."""
    family, _, rest = key.partition("/")
    table = tables.get(f"{family}/" if rest else family)
    if table is None:
        return set()
    name: Any = int(rest) if family == SHARDS[:-1] else (rest or key)
    before = table.get(name)
    document = decode_document(key, value) if value is not None else None
    if document is None:
        table.pop(name, None)
    else:
        table[name] = document
    if family == SHARDS[:-1]:
        return {shard.keyspace for shard in (before, document) if isinstance(shard, ShardDocument)}
    return {name} if family == KEYSPACES[:-1] else set()
