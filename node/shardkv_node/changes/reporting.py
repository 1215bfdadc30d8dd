"""`Reporting`: what a node tells of its shards and changes in its status, in the form of `shardkv.control.reports`.

Sizes are measured a few shards at a time, so they may be some seconds old where there are thousands. Invariant: being
asked costs no more than putting together what was measured before.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from time import monotonic
from typing import Any

from shardkv.control.reports import NodeReport, ShardReport
from shardkv.errors import ShardKVError
from shardkv.topology.documents import TopologyBound
from shardkv.topology.view import Topology
from shardkv.wire.hello import Identity
from shardkv_node.changes.housekeeping import Housekeeping
from shardkv_node.engine.store import Store
from shardkv_node.ownership import Ownership

log = logging.getLogger(__name__)

MEASURE_S = 0.002
"""Of the loop's time, for each time sizes are measured."""
MIDDLE_BYTES = 16 * 1024 * 1024
"""The middle is looked for only in shards of a range keyspace that have at least so much: it may read from disk."""
MIDDLE_AGE_S = 30.0


class _Measured:
    """Of one shard."""

    __slots__ = ("asked", "bytes", "middle", "middle_at", "ops_s", "seen_at")

    def __init__(self) -> None:
        self.bytes = 0
        self.ops_s = 0.0
        self.asked = 0
        self.seen_at = 0.0
        self.middle: TopologyBound | None = None
        self.middle_at = 0.0


class Reporting:
    """`measure` it every second or so; `status` is what it has to say."""

    def __init__(
        self, housekeeping: Housekeeping, store: Store, ownership: Ownership, me: Callable[[], Identity]
    ) -> None:
        self._housekeeping = housekeeping
        self._store = store
        self._ownership = ownership
        self._me = me
        self._measured: dict[int, _Measured] = {}
        self._due: list[int] = []

    def measure(self) -> None:
        """Count requests, and look at the sizes of some shards."""
        asked = self._ownership.asked()
        now = monotonic()
        for shard in self._measured.keys() - asked.keys():
            del self._measured[shard]
        for shard, (_, count) in asked.items():
            measured = self._measured.get(shard)
            if measured is None:
                measured = self._measured[shard] = _Measured()
                self._due.append(shard)
            elif now > measured.seen_at:
                measured.ops_s = max(0, count - measured.asked) / (now - measured.seen_at)
            measured.asked, measured.seen_at = count, now
        self._measure_sizes(asked, now + MEASURE_S)

    def _measure_sizes(self, asked: dict[int, tuple[int, int]], until: float) -> None:
        if not self._due:
            self._due = list(asked)
        while self._due and monotonic() < until:
            shard = self._due.pop()
            if shard in asked and shard in self._measured:
                self._measure_size(shard, asked[shard][0], self._measured[shard])

    def _measure_size(self, shard: int, tablet: int, measured: _Measured) -> None:
        size = self._store.tablet_size(tablet)
        measured.bytes = size.stored_bytes + size.memtable_bytes
        now = monotonic()
        if size.stored_bytes >= MIDDLE_BYTES and now - measured.middle_at > MIDDLE_AGE_S and self._is_ranged(shard):
            measured.middle_at = now
            try:
                measured.middle = self._store.middle_key(tablet)
            except ShardKVError as error:
                log.warning("middle_not_found shard=%d reason=%r", shard, error.message)

    def _is_ranged(self, shard: int) -> bool:
        topology: Topology = self._housekeeping.topology
        document = topology.shards.get(shard)
        keyspace = topology.keyspaces.get(document.keyspace) if document is not None else None
        return keyspace is not None and keyspace.partition == "range"

    def report(self) -> NodeReport:
        if self._measured.keys() != self._ownership.shards.keys():
            self.measure()
        me = self._me()
        return NodeReport(
            name=me.name,
            incarnation=me.incarnation,
            revision=self._ownership.revision,
            shards=[
                ShardReport(shard, measured.bytes, measured.ops_s, measured.middle)
                for shard, measured in self._measured.items()
            ],
            changes=self._housekeeping.change_reports(),
            kept=self._housekeeping.kept,
            fenced=self._housekeeping.fenced,
            missing=sorted(self._housekeeping.missing),
            free_bytes=_free_bytes(self._store.directory),
        )

    def status(self) -> dict[str, Any]:
        """For the node's status."""
        return {"report": self.report(), "missing": self._housekeeping.missing}


def _free_bytes(directory: str) -> int | None:
    try:
        found = os.statvfs(directory)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize
