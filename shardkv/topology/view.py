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
    CONTROLLER_SETTINGS,
    COUNTERS,
    JOBS,
    KEYSPACES,
    NODES,
    ROUTERS,
    SHARDS,
    WANTED,
    ClusterDocument,
    ControllerSettings,
    CounterDocument,
    JobDocument,
    KeyspaceDocument,
    NodeDocument,
    Partition,
    RouterDocument,
    ShardDocument,
    TopologyBound,
    WantedDocument,
    decode_document,
)
from shardkv.topology.tokens import TOKEN_OF, TOKENS_OF

DEFAULT_SETTINGS = ControllerSettings()


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


Entry = tuple[str, bytes | None] | tuple[str, bytes | None, int]
"""(store key, document or None for deleted, revision of the transaction that wrote it)."""


@dataclass(frozen=True, slots=True)
class Topology:
    """Everything known at store revision `revision`."""

    revision: int = 0
    cluster: ClusterDocument | None = None
    keyspaces: dict[str, KeyspaceView] = field(default_factory=dict)
    """Those that can be used: they have shards, all of them, and are not being dropped."""
    shards: dict[int, ShardDocument] = field(default_factory=dict)
    nodes: dict[str, NodeDocument] = field(default_factory=dict)
    routers: dict[str, RouterDocument] = field(default_factory=dict)
    keyspace_documents: dict[str, KeyspaceDocument] = field(default_factory=dict)
    wanted: dict[str, WantedDocument] = field(default_factory=dict)
    jobs: dict[int, JobDocument] = field(default_factory=dict)
    counters: dict[str, CounterDocument] = field(default_factory=dict)
    """By whole key."""
    settings: ControllerSettings = DEFAULT_SETTINGS
    revisions: dict[str, int] = field(default_factory=dict)
    """By store key: the revision a transaction that rests on this view compares. A key without one has no entry."""

    def keyspace(self, name: str) -> KeyspaceView:
        """Raises UnknownKeyspace, naming those that exist."""
        view = self.keyspaces.get(name)
        if view is None:
            known = ", ".join(sorted(self.keyspaces)) or "none yet"
            raise UnknownKeyspace(f"There is no keyspace {name!r}; known keyspaces: {known}.")
        return view

    def revision_of(self, key: str) -> int:
        """The revision of the entry of `key`; 0: there is none."""
        return self.revisions.get(key, 0)

    def with_entries(self, revision: int, entries: Iterable[Entry]) -> Topology:
        """The view after a delta. An entry without a revision of its own counts as written at `revision`."""
        after = _Delta(self)
        for key, value, *written in entries:
            after.apply(key, value, written[0] if written else revision)
        return after.topology(revision)


class _Delta:
    """The tables of a view that is being made; only those that change are copied."""

    def __init__(self, before: Topology) -> None:
        self._before = before
        self._tables: dict[str, dict[Any, Any]] = {
            SHARDS: before.shards,
            NODES: before.nodes,
            ROUTERS: before.routers,
            KEYSPACES: before.keyspace_documents,
            WANTED: before.wanted,
            JOBS: before.jobs,
            COUNTERS: before.counters,
            CLUSTER_KEY: {CLUSTER_KEY: before.cluster} if before.cluster else {},
            CONTROLLER_SETTINGS: {CONTROLLER_SETTINGS: before.settings},
        }
        self._copied: set[str] = set()
        self._revisions = dict(before.revisions)
        self._touched: set[str] = set()
        """Keyspaces that look different afterwards."""

    def apply(self, key: str, value: bytes | None, revision: int) -> None:
        """Take over one entry; keys of later versions are left out."""
        family, name = _place(key)
        if family not in self._tables:
            return
        document = decode_document(key, value) if value is not None else None
        table = self._table(family)
        before = table.pop(name, None)
        if document is None:
            self._revisions.pop(key, None)
        else:
            table[name] = document
            self._revisions[key] = revision
        if family == KEYSPACES:
            self._touched.add(name)
        elif family == SHARDS:
            self._touched |= {shard.keyspace for shard in (before, document) if isinstance(shard, ShardDocument)}

    def _table(self, family: str) -> dict[Any, Any]:
        if family not in self._copied:
            self._copied.add(family)
            self._tables[family] = dict(self._tables[family])
        return self._tables[family]

    def topology(self, revision: int) -> Topology:
        tables = self._tables
        return Topology(
            revision=revision,
            cluster=tables[CLUSTER_KEY].get(CLUSTER_KEY),
            keyspaces=self._keyspaces(),
            shards=tables[SHARDS],
            nodes=tables[NODES],
            routers=tables[ROUTERS],
            keyspace_documents=tables[KEYSPACES],
            wanted=tables[WANTED],
            jobs=tables[JOBS],
            counters=tables[COUNTERS],
            settings=tables[CONTROLLER_SETTINGS].get(CONTROLLER_SETTINGS, DEFAULT_SETTINGS),
            revisions=self._revisions,
        )

    def _keyspaces(self) -> dict[str, KeyspaceView]:
        """Only keyspaces with a changed shard are built anew."""
        members: dict[str, list[ShardDocument]] = {name: [] for name in self._touched}
        if members:
            for shard in self._tables[SHARDS].values():
                if shard.keyspace in members and not shard.dropped:
                    members[shard.keyspace].append(shard)
        views = {name: view for name, view in self._before.keyspaces.items() if name not in members}
        for name, shards in members.items():
            document: KeyspaceDocument | None = self._tables[KEYSPACES].get(name)
            if document is not None and shards and not document.dropped and document.placing is None:
                views[name] = KeyspaceView(name, document.partition, shards)
        return views


def _place(key: str) -> tuple[str, Any]:
    """The table an entry belongs to, and its name there."""
    family, _, rest = key.partition("/")
    if not rest or key == CONTROLLER_SETTINGS:
        return key, key
    match f"{family}/":
        case "shards/" | "jobs/":
            return f"{family}/", int(rest)
        case "counters/":
            return COUNTERS, key
        case other:
            return other, rest
