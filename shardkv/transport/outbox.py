"""Gathers messages of one turn of the event loop into as few frames as the peer's limits allow.

Invariant: everything put in during one turn leaves in one `transport.write`, in the order it came.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from shardkv.wire.frame import encode_frame
from shardkv.wire.messages import FRAME_REQUESTS_MAX, encode_batch

BATCH_BYTES = 4 * 1024 * 1024
"""Past this size a batch is cut in two, so that one frame never holds up a connection for long."""


def encode_frames(clock: int, messages: list[Any], bytes_max: int) -> list[bytes]:
    """Frames holding all `messages`; the body of each is at most `bytes_max` and BATCH_BYTES, or a single message."""
    if len(messages) <= FRAME_REQUESTS_MAX:
        body = encode_batch(clock, messages)
        if len(body) <= min(BATCH_BYTES, bytes_max) or len(messages) == 1:
            return [encode_frame(body)]
    half = len(messages) // 2
    return encode_frames(clock, messages[:half], bytes_max) + encode_frames(clock, messages[half:], bytes_max)


def set_socket_options(transport: asyncio.BaseTransport, *, dead_peer_ms: int = 10_000) -> None:
    """No delay for small frames; a peer that vanished without a word is noticed within about `dead_peer_ms`."""
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_USER_TIMEOUT", dead_peer_ms), ("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
