"""Partial results, with a real node killed for good: what its shards hold is missing, and named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from shardkv import Client, Missing
from shardkv.errors import ShardUnavailable
from shardkv.topology.tokens import hash_token
from tests.shardkv.client.faces import open_face
from tests.worlds.cluster import ClusterWorld, cluster_world, until

KEYS = [b"%s%04d" % (letter, number) for letter in (b"a", b"h", b"q", b"z") for number in range(500)]


def lacks(missing: Sequence[Missing], key: bytes) -> bool:
    return any(
        one.start <= key
        and (one.stop is None or key < one.stop)
        and (one.tokens is None or one.tokens[0] <= hash_token(key) < one.tokens[1])
        for one in missing
    )


@pytest.mark.parametrize("partition", ["hash", "range"])
def test_a_partial_result_lacks_what_it_says_and_nothing_else(tmp_path: Path, partition: str):
    with cluster_world(tmp_path, "--partition", partition) as world, world.client(timeout=10) as db:
        db.put_many({key: key for key in KEYS})
        world.kill("launcher", "node-2")  # nobody starts it again
        until(lambda: is_partial(db))
        with pytest.raises(ShardUnavailable):
            list(db.scan(timeout=0.5))
        for reverse in (False, True):
            scan = db.scan(on_shard_error="partial", reverse=reverse)
            got = [key for key, _ in scan]
            expected = [key for key in KEYS if not lacks(scan.missing, key)]
            assert got == (expected[::-1] if reverse else expected)
            assert 0 < len(got) < len(KEYS)
        printed = world.run("scan", "--partial", "--keys-only", check=False).encode().split()
        assert printed == expected
        within = db.scan("h", "q", on_shard_error="partial", keys_only=True)
        assert list(within) == [key for key in expected if b"h" <= key < b"q"]
        assert all(one.start >= b"h" and one.stop is not None and one.stop <= b"q" for one in within.missing)
        for face in ("sync", "async"):
            check_reads_and_counts(world, face, expected)


def check_reads_and_counts(world: ClusterWorld, face: str, expected: list[bytes]) -> None:
    """`expected`: the keys that can be read."""
    with open_face(face, world.address, timeout=10) as db:
        found = db.get_many([*KEYS, b"nobody"], on_shard_error="partial", timeout=1)
        there = {key: key for key in expected} | {b"nobody": None}
        assert found == {key: value for key, value in there.items() if not lacks(found.missing, key)}
        assert set(found) >= set(expected)
        assert {type(one.error) for one in found.missing} == {ShardUnavailable}
        assert not any(lacks(found.missing, key) for key in expected)
        versioned = db.get_many(KEYS, with_version=True, on_shard_error="partial")
        assert list(versioned) == expected
        assert all(value == key and version > 0 for key, (value, version) in versioned.items())
        gone = next(key for key in KEYS if lacks(found.missing, key))
        alone = db.get_many([gone], on_shard_error="partial")
        assert alone == {}
        assert [lacks([one], gone) for one in alone.missing] == [True]
        kept = db.get_many([expected[0]], on_shard_error="partial")
        assert (kept, kept.missing) == ({expected[0]: expected[0]}, [])
        with pytest.raises(ShardUnavailable):
            db.get_many([*expected, gone], timeout=0.5)
        count = db.count(on_shard_error="partial", timeout=1)
        assert count == len(expected)
        assert {one.shard for one in count.missing} >= {one.shard for one in found.missing}
        within = db.count("h", "q", on_shard_error="partial")
        assert within == sum(b"h" <= key < b"q" for key in expected)
        assert all(one.start >= b"h" and one.stop is not None and one.stop <= b"q" for one in within.missing)
        with pytest.raises(ShardUnavailable):
            db.count(timeout=0.5)


def is_partial(db: Client) -> bool:
    scan = db.scan(on_shard_error="partial")
    list(scan)
    return bool(scan.missing)
