"""One blocking connection: what is sent in pieces, and what its outcomes say when the time is over."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import msgspec
import pytest

from shardkv.client.calls import Lost
from shardkv.client.connection import Connection
from shardkv.limits import DEFAULT_LIMITS
from shardkv.wire.frame import FrameDecoder, encode_frame
from shardkv.wire.hello import Identity
from shardkv.wire.messages import OK, Op, RawReply, Reply, decode_any, decode_requests, encode_batch, raw

LARGE = raw(bytes(8 << 20))
"""More than the kernel takes at once."""


@pytest.fixture
def pair() -> Iterator[tuple[Connection, socket.socket]]:
    ours, theirs = socket.socketpair()
    theirs.settimeout(20)
    connection = Connection(ours, "router", DEFAULT_LIMITS)
    yield connection, theirs
    connection.close()
    theirs.close()


def answer(peer: socket.socket, count: int) -> None:
    """Read so many requests, and answer them with the length of their payloads, the last one first."""
    decoder, heard = FrameDecoder(DEFAULT_LIMITS.frame_bytes_max), []
    while len(heard) < count:
        heard += [one for body in decoder.feed(peer.recv(1 << 16)) for one in decode_requests(body)[1]]
    for request in reversed(heard):
        peer.sendall(encode_frame(encode_batch(1, [Reply(request.id, OK, len(decode_any(request.payload)))])))


def ask(connection: Connection, payloads: list[msgspec.Raw], within_s: float) -> list[object]:
    """The answers, or what is said instead."""
    deadline = time.monotonic() + within_s
    if len(payloads) == 1:
        outcomes = [connection.ask(Op.STATUS, payloads[0], deadline)]
    else:
        outcomes = connection.exchange([(Op.STATUS, payload) for payload in payloads], deadline)
    return [decode_any(one.payload) if isinstance(one, RawReply) else one for one in outcomes]


@pytest.mark.parametrize("payloads", [[LARGE], [LARGE, raw(b"small")], [raw(b"small")]])
def test_what_the_kernel_does_not_take_at_once_is_sent_in_pieces(
    pair: tuple[Connection, socket.socket], payloads: list[msgspec.Raw]
) -> None:
    connection, peer = pair
    for _ in range(2):
        thread = threading.Thread(target=answer, args=(peer, len(payloads)))
        thread.start()
        assert ask(connection, payloads, 20) == [len(decode_any(payload)) for payload in payloads]
        thread.join()
    assert connection.usable and connection.quiet()


@pytest.mark.parametrize("count", [1, 2])
def test_what_a_peer_does_not_read_was_not_sent_at_the_deadline(
    pair: tuple[Connection, socket.socket], count: int
) -> None:
    connection, _ = pair
    lost = ask(connection, [raw(b"small")] * (count - 1) + [LARGE], 0.5)
    assert [(one.sent, one.timed_out) for one in lost if isinstance(one, Lost)] == [(True, True), (False, True)][
        -count:
    ]
    assert not connection.usable


@pytest.mark.parametrize("count", [1, 2])
def test_what_is_not_answered_may_have_been_done_at_the_deadline(
    pair: tuple[Connection, socket.socket], count: int
) -> None:
    connection, _ = pair
    lost = ask(connection, [raw(b"small")] * count, 0.1)
    assert [(one.sent, one.timed_out) for one in lost if isinstance(one, Lost)] == [(True, True)] * count
    assert not connection.usable


def test_nothing_is_sent_after_the_deadline(pair: tuple[Connection, socket.socket]) -> None:
    connection, peer = pair
    (lost,) = ask(connection, [raw(b"small")], 0)
    assert isinstance(lost, Lost)
    assert (lost.sent, lost.timed_out) == (False, True)
    peer.setblocking(False)
    with pytest.raises(BlockingIOError):
        peer.recv(1)


def full_listener(stack: contextlib.ExitStack) -> tuple[str, int]:
    """An address where nobody is told whether he is connected: the queue is full."""
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
    for _ in range(3):
        waiting = stack.enter_context(socket.socket())
        waiting.setblocking(False)
        waiting.connect_ex(listener.getsockname())
    return listener.getsockname()


def test_all_addresses_of_a_host_together_have_until_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.ExitStack() as stack:
        silent = [full_listener(stack) for _ in range(3)]
        found = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", where) for where in silent]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            Connection.open(
                ("host.example", 7400),
                me=Identity("client", "test"),
                keyspace="default",
                limits=DEFAULT_LIMITS,
                deadline=began + 0.6,
            )
        assert 0.5 < time.monotonic() - began < 1
