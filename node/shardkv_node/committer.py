"""Group commit on the event loop: what arrives while one group is being synced forms the next one.

Invariants: at most one group is between log and apply; groups are applied in the order they were logged; a write is
acknowledged only after its group was applied, and in `always` mode only after its group was synced. Writes wait
here, bounded in bytes, while the store is stalled.
A failed write or sync of the log is fatal: every write of the group ends in OutcomeUnknown and the process ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from shardkv.errors import DeadlineExceeded, OutcomeUnknown, Overloaded, ShardKVError, StorageError
from shardkv_node.engine.store import Group, Store, Write

QUEUED_BYTES_MAX = 64 * 1024 * 1024
"""Bytes of writes that may wait for their group before new ones are refused."""
GROUP_WRITES_MAX = 4096
"""Most writes in one group."""


class Committer:
    """Drives one store's writes. `on_fatal` runs once, when the store can take no more writes."""

    def __init__(self, store: Store, *, on_fatal: Callable[[StorageError], None]) -> None:
        self._store = store
        self._loop = asyncio.get_running_loop()
        self._on_fatal = on_fatal
        self._queue: list[tuple[Write, float | None, int]] = []
        self._queued_bytes = 0
        self._busy = False
        self._form_due = False
        store.on_progress = self._schedule
        self.groups = 0
        self.writes = 0

    @property
    def idle(self) -> bool:
        """Nothing queued and nothing between log and apply."""
        return not self._busy and not self._queue

    def submit(self, write: Write, deadline: float | None) -> None:
        """Queue a write; its `done` runs when it was applied or failed. Raises Overloaded, and what the store
        refuses writes with."""
        refusal = self._store.write_refusal()
        if refusal is not None:
            raise refusal
        size = sum(map(len, write.values)) + sum(map(len, write.keys))
        if self._queue and self._queued_bytes + size > QUEUED_BYTES_MAX:
            raise Overloaded(
                f"{self._queued_bytes} bytes of writes are waiting for the disk on this node.",
                hint="Retry after a moment.",
            )
        self._queue.append((write, deadline, size))
        self._queued_bytes += size
        self._schedule()

    def _schedule(self) -> None:
        if not self._form_due and not self._busy:
            self._form_due = True
            self._loop.call_soon(self._form)

    def _form(self) -> None:
        """Log what is queued as one group and see it synced as the durability asks."""
        self._form_due = False
        if self._busy or not self._queue or self._store.stalled:
            return
        writes = self._take()
        if not writes:
            return
        self._busy = True
        try:
            group = self._store.log_group(writes)
        except StorageError as error:
            self._fail(writes, error)
            return
        self.groups += 1
        self.writes += len(writes)
        self._store.sync_group(group, lambda error: self._synced(group, writes, error))

    def _take(self) -> list[Write]:
        """The next writes whose deadline has not passed."""
        taken, self._queue = self._queue[:GROUP_WRITES_MAX], self._queue[GROUP_WRITES_MAX:]
        self._queued_bytes -= sum(size for _, _, size in taken)
        now = self._loop.time()
        writes = []
        for write, deadline, _ in taken:
            if deadline is not None and deadline <= now:
                self._finish(write, DeadlineExceeded("The deadline passed while the write waited on the node."))
            else:
                writes.append(write)
        return writes

    def _synced(self, group: Group, writes: list[Write], error: StorageError | None) -> None:
        if error is not None:
            self._fail(writes, error)
            return
        self._store.apply_group(group)
        self._busy = False
        if self._queue:
            self._form()

    def _fail(self, writes: list[Write], error: StorageError) -> None:
        self._busy = False
        poisoned = self._store.write_refusal()
        for write in writes:
            told: ShardKVError = error
            if poisoned is not None:
                told = OutcomeUnknown(f"The node failed while it stored the write: {error.message}")
            self._finish(write, told)
        if poisoned is not None:
            self._on_fatal(error)
        elif self._queue:
            self._schedule()

    def _finish(self, write: Write, error: ShardKVError) -> None:
        write.error = error
        if write.done is not None:
            write.done(write)
