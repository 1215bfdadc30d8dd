"""Group commit on the event loop: what arrives while one group is being synced forms the next one.

Invariants: at most one group is between log and apply; groups are applied in the order they were logged; a write is
acknowledged only after its group was applied, and in `always` mode only after its group was synced. A barrier comes
when all that was submitted before it has been answered. Writes wait
here, bounded in bytes, while the store is stalled or slows writers down. While they wait longer than STANDING_S, fewer
of them may wait than one connection may have unanswered, so that reads behind them on the same connection, a
router's, are still heard: the latest are refused, before anything was done.
A failed write or sync of the log is fatal: `on_fatal` runs, and the writes in question end in OutcomeUnknown. So is
a group that was logged and could not be applied: memory and log no longer agree, and only recovery puts that right.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from itertools import chain
from time import monotonic

from shardkv.errors import DeadlineExceeded, InvalidArgument, Overloaded, ShardKVError, StorageError
from shardkv.limits import DEFAULT_LIMITS, Limits
from shardkv.transport.admission import overloaded
from shardkv.transport.turn import turn_of
from shardkv_node.engine.puts import Puts
from shardkv_node.engine.store import Store
from shardkv_node.engine.write import Group, Write

QUEUED_BYTES_MAX = 64 * 1024 * 1024
"""Bytes of writes that may wait for their group before new ones are refused."""
WRITE_BYTES = 512
OPERATION_BYTES = 64
"""What a waiting write, and each of its operations, takes beside keys and values, about."""
STANDING_S = 0.25
"""A queue that has given nothing to the log for so long stands: what is added to it would not be done soon."""
STANDING_SHARE = 4
"""One part in so many of what a connection may have unanswered may wait in a queue that stands."""
GROUP_SHARE = 2
"""One part in so many of the requests a connection may have unanswered may be in one group: its sync may take long."""
GROUP_BYTES = 8 * 1024 * 1024
"""A group is closed at about this size: it bounds how long one sync, and everyone behind it, takes."""

_Deadlines = Sequence[float | None]
_Queued = tuple["Write | Puts | _Barrier", _Deadlines, int]
"""What waits, the deadline of each write in it, and its bytes."""


class _Barrier:
    """Stands in the queue between what was submitted before it and after it; no group has both."""

    __slots__ = ("reached",)

    def __init__(self, reached: Callable[[], None]) -> None:
        self.reached = reached


class Committer:
    """Drives one store's writes. `on_fatal` runs whenever it shows that the store can take no more of them."""

    def __init__(
        self, store: Store, *, on_fatal: Callable[[StorageError], None], limits: Limits = DEFAULT_LIMITS
    ) -> None:
        self._standing_writes_max = limits.requests_in_flight_max // STANDING_SHARE
        self._standing_bytes_max = min(limits.bytes_in_flight_max, QUEUED_BYTES_MAX) // STANDING_SHARE
        self._group_writes_max = max(1, limits.requests_in_flight_max // GROUP_SHARE)
        self._crowded_since = 0.0
        self._crowded_group = -1
        """The group that was the latest when the queue was found crowded; while it still is, the queue stands."""
        self._shed_due = False
        self._store = store
        self._loop = asyncio.get_running_loop()
        self._turn = turn_of(self._loop)
        self._on_fatal = on_fatal
        self._queue: deque[_Queued] = deque()
        self._queued = 0
        """Writes in it, each request of a `Puts` for one."""
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
        """Queue a write; its `done` runs when it was applied or failed. `deadline` is an absolute `loop.time()`.

        Raises Overloaded, and what the store refuses writes with.
        """
        size = sum(map(len, write.values)) + sum(map(len, write.keys))
        self._submit(write, (deadline,), size + WRITE_BYTES + OPERATION_BYTES * len(write.keys))

    def submit_puts(self, puts: Puts, deadlines: _Deadlines) -> None:
        """As `submit`, for many requests of puts, each with its deadline. What fails is told as the writes that `apart`
        makes.

        Raises as `submit` does; then none is queued.
        """
        lengths = [*map(len, chain.from_iterable(puts.keys))]
        size = sum(map(len, chain.from_iterable(puts.values))) + sum(lengths)
        self._submit(puts, deadlines, size + WRITE_BYTES * len(puts) + OPERATION_BYTES * len(lengths))

    def barrier(self, reached: Callable[[], None]) -> None:
        """Call `reached` once every write submitted before has ended, and its `done` has run: now, or later."""
        if self.idle:
            reached()
        else:
            self._queue.append((_Barrier(reached), (), 0))

    def _submit(self, write: Write | Puts, deadlines: _Deadlines, size: int) -> None:
        refusal = self._store.write_refusal()
        if refusal is not None:
            if self._store.health.poisoned:
                self._on_fatal(refusal)
            raise refusal
        if self._queued_bytes >= self._standing_bytes_max or self._queued + len(deadlines) > self._standing_writes_max:
            self._mind_the_crowd(size)
        self._queue.append((write, deadlines, size))
        self._queued += len(deadlines)
        self._queued_bytes += size
        self._schedule()

    @property
    def _crowded(self) -> bool:
        """More waits than may in a queue that stands; one write alone always may."""
        waiting = self._queued
        return waiting > self._standing_writes_max or (waiting > 1 and self._queued_bytes > self._standing_bytes_max)

    def _mind_the_crowd(self, size: int) -> None:
        """Many writes wait already. Raises Overloaded when the queue stands, or cannot take `size` bytes more."""
        stands_s = self._stands_s()
        if stands_s >= STANDING_S or self._queued_bytes + size > QUEUED_BYTES_MAX:
            raise self._overloaded(stands_s)
        if not self._shed_due:
            self._shed_due = True
            self._loop.call_later(STANDING_S, self._shed)

    def _stands_s(self) -> float:
        """For how long the crowded queue has been seen to give nothing to the log, in seconds."""
        now = monotonic()
        if self._crowded_group != self.groups:
            self._crowded_group, self._crowded_since = self.groups, now
        return now - self._crowded_since

    def _shed(self) -> None:
        """Refuse the latest writes of a queue that stands, down to what may wait in it, or look again."""
        self._shed_due = False
        stands_s = self._stands_s()
        if stands_s < STANDING_S:
            if self._crowded:
                self._shed_due = True
                self._loop.call_later(STANDING_S - stands_s, self._shed)
            return
        refusal = self._overloaded(stands_s)
        barriers: list[_Queued] = []
        while self._crowded:
            write, deadlines, size = self._queue.pop()
            if isinstance(write, _Barrier):
                barriers.append((write, deadlines, size))
            elif isinstance(write, Puts):
                self._queue += _apart(write, deadlines, size)
            else:
                self._queued -= 1
                self._queued_bytes -= size
                _finish(write, refusal)
        self._queue.extend(reversed(barriers))

    def _overloaded(self, stands_s: float) -> Overloaded:
        """Come back after as long as the queue stands already: nothing else is known about how long it will."""
        return overloaded(
            f"{self._queued} writes of {self._queued_bytes} bytes are waiting for the disk on this node.",
            retry_after_s=max(STANDING_S, stands_s),
        )

    def _schedule(self) -> None:
        if not self._form_due and not self._busy and self._queue:
            self._form_due = True
            self._turn.defer(self._form)

    def _form(self) -> None:
        """Log what is queued as one group, and see to its sync."""
        self._form_due = False
        if self._busy or not self._queue or self._store.stalled:
            return
        delay_s = self._store.write_delay_s()
        if delay_s:
            self._form_due = True
            self._loop.call_later(delay_s, self._form)
            return
        writes = self._take()
        if not writes:
            self._schedule()
            return
        try:
            group = self._store.log_group(writes)
        except (StorageError, InvalidArgument) as error:
            self._refused(writes, error)
            return
        self.groups += 1
        self.writes += sum(len(write) if isinstance(write, Puts) else 1 for write in writes)
        self._busy = True
        self._store.sync_group(group, lambda error: self._synced(group, error))

    def _take(self) -> list[Write | Puts]:
        """The next writes whose deadline has not passed, up to the size of a group."""
        now, size_left, left = self._loop.time(), GROUP_BYTES, self._group_writes_max
        queue = self._queue
        writes: list[Write | Puts] = []
        while queue and size_left > 0 and left > 0:
            write, deadlines, size = queue.popleft()
            if isinstance(write, _Barrier):
                if writes:
                    queue.appendleft((write, deadlines, size))
                    break
                write.reached()
                continue
            late = any(deadline is not None and deadline <= now for deadline in deadlines)
            if isinstance(write, Puts) and (late or len(deadlines) > left):
                queue.extendleft(reversed(_apart(write, deadlines, size)))
                continue
            left -= len(deadlines)
            size_left -= size
            self._queued -= len(deadlines)
            self._queued_bytes -= size
            if late:
                _finish(write, DeadlineExceeded("The deadline passed while the write waited on its node."))
            else:
                writes.append(write)
        if not self._queue:
            self._crowded_group = -1
        return writes

    def _synced(self, group: Group, error: StorageError | None) -> None:
        self._busy = False
        if error is not None:
            self._refused(group.writes, error)
            return
        try:
            self._store.apply_group(group)
        except Exception as bug:  # noqa: BLE001 - whatever it is, it must not be served on
            self._on_fatal(StorageError(f"A group that was logged could not be applied: {bug!r}."))
            return
        self._schedule()

    def _refused(self, writes: Sequence[Write | Puts], error: ShardKVError) -> None:
        """The group was not logged, or not synced: then nobody knows how much of it will be found again."""
        for write in writes:
            _finish(write, error)
        if self._store.health.poisoned and isinstance(error, StorageError):
            self._on_fatal(error)
        else:
            self._schedule()


def _apart(puts: Puts, deadlines: _Deadlines, size: int) -> list[_Queued]:
    """The same puts, waiting one by one; together they have the same size."""
    share, rest = divmod(size, len(puts))
    sizes = [share + rest] + [share] * (len(puts) - 1)
    return [(write, (deadline,), one) for write, deadline, one in zip(puts.apart(), deadlines, sizes, strict=True)]


def _finish(write: Write | Puts, error: ShardKVError) -> None:
    for one in write.apart() if isinstance(write, Puts) else (write,):
        one.error = error
        if one.done is not None:
            one.done(one)
