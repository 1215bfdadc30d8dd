"""`Inbox`: what a blocking connection has received, in one buffer that it keeps, cut into frame bodies.

A page of a scan is a megabyte: received piece by piece into new memory, and copied once more to be decoded, it costs
more than its decoding. Here the kernel puts it where it is decoded from.

Invariants: a body that is handed out stays as it is until `room` is asked for again, and no longer; a length over the
limit is refused before any of its body is read; the buffer is no longer than twice what it held, and is given up when
it is longer than KEPT_BYTES_MOST and empty.
"""

from __future__ import annotations

from shardkv.errors import FrameTooLarge
from shardkv.limits import KIB, MIB
from shardkv.wire.frame import HEADER_BYTES

FIRST_BYTES = 64 * KIB
KEPT_BYTES_MOST = 4 * MIB


class Inbox:
    """Of one connection: receive into `room()`, then `take` what is whole."""

    __slots__ = ("_body_bytes_max", "_end", "_next_bytes", "_start", "_view")

    def __init__(self, body_bytes_max: int) -> None:
        self._body_bytes_max = body_bytes_max
        self._view = memoryview(bytearray(FIRST_BYTES))
        self._start = self._end = 0
        """What is held and was not handed out."""
        self._next_bytes = 0
        """How long the frame is that is held in part; 0: none is, or its length did not come yet."""

    def room(self) -> memoryview:
        """Where the next bytes go; never empty."""
        held = self._end - self._start
        if not held:
            self._start = self._end = 0
            if len(self._view) > KEPT_BYTES_MOST:
                self._view = memoryview(bytearray(FIRST_BYTES))
        elif self._end == len(self._view) or (self._start and self._start + self._next_bytes > len(self._view)):
            self._move(held)
        return self._view[self._end :] if self._end else self._view

    def _move(self, held: int) -> None:
        """To the front, and into a longer buffer when this one is full."""
        view = self._view
        if held == len(view):
            view = memoryview(bytearray(min(2 * held, self._next_bytes)))
        view[:held] = self._view[self._start : self._end]
        self._view, self._start, self._end = view, 0, held

    def take(self, count: int) -> list[memoryview]:
        """So many bytes came; the bodies that are whole now. Raises FrameTooLarge; the stream is then lost."""
        view, start = self._view, self._start
        self._end = end = self._end + count
        bodies = []
        self._next_bytes = 0
        while end - start >= HEADER_BYTES:
            length = int.from_bytes(view[start : start + HEADER_BYTES], "big")
            if length > self._body_bytes_max:
                raise FrameTooLarge(
                    f"A frame of {length} bytes was announced; the limit here is {self._body_bytes_max} bytes.",
                    detail={"length": length, "limit": self._body_bytes_max},
                )
            stop = start + HEADER_BYTES + length
            if stop > end:
                self._next_bytes = HEADER_BYTES + length
                break
            bodies.append(view[start + HEADER_BYTES : stop])
            start = stop
        self._start = start
        return bodies
