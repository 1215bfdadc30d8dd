"""Where the sync of the log runs: in the caller (`InlineSyncer`) or in a thread of its own (`ThreadSyncer`).

Invariant: every submitted sync is answered exactly once, with None or the error, in the owner's context, unless the
syncer was closed first. A sync is never repeated after an error.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable
from typing import Protocol

from shardkv.errors import StorageError

SWITCH_INTERVAL_S = 1e-4
"""How soon the interpreter lets the thread go on after its sync while the owner is busy. With the usual 5 ms a
sync of 0.1 ms was seen to take 300 ms at the 99th percentile."""

Done = Callable[[StorageError | None], None]


class Syncer(Protocol):
    def submit(self, sync: Callable[[], None], done: Done, *, delay_s: float = 0.0) -> None:
        """Call `sync` after `delay_s`, then `done` with how it ended."""
        ...

    def hurry(self) -> None:
        """Wait no longer with a sync that was submitted for later."""
        ...

    def close(self) -> None:
        """Wait for a running sync; forget the others."""
        ...


class InlineSyncer:
    """Syncs inside `submit`, at once, whatever the delay."""

    def submit(self, sync: Callable[[], None], done: Done, *, delay_s: float = 0.0) -> None:
        done(attempt(sync))

    def hurry(self) -> None:
        pass

    def close(self) -> None:
        pass


class ThreadSyncer:
    """One daemon thread, started by the first sync. `post` runs a callable in the owner's context."""

    def __init__(self, post: Callable[[Callable[[], None]], None]) -> None:
        self._post = post
        self._queue: queue.SimpleQueue[tuple[Callable[[], None], Done, float] | None] = queue.SimpleQueue()
        self._closed = False
        self._wake = threading.Event()
        """A delay is cut short."""
        self._thread: threading.Thread | None = None

    def submit(self, sync: Callable[[], None], done: Done, *, delay_s: float = 0.0) -> None:
        if self._thread is None:
            if not delay_s:
                sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_INTERVAL_S))
            self._thread = threading.Thread(target=self._run, name="shardkv-sync", daemon=True)
            self._thread.start()
        self._queue.put((sync, done, delay_s))

    def hurry(self) -> None:
        self._wake.set()

    def close(self) -> None:
        self._closed = True
        self._wake.set()
        self._queue.put(None)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            sync, done, delay_s = item
            if delay_s and not self._closed:
                self._wake.wait(delay_s)
                self._wake.clear()
            if self._closed:
                return
            self._post(_Answer(done, attempt(sync)))


class _Answer:
    """A posted call: `done(error)`."""

    __slots__ = ("_done", "_error")

    def __init__(self, done: Done, error: StorageError | None) -> None:
        self._done = done
        self._error = error

    def __call__(self) -> None:
        self._done(self._error)


def attempt(sync: Callable[[], None]) -> StorageError | None:
    """Run the sync; returns the error it raised, or None."""
    try:
        sync()
    except StorageError as error:
        return error
    return None
