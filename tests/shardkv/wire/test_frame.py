import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkv.errors import FrameTooLarge
from shardkv.wire.frame import FrameDecoder, encode_frame


@given(st.lists(st.binary(max_size=300)), st.lists(st.integers(1, 50), min_size=1))
def test_any_cutting_of_the_stream_gives_the_same_bodies(bodies: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(map(encode_frame, bodies))
    decoder, found, at, turn = FrameDecoder(300), [], 0, 0
    while at < len(stream):
        size = cuts[turn % len(cuts)]
        found += decoder.feed(stream[at : at + size])
        at, turn = at + size, turn + 1
    assert found == bodies
    assert decoder.buffered == 0


def test_a_giant_length_is_refused_before_its_body_arrives() -> None:
    decoder = FrameDecoder(4096)
    with pytest.raises(FrameTooLarge, match="4097 bytes was announced; the limit here is 4096"):
        decoder.feed((4097).to_bytes(4, "big"))


def test_half_a_frame_is_kept_for_later() -> None:
    decoder = FrameDecoder(100)
    frame = encode_frame(b"hello")
    assert decoder.feed(frame[:6]) == []
    assert decoder.buffered == 6
    assert decoder.feed(frame[6:]) == [b"hello"]
