"""What the driver sends and waits for, the same for every protocol. Pure.

A dialect turns keys and values into exchanges before the clock starts; while it runs, its reply reader is only
asked whether an exchange is answered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol


class WrongReply(Exception):
    """A server answered with an error, or with something else than what was written before."""


class Exchange(NamedTuple):
    """Requests that leave in one write, and what will answer them."""

    request: bytes
    expected: Any
    """As the dialect's reply reader wants it."""
    reply_bytes: int
    """How much will be read, about."""


class ReplyReader(Protocol):
    """Reads the replies on one connection."""

    def take(self, data: bytes, expected: Any) -> bool:
        """Take what was received next; True when the exchange is answered in full. Raises WrongReply."""


class Dialect(Protocol):
    """One protocol, spoken to one server."""

    def greetings(self) -> list[Exchange]:
        """To be exchanged one after the other on a new connection."""

    def set_keys(self, keys: Sequence[bytes], values: Sequence[bytes]) -> Exchange:
        """Write each value under its key."""

    def get_keys(self, keys: Sequence[bytes], values: Sequence[bytes]) -> Exchange:
        """Read the keys, which hold these values."""

    def reader(self) -> ReplyReader:
        """For a new connection."""
