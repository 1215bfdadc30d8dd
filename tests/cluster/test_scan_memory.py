"""No process holds a scan: each grows by some pages while far more than it may grow passes through it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.bench.scan_memory import MIB, Way, fill, grown_bytes
from tests.worlds.cluster import ClusterWorld, cluster_world

CONFIG = """
[engine]
durability = "os"
memtable_bytes_max = 1048576
block_cache_bytes = 262144
[launcher]
restart_first_ms = 20
restart_most_ms = 100
crash_loop_starts = 1000
"""
NODES = 2
ROWS, VALUE_BYTES = 20_000, 2_000
GROWTH_BYTES_MAX = 9 * MIB
"""The rows are 38 MiB, of which each node has half."""


@pytest.fixture(scope="module", params=["hash", "range"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterWorld]:
    options = ["--partition", request.param, "--nodes", str(NODES)]
    if request.param == "range":
        options += ["--split-at", f"{ROWS // 2:016}"]
    with cluster_world(tmp_path_factory.mktemp(request.param), *options, config=CONFIG) as found:
        fill(found, 0, ROWS, VALUE_BYTES)
        yield found


@pytest.mark.parametrize(
    "way",
    [Way("scan"), Way("reverse, slow consumer", asynchronous=True, reverse=True, pause_s=0.01)],
    ids=lambda way: way.what,
)
def test_a_scan_of_everything_grows_no_process(world: ClusterWorld, way: Way) -> None:
    grown = grown_bytes(world, way, ROWS, nodes=NODES)
    assert max(grown.values()) < GROWTH_BYTES_MAX, {name: f"{size / MIB:.1f} MiB" for name, size in grown.items()}
