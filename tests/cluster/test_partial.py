"""Scans that may be partial, with a real node killed for good: the rows of its shards are missing, and named."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardkv import Client
from shardkv.client.missing import Missing
from shardkv.errors import ShardUnavailable
from shardkv.topology.tokens import hash_token
from tests.worlds.cluster import cluster_world, until

KEYS = [b"%s%04d" % (letter, number) for letter in (b"a", b"h", b"q", b"z") for number in range(500)]


def lacks(missing: list[Missing], key: bytes) -> bool:
    return any(
        one.start <= key
        and (one.stop is None or key < one.stop)
        and (one.tokens is None or one.tokens[0] <= hash_token(key) < one.tokens[1])
        for one in missing
    )


@pytest.mark.parametrize("partition", ["hash", "range"])
def test_a_partial_scan_lacks_what_it_says_and_nothing_else(tmp_path: Path, partition: str):
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


def is_partial(db: Client) -> bool:
    scan = db.scan(on_shard_error="partial")
    list(scan)
    return bool(scan.missing)
