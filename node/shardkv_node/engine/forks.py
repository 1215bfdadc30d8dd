"""Tells those who want to know that they are in a forked child, without asking the system each time.

`os.getpid` costs as much as a read. Only children made by `os.fork` are seen; other forks cannot run Python safely.
"""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakSet


class Watcher(Protocol):
    def forked(self) -> None:
        """Called in a new child, before anything else runs there. Must take no lock."""


_watchers: WeakSet[Watcher] = WeakSet()
_hooked: list[bool] = []


def _in_child() -> None:
    for watcher in list(_watchers):
        watcher.forked()


def watch(watcher: Watcher) -> None:
    """Have it told, for as long as it lives."""
    if not _hooked:
        _hooked.append(True)
        os.register_at_fork(after_in_child=_in_child)
    _watchers.add(watcher)
