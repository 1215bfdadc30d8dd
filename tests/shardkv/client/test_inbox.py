"""The buffer of a blocking connection: frames that come in pieces, together, and larger than it is."""

from __future__ import annotations

from random import Random

import pytest

from shardkv.client.inbox import FIRST_BYTES, KEPT_BYTES_MOST, Inbox
from shardkv.errors import FrameTooLarge
from shardkv.wire.frame import encode_frame


def receive(inbox: Inbox, stream: bytes, most: int) -> list[bytes]:
    """The bodies of a stream of which at most so many bytes come at once."""
    bodies, rest = [], memoryview(stream)
    while rest:
        room = inbox.room()
        count = min(most, len(room), len(rest))
        assert count
        room[:count], rest = rest[:count], rest[count:]
        bodies += [bytes(body) for body in inbox.take(count)]
    return bodies


@pytest.mark.parametrize("most", [1, 3, 1000, FIRST_BYTES, 1 << 30])
def test_bodies_come_as_they_were_sent(most: int) -> None:
    random, inbox = Random(7), Inbox(1 << 20)
    largest = 300 if most < 1000 else 200_000
    for _ in range(10):
        bodies = [random.randbytes(random.choice([0, 1, 20, random.randrange(largest)])) for _ in range(30)]
        assert receive(inbox, b"".join(map(encode_frame, bodies)), most) == bodies


def test_memory_grows_with_what_came_not_with_what_was_announced() -> None:
    inbox = Inbox(1 << 30)
    announced = (1 << 30).to_bytes(4, "big")
    assert receive(inbox, announced + bytes(3 * FIRST_BYTES), 1 << 30) == []
    assert len(inbox.room()) <= 4 * FIRST_BYTES


def test_a_large_buffer_is_given_up_when_it_is_empty() -> None:
    inbox = Inbox(1 << 30)
    large = bytes(KEPT_BYTES_MOST + 1)
    assert receive(inbox, encode_frame(large), 1 << 30) == [large]
    assert len(inbox.room()) == FIRST_BYTES


def test_a_length_over_the_limit_is_refused_before_its_body_comes() -> None:
    inbox = Inbox(100)
    assert receive(inbox, encode_frame(bytes(100)), 7) == [bytes(100)]
    with pytest.raises(FrameTooLarge, match="A frame of 101 bytes was announced; the limit here is 100 bytes"):
        receive(inbox, encode_frame(bytes(101)), 7)
