"""`Snapshot`: an embedded engine as it was at one moment, for any number of threads. Made by `Engine.snapshot`."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from types import TracebackType

from shardkv_node.engine.reader import Reader
from shardkv_node.engine.snapshot import StoreSnapshot


class Snapshot(Reader):
    """Reads as an `Engine` does. A context manager; `StoreClosed` is raised once it, or its engine, is closed.

    A key with a time to live is judged by the moment of the snapshot: what existed then is there for as long as the
    snapshot is.
    """

    def __init__(
        self,
        snapshot: StoreSnapshot,
        mutex: threading.RLock,
        tablet: int,
        *,
        key_bytes_max: int,
        check_usable: Callable[[], None],
    ) -> None:
        self._snapshot = self._reads = snapshot
        self._mutex = mutex
        self._tablet = tablet
        self._known = {}.get
        self._key_bytes_max = key_bytes_max
        self._check_engine = check_usable
        self._pid = os.getpid()

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files and memtables it keeps. Safe to call twice, and after the engine was closed."""
        if os.getpid() != self._pid:
            return  # a forked child: the files are the parent's
        with self._mutex:
            self._snapshot.close()

    def _check_usable(self) -> None:
        self._check_engine()
