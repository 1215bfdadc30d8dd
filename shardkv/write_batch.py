"""`WriteBatch`: puts and deletes that are applied together, in the order they were added.

`Engine.write` applies it atomically, a client's `write` atomically per shard. Held as columns, as the wire and the log
want them, so that a batch of any size is one encode. Sizes are judged by whoever takes the batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from shardkv.errors import InvalidArgument

PUT = 1
DELETE = 2

Text = str | bytes | bytearray | memoryview


class WriteBatch:
    """Text is stored as UTF-8. Not thread-safe."""

    __slots__ = ("_deletes", "keys", "values")

    def __init__(self) -> None:
        self.keys: list[bytes] = []
        self.values: list[bytes] = []
        """One for each operation; b"" for a delete."""
        self._deletes: list[int] = []
        """Which operations are deletes."""

    def __len__(self) -> int:
        """How many operations."""
        return len(self.keys)

    @property
    def kinds(self) -> int | bytes:
        """PUT or DELETE: one for all operations when they are alike, else one byte for each."""
        if not self._deletes:
            return PUT
        if len(self._deletes) == len(self.keys):
            return DELETE
        kinds = bytearray((PUT,)) * len(self.keys)
        for index in self._deletes:
            kinds[index] = DELETE
        return bytes(kinds)

    def put(self, key: Text, value: Text) -> None:
        """Add a put. Raises InvalidArgument for anything but str or bytes; then nothing was added."""
        if not (type(key) is bytes and type(value) is bytes):
            key, value = pack_text(key, "key"), pack_text(value, "value")
        self.keys.append(key)
        self.values.append(value)

    def put_many(self, keys: Iterable[Text], values: Iterable[Text]) -> None:
        """Add as many puts as there are keys, of which each has its value. Raises as `put`; then nothing was added."""
        packed_keys, packed_values = pack_texts(keys, "key"), pack_texts(values, "value")
        if len(packed_keys) != len(packed_values):
            raise InvalidArgument(f"There are {len(packed_keys)} keys and {len(packed_values)} values.")
        self.keys += packed_keys
        self.values += packed_values

    def delete(self, key: Text) -> None:
        """Add a delete; a key that does not exist is fine."""
        packed = pack_text(key, "key")
        self._deletes.append(len(self.keys))
        self.keys.append(packed)
        self.values.append(b"")

    def clear(self) -> None:
        """Forget all operations; the batch can be filled anew."""
        self.keys = []
        self.values = []
        self._deletes = []


def pack_text(text: object, what: str) -> bytes:
    """`text` as bytes. Raises InvalidArgument naming `what`."""
    if type(text) is bytes:
        return text
    if isinstance(text, str):
        try:
            return text.encode()
        except UnicodeEncodeError as error:
            raise InvalidArgument(f"A {what} is not valid text: {error.reason} at character {error.start}.") from None
    if isinstance(text, bytes | bytearray | memoryview):
        return bytes(text)
    raise InvalidArgument(
        f"A {what} must be str or bytes, not {type(text).__name__}.", hint="Encode it first, for example with json."
    )


def pack_texts(texts: Iterable[object], what: str) -> list[bytes]:
    """As `pack_text` for each; never the list that was given."""
    given = list(texts)
    if set(map(type, given)) <= {bytes}:
        return cast(list[bytes], given)
    return [pack_text(text, what) for text in given]
