"""Since when a peer has been behind with its part: with the rest of a frame, with reading what it asked for.

Invariant: progress is bytes read by the peer and frames completed by it, not bytes that merely trickle in. Time is an
argument, in seconds; who is too slow is for the connection to judge.
"""

from __future__ import annotations


class Pace:
    """Of one connection."""

    __slots__ = ("_frames", "_read_bytes", "reads_since", "sends_since")

    def __init__(self, now: float) -> None:
        self.sends_since = self.reads_since = now
        """When there was progress last, or nothing to do."""
        self._frames = 0
        self._read_bytes = 0

    def look(self, now: float, frames: int, read_bytes: int, *, unfinished: bool, unread: bool) -> None:
        """Note at time `now` how many frames came and how many bytes of replies were read so far, and whether there is
        an unfinished frame, or an unread reply."""
        if not unfinished or frames != self._frames:
            self.sends_since, self._frames = now, frames
        if not unread or read_bytes != self._read_bytes:
            self.reads_since, self._read_bytes = now, read_bytes
