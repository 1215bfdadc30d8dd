"""A TCP proxy that misbehaves on command: cuts, half-open silence, slow links.

`hold()` stops reading on both sides: a peer that is alive and takes nothing. `mute()` reads and throws away: a
half-open link. `throttle(bytes_per_s)` lets bytes through at most so fast. `cut()` resets all connections;
`refuse()` does so with every new one as well. `heal()` ends all of it; what was thrown away stays lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator

PIECE_BYTES = 64 * 1024


class Proxy:
    """Forwards 127.0.0.1:`port` to `target`. Use `fault_proxy`."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self.port = 0
        self.connections = 0
        """Accepted so far."""
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._muted = False
        self._refusing = False
        self._bytes_per_s: float | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, limit=PIECE_BYTES)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        self.heal()
        self.cut()
        await asyncio.sleep(0)

    def hold(self) -> None:
        self._flowing.clear()

    def mute(self) -> None:
        self._muted = True

    def throttle(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s

    def refuse(self) -> None:
        self._refusing = True
        self.cut()

    def cut(self) -> None:
        for writer in list(self._writers):
            _reset(writer)

    def heal(self) -> None:
        self._muted = self._refusing = False
        self._bytes_per_s = None
        self._flowing.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self._refusing:
            _reset(writer)
            return
        try:
            far_reader, far_writer = await asyncio.open_connection(*self.target, limit=PIECE_BYTES)
        except OSError:
            _reset(writer)
            return
        self._writers |= {writer, far_writer}
        await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))
        self._writers -= {writer, far_writer}

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while True:
                await self._flowing.wait()
                piece = await reader.read(PIECE_BYTES if self._bytes_per_s is None else 4096)
                await self._flowing.wait()
                if not piece:
                    break
                if self._bytes_per_s is not None:
                    await asyncio.sleep(len(piece) / self._bytes_per_s)
                if not self._muted:
                    writer.write(piece)
                    await writer.drain()
        writer.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close so that the other side sees a reset, not an end."""
    sock = writer.get_extra_info("socket")
    if sock is not None and sock.fileno() >= 0:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@contextlib.asynccontextmanager
async def fault_proxy(host: str, port: int) -> AsyncIterator[Proxy]:
    proxy = Proxy((host, port))
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.close()
