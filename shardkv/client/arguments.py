"""What users pass to a client, checked and turned into what it works with; and what they get back.

Invariant: whatever has the wrong type raises InvalidArgument with a sentence that names the argument. Single keys and
values are packed by `shardkv.write_batch`, lengths judged in `shardkv.wire.checks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias, TypeVar, cast

from shardkv.errors import InvalidArgument
from shardkv.limits import TTL_MS_MAX
from shardkv.transport.address import Address, parse_address
from shardkv.whole_number import LEAST, MOST, in_range
from shardkv.wire.messages import NAME_LENGTH_MAX
from shardkv.write_batch import Text, pack_texts

Out = TypeVar("Out", bytes, str)
Decode: TypeAlias = Callable[[bytes], Out]
"""How results become what users get: bytes, or str with `decode_responses`."""

DEFAULT_ADDRESS = "127.0.0.1:7400"
DEFAULT_TIMEOUT_S = 5.0
TIMEOUT_S_MAX = 7 * 24 * 3600.0
VERSION_MAX = (1 << 64) - 1


def to_column(values: Iterable[Text], what: str) -> list[bytes]:
    """Several of them. A lone str or bytes is refused: it is hardly ever meant as a list of its characters."""
    if isinstance(values, str | bytes | bytearray | memoryview):
        raise InvalidArgument(f"Several {what}s are expected, not one {type(values).__name__}.", hint="Pass a list.")
    try:
        given = list(values)
    except TypeError:
        raise InvalidArgument(f"Several {what}s are expected, not {type(values).__name__}.") from None
    if given and type(given[0]) is str:
        try:
            return list(map(str.encode, cast(list[str], given)))
        except (TypeError, UnicodeEncodeError):
            pass  # some are not str, or one is no text: one by one, to say which
    return pack_texts(given, what)


def to_addresses(addresses: str | Iterable[str]) -> list[Address]:
    """ "HOST:PORT", several of them with commas between, or a list of them. Raises InvalidArgument."""
    try:
        texts = addresses.split(",") if isinstance(addresses, str) else list(addresses)
        found = [parse_address(text) for text in texts]
    except (TypeError, AttributeError):
        raise InvalidArgument("Router addresses must be text such as 127.0.0.1:7400, or a list of them.") from None
    if not found:
        raise InvalidArgument("A client needs at least one router address.", hint="For example 127.0.0.1:7400.")
    return found


def to_timeout_s(timeout: float | None, default: float) -> float:
    """The timeout of a call in seconds; None is the client's. Raises InvalidArgument."""
    if timeout is None:
        return default
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout <= TIMEOUT_S_MAX:
        raise InvalidArgument(
            f"A timeout must be a number of seconds above 0 and at most {TIMEOUT_S_MAX:g}, not {timeout!r}."
        )
    return float(timeout)


def to_ttl_ms(ttl: float | None) -> int | None:
    """A time to live in seconds as milliseconds, at least 1; None: for good. Raises InvalidArgument."""
    if ttl is None:
        return None
    if isinstance(ttl, bool) or not isinstance(ttl, int | float) or not 0 < ttl <= TTL_MS_MAX / 1000:
        raise InvalidArgument(
            f"A time to live must be a number of seconds above 0 and at most {TTL_MS_MAX // 1000}, not {ttl!r}.",
            hint="Leave it out for a key that stays.",
        )
    return max(1, min(round(ttl * 1000), TTL_MS_MAX))


def to_version(version: object) -> int:
    """A version as `get` with `with_version` tells it, or 0: the key does not exist. Raises InvalidArgument."""
    if isinstance(version, bool) or not isinstance(version, int) or not 0 <= version <= VERSION_MAX:
        raise InvalidArgument(
            f"A version is a whole number of at least 0, not {version!r}.",
            hint="Take it from put, or from get with with_version.",
        )
    return version


def to_amount(by: object) -> int:
    """What `incr` adds. Raises InvalidArgument."""
    if isinstance(by, bool) or not isinstance(by, int) or not in_range(by):
        raise InvalidArgument(f"An amount to count by is a whole number from {LEAST} to {MOST}, not {by!r}.")
    return by


def to_keyspace(name: object) -> str:
    """A keyspace's name. Raises InvalidArgument."""
    if not isinstance(name, str) or not name:
        raise InvalidArgument(f"A keyspace is named by a text that is not empty, not {name!r}.")
    if len(name) > NAME_LENGTH_MAX:
        raise InvalidArgument(
            f"The name of a keyspace has at most {NAME_LENGTH_MAX} characters, not {len(name)}: {name[:40]!r}..."
        )
    return name


def as_given(value: bytes) -> bytes:
    """Results as they are stored."""
    return value


def as_text(value: bytes) -> str:
    """Results as text, for `decode_responses`. Raises InvalidArgument."""
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise InvalidArgument(
            f"{value[:40]!r} is not UTF-8 text: {error.reason} at byte {error.start}.",
            hint="Read it with a client without decode_responses.",
        ) from None
