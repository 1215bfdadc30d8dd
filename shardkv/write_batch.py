"""`WriteBatch`: puts and deletes that are applied together, in the order they were added.

`Engine.write` applies it atomically, a client's `write` atomically per shard. Held as columns, as the wire and the log
want them, so that a batch of any size is one encode. Sizes are judged by whoever takes the batch.
"""

from __future__ import annotations

from shardkv.errors import InvalidArgument

PUT = 1
DELETE = 2

Text = str | bytes | bytearray | memoryview


class WriteBatch:
    """Text is stored as UTF-8. Not thread-safe."""

    __slots__ = ("keys", "kinds", "values")

    def __init__(self) -> None:
        self.keys: list[bytes] = []
        self.kinds = bytearray()
        """PUT or DELETE, one byte for each operation."""
        self.values: list[bytes] = []
        """One for each operation; b"" for a delete."""

    def __len__(self) -> int:
        """How many operations."""
        return len(self.keys)

    def put(self, key: Text, value: Text) -> None:
        """Add a put. Raises InvalidArgument for anything but str or bytes; then nothing was added."""
        packed_key, packed_value = pack_text(key, "key"), pack_text(value, "value")
        self.keys.append(packed_key)
        self.values.append(packed_value)
        self.kinds.append(PUT)

    def delete(self, key: Text) -> None:
        """Add a delete; a key that does not exist is fine."""
        self.keys.append(pack_text(key, "key"))
        self.values.append(b"")
        self.kinds.append(DELETE)

    def clear(self) -> None:
        """Forget all operations; the batch can be filled anew."""
        self.keys = []
        self.kinds = bytearray()
        self.values = []


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
