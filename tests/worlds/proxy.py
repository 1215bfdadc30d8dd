"""A TCP proxy that misbehaves on command: cuts, half-open silence, one-way silence, slow and late links.

    hold()      takes nothing more from one side or both; what is under way arrives after `heal`
    mute()      takes everything and throws it away, and tells neither side when the other one closes: a half-open link
    lose_answers()  does so with what comes back on one connection; the others go on
    throttle()  lets bytes through at most so fast
    delay()     lets bytes through so much later
    cut()       resets all connections
    refuse()    does so with every new one as well
    heal()      ends all of it, and lets new connections through

A connection that lost bytes stays mute after `heal`, for a stream with a hole is worth nothing: whoever uses it has
to notice by himself. `cut()` ends it, `cut_mute()` no other.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from enum import Flag

PIECE_BYTES = 64 * 1024
SLOW_PIECE_BYTES = 4096


class Way(Flag):
    """Which way bytes go."""

    TO_TARGET = 1
    BACK = 2
    BOTH = TO_TARGET | BACK


NEITHER = Way(0)


class _Link:
    """One connection through the proxy: two pumps."""

    def __init__(self) -> None:
        self.mute = NEITHER
        self.writers: list[asyncio.StreamWriter] = []

    def reset(self) -> None:
        for writer in self.writers:
            _reset(writer)


class Proxy:
    """Forwards 127.0.0.1:`port` to `target`. Use `fault_proxy`."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self.port = 0
        self.connections = 0
        """Accepted so far."""
        self.bytes_passed = 0
        self._server: asyncio.Server | None = None
        self._links: list[_Link] = []
        self._flowing = {Way.TO_TARGET: asyncio.Event(), Way.BACK: asyncio.Event()}
        self._muting = NEITHER
        self._refusing = False
        self._bytes_per_s: float | None = None
        self._delay_s = 0.0
        self.heal()

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

    def hold(self, way: Way = Way.BOTH) -> None:
        for one in way:
            self._flowing[one].clear()

    def mute(self) -> None:
        self._muting = Way.BOTH

    def lose_answers(self, chance: float) -> None:
        """`chance` in [0, 1) says which connection; none when there is none."""
        whole = [link for link in self._links if not link.mute]
        if whole:
            whole[int(chance * len(whole))].mute = Way.BACK

    def throttle(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s

    def delay(self, seconds: float) -> None:
        self._delay_s = seconds

    def refuse(self) -> None:
        self._refusing = True
        self.cut()

    def cut(self) -> None:
        for link in self._links:
            link.reset()

    def cut_mute(self) -> None:
        for link in self._links:
            if link.mute:
                link.reset()

    def heal(self) -> None:
        self._muting = NEITHER
        self._refusing = False
        self._bytes_per_s = None
        self._delay_s = 0.0
        for flowing in self._flowing.values():
            flowing.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self._refusing:
            _reset(writer)
            return
        link = _Link()
        link.writers.append(writer)
        self._links.append(link)
        try:
            far_reader, far_writer = await asyncio.open_connection(*self.target, limit=PIECE_BYTES)
            link.writers.append(far_writer)
            await asyncio.gather(
                self._pump(link, Way.TO_TARGET, reader, far_writer), self._pump(link, Way.BACK, far_reader, writer)
            )
            for one in link.writers:
                one.close()
        except OSError:
            _reset(writer)
        finally:
            self._links.remove(link)

    async def _pump(self, link: _Link, way: Way, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while piece := await self._next_piece(way, reader):
                link.mute |= self._muting
                if way not in link.mute:
                    self.bytes_passed += len(piece)
                    writer.write(piece)
                    await writer.drain()
        link.mute |= self._muting
        if not link.mute:
            writer.close()

    async def _next_piece(self, way: Way, reader: asyncio.StreamReader) -> bytes:
        """Empty at the end of the stream."""
        await self._flowing[way].wait()
        piece = await reader.read(PIECE_BYTES if self._bytes_per_s is None else SLOW_PIECE_BYTES)
        if self._bytes_per_s is not None:
            await asyncio.sleep(len(piece) / self._bytes_per_s)
        if self._delay_s:
            await asyncio.sleep(self._delay_s)
        await self._flowing[way].wait()
        return piece


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
