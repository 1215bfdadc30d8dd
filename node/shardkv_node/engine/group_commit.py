"""`GroupCommit`: writes of many threads go to the store in groups, one log write and one sync for all of a group.

One thread leads: it logs, syncs and applies what is queued, for all, and hands the lead to the first that queued
meanwhile. The mutex is free during the sync, so that others read and queue. Each waiting write has a lock of its own,
its gate: a group that ends wakes the threads of that group and nobody else, one by one, since the interpreter runs one
of them at a time: woken all at once they would only wait again, for their turn in it.

Invariants:
  - at most one thread leads; while anything is queued, somebody leads, or a pause will hand the lead on;
  - every write that was taken from the queue gets its outcome, `applied` or `error`, before its gate opens;
  - a thread that leaves `submit`, however it does, opens the gate that its turn was given to open.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

from shardkv.errors import ShardKVError, StorageError, StoreClosed
from shardkv_node.engine.store import Store
from shardkv_node.engine.syncer import attempt
from shardkv_node.engine.write import Write

GROUP_BYTES_MAX = 16 * 1024 * 1024
"""A leader takes no more than this into one group, unless one write alone is larger."""
WAIT_S = 0.5
"""How often one that waits for flush or compaction looks whether it will ever end."""


class _Turn:
    """A queued write."""

    __slots__ = ("gate", "leads", "opens", "write")

    def __init__(self, write: Write) -> None:
        self.write = write
        self.gate: threading.Lock | None = None
        """Shut while its thread waits; None as long as that does not, and for good once it was interrupted."""
        self.opens: threading.Lock | None = None
        """The gate of another turn, which its thread opens on the way out."""
        self.leads = False
        """The lead was handed to it, and it has not begun."""


class GroupCommit:
    """`mutex` guards the store; `progress`, a condition on it, is notified when background work ended. `tablet`: where
    `put` puts."""

    def __init__(self, store: Store, tablet: int, mutex: threading.RLock, progress: threading.Condition) -> None:
        self._store = store
        self._lane = store.quick_lane(tablet)
        self._mutex = mutex
        self._progress = progress
        self._quiet = threading.Condition(mutex)
        self._queue: list[_Turn] = []
        self._leading = False
        self._pauses = 0
        self._closed = False
        self._interval = store.options.durability == "interval"
        self._synced = store.options.durability == "always"

    def put(self, key: bytes, value: bytes) -> int:
        """Put one row, if that can be done at once and without a group. Returns its version, or 0: `submit` it.

        Requires: the mutex is not held, and the sizes of key and value were checked. Raises `StorePoisoned`.
        """
        with self._mutex:
            if self._leading or self._pauses or self._closed:
                return 0
            if self._synced:
                return self._put_synced(key, value)
            self._leading = True
            try:
                return self._lane.put(key, value)
            finally:
                self._leading = False

    def _put_synced(self, key: bytes, value: bytes) -> int:
        version = 0
        try:
            self._leading = True
            version = self._lane.log(key, value)
            if version:
                self._sync()
                self._store.apply_quick_put(self._lane, key, value, version)
        except StorageError:
            raise
        except BaseException as error:  # an interrupt between log and apply: what the log holds is not known
            if version:
                self._store.fail(error)
            raise
        finally:
            self._pass_on()
        return version

    def _sync(self) -> None:
        """Sync what was logged. The mutex is free while the disk does it. Raises `StorePoisoned`."""
        store = self._store
        target = store.sync_target()
        try:
            self._mutex.release()
            problem = attempt(target.sync)
        finally:
            self._mutex.acquire()
        if problem is not None:
            raise store.fail(problem)
        store.synced(target)

    def submit(self, write: Write) -> None:
        """See the write through, as leader or by waiting for one; raises its error. Requires: the mutex is not held."""
        turn = _Turn(write)
        try:
            with self._mutex:
                self._queue.append(turn)
                if not (self._leading or self._pauses):
                    self._lead(turn)
                if not (write.applied or write.error):
                    turn.gate = gate = threading.Lock()
                    gate.acquire()
            while turn.gate is not None:
                gate.acquire()
                if turn.leads:
                    with self._mutex:
                        self._lead(turn)
                if write.applied or write.error:  # not asked before: who left earlier would open no other gate
                    break
        except BaseException:  # an interrupted caller takes back what no group has taken yet
            with self._mutex:
                turn.gate = None
                self._take_back(turn)
            raise
        finally:
            if turn.opens is not None:
                turn.opens.release()
        if write.error is not None:
            raise write.error

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside no group is under way, as long as the mutex is not let go. Requires: the mutex is held."""
        self._pauses += 1
        try:
            while self._leading:
                self._quiet.wait()
            yield
        finally:
            self._pauses -= 1
            if not self._leading:
                self._pass_on()

    def close(self) -> None:
        """Finish the group under way; what comes later or still waits gets `StoreClosed`. Requires: mutex held."""
        self._closed = True
        self._progress.notify_all()
        with self.paused():
            pass

    def _lead(self, turn: _Turn) -> None:
        """Log, sync and apply what is queued, up to a bound."""
        taken: list[_Turn] = []
        try:
            self._leading = True
            turn.leads = False
            self._wait_for_room()
            taken = self._take()
            self._commit([one.write for one in taken])
        except ShardKVError as error:
            taken = taken or self._take()
            for one in taken:
                one.write.error = error
        except BaseException as error:  # an interrupt between log and apply: what the log holds is not known
            for one in taken:
                one.write.error = one.write.error or self._store.fail(error)
            self._take_back(turn)
            raise
        finally:
            self._wake(taken)
            self._pass_on()

    def _wake(self, taken: list[_Turn]) -> None:
        """Have the threads that wait for these turns go on, each woken by the one before it."""
        waiting = [(one, one.gate) for one in taken if one.gate is not None]
        for (one, _), (_, gate) in pairwise(waiting):
            one.opens = gate
        if waiting:
            waiting[0][1].release()

    def _pass_on(self) -> None:
        """Nobody leads any more: the first in the queue shall, unless a pause wants the store for itself."""
        self._leading = bool(self._queue) and not self._pauses
        if self._leading:
            heir = self._queue[0]
            heir.leads = True
            if heir.gate is not None:
                heir.gate.release()
        elif self._pauses:
            self._quiet.notify_all()

    def _take_back(self, turn: _Turn) -> None:
        if turn in self._queue:
            self._queue.remove(turn)
        if turn.leads:
            turn.leads = False
            self._pass_on()

    def _wait_for_room(self) -> None:
        """Wait while the store stalls or slows writers; `log_group` leaves it to us. Raises why it will not end."""
        store = self._store
        while not self._closed and store.stalled:
            refusal = store.write_refusal()
            if refusal is not None:
                raise refusal
            self._progress.wait(WAIT_S)
        delay_s = store.write_delay_s()
        if delay_s and not self._closed:
            self._progress.wait(min(delay_s, WAIT_S))
        if self._closed:
            raise closed_error(store.directory)

    def _take(self) -> list[_Turn]:
        queue = self._queue
        if len(queue) > 1:
            size = 0
            for count, turn in enumerate(queue):
                size += sum(map(len, turn.write.keys)) + sum(map(len, turn.write.values))
                if count and size > GROUP_BYTES_MAX:
                    self._queue = queue[count:]
                    return queue[:count]
        self._queue = []
        return queue

    def _commit(self, writes: list[Write]) -> None:
        """One group through all its stages."""
        store = self._store
        group = store.log_group(writes)
        if store.sync_due():
            self._sync()
        elif self._interval:
            store.schedule_sync()
        store.apply_group(group)


def closed_error(directory: str) -> StoreClosed:
    return StoreClosed(f"The store at {directory} is closed.", hint="Open it again to use it.")
