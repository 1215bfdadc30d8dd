"""A scan that was left is gone on with by its cursor: another client, another process, after everything restarted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.worlds.cluster import SMALL_ENGINE, cluster_world

ROWS = 6_000


@pytest.mark.parametrize("partition", ["hash", "range"])
def test_a_cursor_outlives_clients_routers_and_nodes(tmp_path: Path, partition: str):
    rows = {b"%s%05d" % (b"akz"[number % 3 : number % 3 + 1], number): b"v%d" % number for number in range(ROWS)}
    expected = sorted(rows.items())
    with cluster_world(tmp_path, "--partition", partition, "--routers", "2", config=SMALL_ENGINE) as world:
        with world.client() as db:
            db.put_many(rows)
            scan = db.scan()
            got = [next(scan) for _ in range(ROWS // 3 + 1)]
            down = db.scan(reverse=True, limit=7)
            assert list(down) == expected[:-8:-1]
        world.kill("router-1", "router-2", "node-1", "node-2", "node-3")
        world.wait_serving()
        with world.client() as other:
            second = other.scan(cursor=scan.cursor, limit=ROWS // 3)
            got += second
            assert next(iter(other.scan(cursor=down.cursor, keys_only=True))) == expected[-8][0]
        printed = world.run("scan", "--cursor", str(second.cursor), "--json").splitlines()
        got += [(row["key"].encode(), row["value"].encode()) for row in map(json.loads, printed)]
    assert got == expected
