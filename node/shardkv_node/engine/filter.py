"""The filter of a table: says "not here" for most keys that are not, and never for one that is.

A blocked Bloom filter with blocks of one 64-bit word (Putze, Sanders, Singler: "Cache-, Hash- and Space-Efficient
Bloom Filters", 2007): a key sets four bits of one word, so a look-up is one hash, one index and one mask.

    h    = xxh3-64(key), seed 0
    word = (h >> 32) * number of words >> 32
    bits = h & 63, h >> 6 & 63, h >> 12 & 63, h >> 18 & 63 of that word

Stored as little-endian u64 words; no words: no filter, every key may be there. With 10 bits per key about 2 of
100 absent keys pass. The formula is on disk: changing it needs a new table format version.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from functools import cache

from xxhash import xxh3_64_intdigest

_WORD_BITS = 64


@cache
def bit_pairs() -> list[int]:
    """For each 12 bits of hash, the word with the two bits they name. Made at first use: 4,096 ints.

    A look-up is `mask = pairs[h & 4095] | pairs[h >> 12 & 4095]`, then `words[(h >> 32) * n >> 32] & mask == mask` for
    each filter of n words that may have the key.
    """
    return [(1 << (x & 63)) | (1 << (x >> 6)) for x in range(4096)]


def build(keys: Sequence[bytes], bits_per_key: int) -> array[int]:
    """The words of the filter over these keys; empty when there are no keys or no bits."""
    count = -(-len(keys) * bits_per_key // _WORD_BITS)
    words = [0] * count  # an array makes a new int at each look: a list is an eighth faster
    if count:
        pairs = bit_pairs()
        for h in map(xxh3_64_intdigest, keys):
            words[(h >> 32) * count >> 32] |= pairs[h & 4095] | pairs[h >> 12 & 4095]
    return array("Q", words)


def to_bytes(words: array[int]) -> bytes:
    if sys.byteorder == "big":
        words = words[:]
        words.byteswap()
    return words.tobytes()


def from_bytes(data: bytes) -> array[int]:
    """Raises `ValueError` when the data is not whole words."""
    words = array("Q")
    words.frombytes(data)
    if sys.byteorder == "big":
        words.byteswap()
    return words
