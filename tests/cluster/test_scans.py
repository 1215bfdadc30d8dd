"""Every operation against a sorted dict: hash and range, one and two routers, blocking and asyncio client, on stores
so small that flushes and compactions happen all the time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from shardkv import AsyncClient, Client
from tests.worlds.cluster import SMALL_ENGINE, cluster_world

EXAMPLES = 25
PREFIXES = [b"", b"a", b"b", b"mm", b"z", b"\xff", b"{t}"]
KEYS = st.builds(lambda prefix, rest: prefix + rest, st.sampled_from(PREFIXES), st.binary(min_size=1, max_size=2))
VALUES = st.binary(max_size=40) | st.binary(min_size=300, max_size=300)


@dataclass
class Mirror:
    """The cluster through both clients, and the dict it must equal."""

    sync: Client
    run_async: Callable[[Callable[[AsyncClient], Any]], Any]
    rows: dict[bytes, bytes] = field(default_factory=dict)


@pytest.fixture(scope="module", params=["hash-1", "hash-2", "range-1", "range-2"])
def mirror(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mirror]:
    partition, routers = request.param.split("-")
    directory: Path = tmp_path_factory.mktemp(request.param)
    options = ["--partition", partition, "--routers", routers, "--durability", "os"]
    with (
        cluster_world(directory, *options, config=SMALL_ENGINE) as world,
        world.client(timeout=20) as db,
        asyncio.Runner() as runner,
    ):

        async def connect() -> AsyncClient:
            return AsyncClient(world.address, timeout=20)

        client = runner.run(connect())
        try:
            yield Mirror(db, lambda call: runner.run(call(client)))
        finally:
            runner.run(client.close())


ROWS = st.dictionaries(KEYS, VALUES, max_size=60)
OPTIONS = st.fixed_dictionaries(
    {"reverse": st.booleans(), "limit": st.none() | st.integers(0, 20), "keys_only": st.booleans()}
)


def expected(rows: dict[bytes, bytes], low: bytes, high: bytes | None, options: dict[str, Any]) -> list[Any]:
    keys = sorted((k for k in rows if k >= low and (high is None or k < high)), reverse=options["reverse"])
    keys = keys if options["limit"] is None else keys[: options["limit"]]
    return keys if options["keys_only"] else [(key, rows[key]) for key in keys]


QUICK = settings(
    max_examples=EXAMPLES,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@QUICK
@given(puts=ROWS, deletes=st.lists(KEYS, max_size=20), a=KEYS, b=KEYS, options=OPTIONS, use_async=st.booleans())
def test_everything_equals_a_sorted_dict(
    mirror: Mirror,
    puts: dict[bytes, bytes],
    deletes: list[bytes],
    a: bytes,
    b: bytes,
    options: dict[str, Any],
    use_async: bool,
) -> None:
    low, high = min(a, b), max(a, b)
    rows = mirror.rows

    async def through_asyncio(db: AsyncClient) -> tuple[Any, ...]:
        await db.put_many(puts)
        existed = [await db.delete(key) for key in deletes]
        return (
            existed,
            [row async for row in db.scan(low, high, **options)],
            [row async for row in db.scan(prefix=a[:1], **options)],
            [row async for row in db.scan(**options)],
            [row async for row in db.get_range(low, high)],
            await db.get_many([a, b, *puts, *deletes]),
        )

    def through_sync(db: Client) -> tuple[Any, ...]:
        db.put_many(puts)
        existed = [db.delete(key) for key in deletes]
        return (
            existed,
            list(db.scan(low, high, **options)),
            list(db.scan(prefix=a[:1], **options)),
            list(db.scan(**options)),
            list(db.get_range(low, high)),
            db.get_many([a, b, *puts, *deletes]),
        )

    existed, ranged, prefixed, whole, inclusive, many = (
        mirror.run_async(through_asyncio) if use_async else through_sync(mirror.sync)
    )

    rows.update(puts)
    assert existed == [rows.pop(key, None) is not None for key in deletes]
    assert ranged == expected(rows, low, high, options)
    prefix_end = bytes([a[0] + 1]) if a[0] < 255 else None
    assert prefixed == expected(rows, a[:1], prefix_end, options)
    assert whole == expected(rows, b"", None, options)
    both_ends = {"reverse": False, "limit": None, "keys_only": False}
    assert inclusive == expected(rows, low, high + b"\x00", both_ends)
    assert many == {key: rows.get(key) for key in [a, b, *puts, *deletes]}


def test_the_stores_really_flushed_and_compacted(mirror: Mirror) -> None:
    for number in range(30):
        mirror.sync.put_many({b"bulk-%04d" % index: b"x" * 300 for index in range(number * 20, number * 20 + 200)})
    engines = [node["engine"] for node in mirror.sync.status()["nodes"].values()]
    assert sum(engine["flushes"] for engine in engines) > 3
    mirror.rows.update({b"bulk-%04d" % index: b"x" * 300 for index in range(780)})
    assert list(mirror.sync.scan()) == sorted(mirror.rows.items())
    assert list(mirror.sync.scan(reverse=True)) == sorted(mirror.rows.items(), reverse=True)
