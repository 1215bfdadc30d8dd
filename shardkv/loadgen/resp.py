"""Redis's protocol (RESP 2) as far as a load needs it. Pure.

Invariant: every byte of every reply is compared with what it must be, in one comparison for an exchange that comes
whole. Replies come in the order of the requests, so there is nothing to match.
"""

from __future__ import annotations

from collections.abc import Sequence

from shardkv.loadgen.exchange import Exchange, WrongReply

OK = b"+OK\r\n"
SHOWN_BYTES = 80


def command(*words: bytes) -> bytes:
    """One command as it is sent."""
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)


class RespReader:
    """Reads the replies on one connection."""

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held = bytearray()

    def take(self, data: bytes, expected: bytes) -> bool:
        if data == expected and not self._held:
            return True
        held = self._held
        held += data
        if not expected.startswith(held):
            raise WrongReply(f"The server answered {bytes(held[_first_difference(held, expected) :][:SHOWN_BYTES])!r}.")
        if len(held) < len(expected):
            return False
        held.clear()
        return True


def _first_difference(held: bytearray, expected: bytes) -> int:
    """Where the line begins in which they differ."""
    at = next((i for i, (one, other) in enumerate(zip(held, expected, strict=False)) if one != other), len(expected))
    return held.rfind(b"\n", 0, at) + 1


class Resp:
    """Redis, or what speaks like it."""

    def __init__(self, user: str | None = None, password: str | None = None, database: int = 0) -> None:
        self._greetings = []
        if password is not None:
            self._greetings.append(command(b"AUTH", *[word.encode() for word in (user, password) if word]))
        if database:
            self._greetings.append(command(b"SELECT", b"%d" % database))

    def greetings(self) -> list[Exchange]:
        return [Exchange(greeting, OK, len(OK)) for greeting in self._greetings]

    def set_keys(self, keys: Sequence[bytes], values: Sequence[bytes]) -> Exchange:
        request = b"".join(command(b"SET", key, value) for key, value in zip(keys, values, strict=True))
        return Exchange(request, OK * len(keys), len(OK) * len(keys))

    def get_keys(self, keys: Sequence[bytes], values: Sequence[bytes]) -> Exchange:
        expected = b"".join(b"$%d\r\n%s\r\n" % (len(value), value) for value in values)
        return Exchange(b"".join(command(b"GET", key) for key in keys), expected, len(expected))

    def reader(self) -> RespReader:
        return RespReader()
