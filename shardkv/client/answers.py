"""Frames of one reply, decoded together with its payload: for who knows what was asked.

Invariant: a decoder here takes nothing but the successful answer it is for. Whatever else a frame holds, an error, a
farewell, several replies, raises one of UNDECODABLE, and is `decode_replies`'s to read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, Literal, TypeVar

import msgspec

from shardkv.wire.messages import Message, Page, RawReply, ReadReply, WriteReply

Told = TypeVar("Told")


class Answer(Message, Generic[Told]):
    """A reply whose payload is decoded already."""

    id: int
    status: Literal[0]
    payload: Told


Replies = tuple[int, Sequence[RawReply | Answer[Any]]]
"""The sender's clock, and what it sent."""

DecodeAnswer = Callable[[bytes | memoryview], Replies]
"""Of a frame body, to which nothing that is returned refers."""

decode_read_answer: DecodeAnswer = msgspec.msgpack.Decoder(tuple[int, tuple[Answer[ReadReply]]]).decode
decode_write_answer: DecodeAnswer = msgspec.msgpack.Decoder(tuple[int, tuple[Answer[WriteReply]]]).decode
decode_page_answer: DecodeAnswer = msgspec.msgpack.Decoder(tuple[int, tuple[Answer[Page]]]).decode
