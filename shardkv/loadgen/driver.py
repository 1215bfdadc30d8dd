"""Sends what was encoded beforehand over many connections and reads what comes back, as cheaply as Python can.

Plain sockets and epoll: two system calls and about a microsecond of Python for an exchange, a third of what a loop
with protocols and transports takes, and a fifth of what redis itself needs for a single request.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Sequence

from shardkv.loadgen.exchange import Dialect, Exchange, ReplyReader, WrongReply
from shardkv.loadgen.histogram import STEP_BITS, Histogram

CONNECT_TIMEOUT_S = 5.0
STALL_S = 10.0
"""A server that answers nothing for so long is given up."""
RECEIVE_BYTES_MOST = 256 * 1024

clock = time.perf_counter_ns

NextExchange = Callable[[], Exchange | None]


class Lane:
    """A connection, and what it waits for."""

    __slots__ = ("expected", "fd", "reader", "sent_at", "sock", "unsent")

    def __init__(self, sock: socket.socket, reader: ReplyReader) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.reader = reader
        self.expected: object = None
        self.sent_at = 0
        self.unsent: memoryview | None = None
        """What the system did not take yet."""


class Driver:
    """Drives `lanes`. `answered` counts exchanges and `latencies` their times since the last `reset`."""

    def __init__(self, lanes: Sequence[Lane], receive_bytes: int) -> None:
        self.latencies = Histogram()
        self.answered = 0
        self.busy = 0
        """Lanes that wait for an answer."""
        self._lanes = {lane.fd: lane for lane in lanes}
        self._receive_bytes = min(receive_bytes + 1, RECEIVE_BYTES_MOST)
        self._epoll = select.epoll()
        for fd in self._lanes:
            self._epoll.register(fd, select.EPOLLIN)

    def reset(self) -> None:
        """Count from zero."""
        self.latencies = Histogram()
        self.answered = 0

    def close(self) -> None:
        """Let go of the lanes; they stay open."""
        self._epoll.close()

    def start(self, following: NextExchange) -> None:
        """Send the first exchange on every lane."""
        for lane in self._lanes.values():
            exchange = following()
            if exchange is not None:
                self.busy += 1
                self._send(lane, exchange)

    def drive(self, following: NextExchange, until_ns: int | None = None) -> None:
        """Whenever a lane is answered send the next exchange, until the time (of `clock`) or until nobody waits.

        Raises WrongReply, OSError.
        """
        poll, lanes, read, size, usual = self._epoll.poll, self._lanes, os.read, self._receive_bytes, select.EPOLLIN
        counts = self.latencies.counts
        while self.busy and (until_ns is None or clock() < until_ns):
            events = poll(STALL_S)
            if not events:
                raise WrongReply(f"The server answered nothing for {STALL_S:g} s.")
            for fd, event in events:
                lane = lanes[fd]
                if event != usual and not self._unusual(lane, event):
                    continue
                data = read(fd, size)
                if not data:
                    raise WrongReply("The server closed the connection.")
                if not lane.reader.take(data, lane.expected):
                    continue
                took = clock() - lane.sent_at
                try:
                    counts[took >> STEP_BITS] += 1
                except IndexError:
                    self.latencies.note_long(took)
                self.answered += 1
                exchange = following()
                if exchange is None:
                    self.busy -= 1
                else:
                    self._send(lane, exchange)

    def _send(self, lane: Lane, exchange: Exchange) -> None:
        request, lane.expected, _ = exchange
        lane.sent_at = clock()
        try:
            sent = os.write(lane.fd, request)
        except BlockingIOError:
            sent = 0
        if sent < len(request):
            lane.unsent = memoryview(request)[sent:]
            self._epoll.modify(lane.fd, select.EPOLLIN | select.EPOLLOUT)

    def _unusual(self, lane: Lane, event: int) -> bool:
        """Go on sending; whether there is something to read."""
        if event & select.EPOLLOUT and lane.unsent is not None:
            lane.unsent = lane.unsent[os.write(lane.fd, lane.unsent) :]
            if not lane.unsent:
                lane.unsent = None
                self._epoll.modify(lane.fd, select.EPOLLIN)
        return bool(event & ~select.EPOLLOUT)


def connect(host: str, port: int, dialect: Dialect) -> Lane:
    """A connection on which the greetings were exchanged. Raises OSError, WrongReply."""
    sock = socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        reader = dialect.reader()
        for greeting in dialect.greetings():
            sock.sendall(greeting.request)
            while not reader.take(_received(sock), greeting.expected):
                continue
        sock.settimeout(0)
    except BaseException:
        sock.close()
        raise
    return Lane(sock, dialect.reader())


def _received(sock: socket.socket) -> bytes:
    data = sock.recv(RECEIVE_BYTES_MOST)
    if not data:
        raise WrongReply("The server closed the connection.")
    return data
