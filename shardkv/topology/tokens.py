"""Tokens: where in a keyspace's token space a key falls, and how a new keyspace is cut into shards.

hash    token = xxh3-64 of the key, or of the part between the first `{` and the next `}` when that part is not
        empty: keys with the same `{tag}` always share a shard.
range   token = the key itself.

Invariant: these functions are part of the storage format. A change here loses every key's place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from xxhash import xxh3_64_intdigest

from shardkv.topology.documents import HASH_TOKENS, Partition, TopologyBound

_LETTERS_AND_DIGITS = b"0123456789abcdefghijklmnopqrstuvwxyz"


def hash_token(key: bytes) -> int:
    """The token of `key` in a hash keyspace: 0 <= token < 2**64."""
    if b"{" in key:
        key = _tag(key)
    return xxh3_64_intdigest(key)


def hash_tokens(keys: Sequence[bytes]) -> Iterable[int]:
    """The tokens of many keys in a hash keyspace, in their order."""
    return map(hash_token if b"{" in b"".join(keys) else xxh3_64_intdigest, keys)


def _tag(key: bytes) -> bytes:
    opened = key.find(b"{")
    closed = key.find(b"}", opened + 1)
    return key[opened + 1 : closed] if closed > opened + 1 else key


def range_token(key: bytes) -> bytes:
    """The token of `key` in a range keyspace: the key."""
    return key


def range_tokens(keys: Sequence[bytes]) -> Iterable[bytes]:
    """The tokens of many keys in a range keyspace, in their order."""
    return keys


TOKEN_OF: dict[Partition, Callable[[bytes], TopologyBound]] = {"hash": hash_token, "range": range_token}
TOKENS_OF: dict[Partition, Callable[[Sequence[bytes]], Iterable[TopologyBound]]] = {
    "hash": hash_tokens,
    "range": range_tokens,
}


def initial_starts(partition: Partition, shards: int, split_at: list[bytes]) -> list[TopologyBound]:
    """The ascending first tokens of the shards of a new keyspace; the first is the lowest token there is.

    hash: `shards` equal parts. range: cut at `split_at` when given (then there are len(split_at) + 1 shards),
    else evenly over two-character prefixes of digits and lower-case letters.
    """
    if partition == "hash":
        return [HASH_TOKENS * number // shards for number in range(shards)]
    if split_at:
        return [b"", *sorted(set(split_at) - {b""})]
    return [b"", *(_alphanumeric_cut(number, shards) for number in range(1, shards))]


def _alphanumeric_cut(number: int, shards: int) -> bytes:
    base = len(_LETTERS_AND_DIGITS)
    digits = 2 if shards <= base * base // 4 else 4
    at = base**digits * number // shards
    prefix = bytearray()
    for _ in range(digits):
        at, digit = divmod(at, base)
        prefix.insert(0, _LETTERS_AND_DIGITS[digit])
    return bytes(prefix)
