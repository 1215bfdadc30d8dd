"""Where a sync of the log runs: on the event loop, or in a thread beside it.

inline   the loop waits for the disk: least overhead, and requests gather meanwhile, but nothing else is served.
thread   reads are served while the disk is busy; costs two hand-overs and the GIL's attention.

Invariant: at most one sync runs at a time, and `done` runs on the loop exactly once, with the error or None.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from shardkv.errors import StorageError

SWITCH_INTERVAL_S = 1e-4
"""With the default of 5 ms a thread back from the disk waits that long for a busy loop to let go of the GIL."""

Sync = Callable[[], None]
Done = Callable[[StorageError | None], None]


class Syncer(Protocol):
    def run(self, sync: Sync, done: Done) -> None:
        """Run `sync` (which raises StorageError) and then `done` on the loop."""

    def close(self) -> None:
        """Wait for a sync that is under way; none may be started after."""


class InlineSyncer:
    def run(self, sync: Sync, done: Done) -> None:
        try:
            sync()
        except StorageError as error:
            done(error)
        else:
            done(None)

    def close(self) -> None:
        """Nothing can be under way."""


class ThreadSyncer:
    def __init__(self) -> None:
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="log-sync")

    def run(self, sync: Sync, done: Done) -> None:
        self._thread.submit(self._in_thread, sync, done)

    def _in_thread(self, sync: Sync, done: Done) -> None:
        error = None
        try:
            sync()
        except StorageError as failed:
            error = failed
        self._loop.call_soon_threadsafe(done, error)

    def close(self) -> None:
        self._thread.shutdown(wait=True)
