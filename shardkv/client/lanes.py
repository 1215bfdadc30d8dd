"""`Lanes`: what a client names its writes by, so that one that is sent again is made once.

A lane is lent to one write at a time; its numbers rise. A client has as many lanes as it ever had writes under way at
once, and a node keeps the newest record of each.

Invariants: no two writes have the same lane and number, in no two processes; a lane comes back only when its write was
answered or given up. Then it may be used at once: what of the old write is still under way is refused by its number.
"""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Iterable

from shardkv.client.calls import Call, Lane, WriteCall
from shardkv.wire.messages import TOKEN_LANE_BYTES

_PLACE_BYTES = 4
TIMEOUT_S_MAX = 24 * 3600
"""Nodes keep records for longer than this. A call that may take longer has no token."""


class Lanes:
    """Those of one client. Shared by its threads; a forked child has others."""

    def __init__(self) -> None:
        self._start_anew()
        _all.add(self)
        _watch_forks()

    def _start_anew(self) -> None:
        self._client = os.urandom(TOKEN_LANE_BYTES - _PLACE_BYTES)
        self._places = itertools.count()
        self._free: list[Lane] = []

    def forked(self) -> None:
        """In a forked child: the lanes are the parent's."""
        self._start_anew()

    def lend(self, calls: Iterable[Call], timeout_s: float) -> None:
        """Give a lane to each write that has none."""
        for call in calls:
            if isinstance(call, WriteCall) and call.lane is None and timeout_s <= TIMEOUT_S_MAX:
                call.use(self._take())

    def take_back(self, calls: Iterable[Call]) -> None:
        """These calls have ended, or are given up."""
        for call in calls:
            lane = call.lane
            if lane is not None:
                call.lane = None
                if lane.name.startswith(self._client):
                    self._free.append(lane)

    def _take(self) -> Lane:
        try:
            return self._free.pop()
        except IndexError:
            return Lane(self._client + next(self._places).to_bytes(_PLACE_BYTES, "big"))


_all: weakref.WeakSet[Lanes] = weakref.WeakSet()
_forks_watched = False


def _watch_forks() -> None:
    global _forks_watched
    if not _forks_watched and hasattr(os, "register_at_fork"):
        _forks_watched = True
        os.register_at_fork(after_in_child=_in_child)


def _in_child() -> None:
    for lanes in list(_all):
        lanes.forked()
