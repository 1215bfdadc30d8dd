"""Frames: a 4-byte big-endian length, then that many bytes of body. See PROTOCOL.md.

Invariant: no byte of a body is kept beyond the announced length, and a length over the limit is refused
before any of its body is read. This file knows nothing of what a body means.
"""

from __future__ import annotations

from shardkv.errors import FrameTooLarge

HEADER_BYTES = 4


def encode_frame(body: bytes) -> bytes:
    """`body` with its length in front."""
    return len(body).to_bytes(HEADER_BYTES, "big") + body


class FrameDecoder:
    """Cuts a byte stream into frame bodies. `body_bytes_max` may be raised between feeds (after the hello)."""

    __slots__ = ("_buffer", "body_bytes_max")

    def __init__(self, body_bytes_max: int) -> None:
        self._buffer = bytearray()
        self.body_bytes_max = body_bytes_max

    @property
    def buffered(self) -> int:
        """Bytes held that do not make a whole frame yet."""
        return len(self._buffer)

    def feed(self, data: bytes) -> list[bytes]:
        """Take the next bytes of the stream; return the bodies now complete, in order.

        Raises FrameTooLarge when the next frame announces more than `body_bytes_max`; the stream is then lost.
        """
        if not self._buffer:
            length = len(data) - HEADER_BYTES
            if 0 <= length <= self.body_bytes_max and int.from_bytes(data[:HEADER_BYTES], "big") == length:
                return [data[HEADER_BYTES:]]  # as it is mostly: just one frame
            bodies, at = self._cut(data)
            if at < len(data):
                self._buffer += memoryview(data)[at:]
            return bodies
        self._buffer += data
        with memoryview(self._buffer) as view:
            bodies, at = self._cut(view)
        if at:
            del self._buffer[:at]
        return bodies

    def _cut(self, data: bytes | memoryview) -> tuple[list[bytes], int]:
        """The whole frames at the beginning of `data`, and where they end."""
        bodies: list[bytes] = []
        at, held = 0, len(data)
        while held - at >= HEADER_BYTES:
            length = int.from_bytes(data[at : at + HEADER_BYTES], "big")
            if length > self.body_bytes_max:
                raise FrameTooLarge(
                    f"A frame of {length} bytes was announced; the limit here is {self.body_bytes_max} bytes.",
                    detail={"length": length, "limit": self.body_bytes_max},
                )
            end = at + HEADER_BYTES + length
            if end > held:
                break
            bodies.append(bytes(data[at + HEADER_BYTES : end]))
            at = end
        return bodies, at
