"""The end of a connection whose peer broke a rule: it is told why, and heard no more.

Invariant: the peer can read the reason. Closing at once would let the system throw it away, as it does when bytes
of the peer are still unread; so the writing side is closed first, and what comes in is thrown away until the peer
closes too, for LINGER_S at most.
"""

from __future__ import annotations

import asyncio

LINGER_S = 2.0
LINGERING_MAX = 1000
"""Past so many of them in one process, connections are closed at once."""


class Farewell(asyncio.Protocol):
    """Takes a transport over from its protocol. `lingering` holds those that are not closed yet."""

    def __init__(self, transport: asyncio.Transport, lingering: set[Farewell]) -> None:
        self._transport = transport
        self._lingering = lingering
        self._end = asyncio.get_running_loop().call_later(LINGER_S, transport.abort)
        lingering.add(self)
        transport.set_protocol(self)
        transport.write_eof()

    def abort(self) -> None:
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Nothing the peer says now matters."""

    def connection_lost(self, exc: Exception | None) -> None:
        self._end.cancel()
        self._lingering.discard(self)
