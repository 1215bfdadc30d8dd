import itertools

import pytest
from xxhash import xxh3_64_intdigest

from shardkv.topology.tokens import hash_token, initial_starts, range_token


@pytest.mark.parametrize(
    ("key", "same_as"),
    [
        (b"{user:1}:name", b"user:1"),
        (b"a{user:1}b{other}", b"user:1"),
        (b"{}:x", b"{}:x"),
        (b"{open", b"{open"),
        (b"}a{b}", b"b"),
    ],
)
def test_a_tag_decides_the_place(key: bytes, same_as: bytes) -> None:
    assert hash_token(key) == xxh3_64_intdigest(same_as)


def test_places_are_part_of_the_format_and_never_change() -> None:
    assert hash_token(b"user:1000") == 0xFB6841B2068C0C9F
    assert range_token(b"{user}") == b"{user}"


def test_a_hash_keyspace_is_cut_evenly() -> None:
    starts = initial_starts("hash", 16, [])
    assert starts[0] == 0
    assert {b - a for a, b in itertools.pairwise(starts)} == {2**60}


@pytest.mark.parametrize("shards", [1, 2, 16, 36, 300, 5000])
def test_a_range_keyspace_is_cut_at_rising_keys(shards: int) -> None:
    starts = initial_starts("range", shards, [])
    assert len(starts) == shards
    assert starts[0] == b""
    assert all(a < b for a, b in itertools.pairwise(starts))


def test_a_range_keyspace_is_cut_where_asked() -> None:
    assert initial_starts("range", 16, [b"m", b"c", b"m"]) == [b"", b"c", b"m"]
