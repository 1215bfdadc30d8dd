"""What a metadata process knows of its store without asking it: every entry, in the order of their revisions.

Invariants: a view only moves forward, and it is changed only by what it is told with `take`. `since` is exact from
`floor` on: before that, deletes may be missing, and who knows no more must start again from nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from shardkv.metadata.store import Changes
from shardkv.topology.view import Topology
from shardkv.wire.messages import MetaEntries, MetaEntry

TOMBSTONES_MAX = 10_000
"""Deleted entries that are remembered, for those who follow; the oldest are forgotten first."""


class StoreView:
    """The entries and the topology at `revision`; -1 before anything was told. Used by one event loop."""

    def __init__(self) -> None:
        self.revision = -1
        self.floor = 0
        self.topology = Topology()
        self._entries: dict[str, MetaEntry] = {}
        self._tombstones = 0
        self._observers: list[Callable[[], None]] = []

    # Being told

    def take(self, changes: Changes) -> None:
        """Move on to `changes`; what is older than the view is passed over."""
        if changes.revision <= self.revision:
            return
        entries = self._with_gone(changes) if changes.whole else changes.entries
        if changes.whole and self.revision < 0:
            self.floor = changes.deletes_since
        news = sorted((entry for entry in entries if self._is_news(entry)), key=lambda entry: entry.revision)
        for entry in news:
            self._put(entry)
        self._forget_tombstones()
        self.revision = changes.revision
        self.topology = self.topology.with_entries(self.revision, [(e.key, e.value, e.revision) for e in news])
        for observer in list(self._observers):
            observer()

    def _with_gone(self, changes: Changes) -> list[MetaEntry]:
        """All entries, and as deleted those that the view has and the store has not any more."""
        gone = {key for key, entry in self._entries.items() if entry.value is not None}
        gone -= {entry.key for entry in changes.entries}
        return [*changes.entries, *(MetaEntry(key, None, changes.revision) for key in gone)]

    def _is_news(self, entry: MetaEntry) -> bool:
        known = self._entries.get(entry.key)
        return known is None or known.revision < entry.revision

    def _put(self, entry: MetaEntry) -> None:
        before = self._entries.pop(entry.key, None)
        self._entries[entry.key] = entry
        self._tombstones += (entry.value is None) - (before is not None and before.value is None)

    def _forget_tombstones(self) -> None:
        if self._tombstones <= TOMBSTONES_MAX:
            return
        deleted = [entry for entry in self._entries.values() if entry.value is None]
        for entry in deleted[: len(deleted) - TOMBSTONES_MAX // 2]:
            del self._entries[entry.key]
            self.floor = entry.revision
        self._tombstones = TOMBSTONES_MAX // 2

    def observe(self, observer: Callable[[], None]) -> None:
        """Call `observer` whenever the view has moved; it must not raise."""
        self._observers.append(observer)

    # Being asked

    def get(self, key: str) -> MetaEntry | None:
        entry = self._entries.get(key)
        return entry if entry is not None and entry.value is not None else None

    def entries(self, prefix: str = "") -> Iterable[MetaEntry]:
        """The entries there are under `prefix`, in no order."""
        return (entry for entry in self._entries.values() if entry.value is not None and entry.key.startswith(prefix))

    def since(self, revision: int) -> MetaEntries:
        """What was written after `revision`, in key order, deleted entries too.

        At revision 0 with no entries when that is not known any more: start again from 0.
        """
        if 0 < revision < self.floor:
            return MetaEntries(0, [])
        news = []
        for entry in reversed(self._entries.values()):
            if entry.revision <= revision:
                break
            news.append(entry)
        return MetaEntries(self.revision, sorted(news, key=lambda entry: entry.key))

    async def moved(self, timeout_s: float | None = None) -> bool:
        """Wait until the view has moved on from now; False when it has not within `timeout_s`."""
        moved = asyncio.Event()
        self._observers.append(moved.set)
        try:
            async with asyncio.timeout(timeout_s):
                await moved.wait()
        except TimeoutError:
            return False
        finally:
            self._observers.remove(moved.set)
        return True

    async def reached(self, revision: int, *, timeout_s: float | None = None) -> bool:
        """Wait until the view is at `revision` or beyond; False when it is not within `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.revision < revision:
                    await self.moved()
        except TimeoutError:
            return False
        return True
