"""A metadata store of each kind, for tests that hold for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from shardkv.metadata.store import MetaStore
from shardkv.metadata.stores import open_store, parse_store
from tests.worlds.etcd import EtcdWorld, etcd_world

Story = Callable[[MetaStore], Awaitable[None]]
Run = Callable[[Story], None]


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdWorld]:
    with etcd_world(tmp_path_factory.mktemp("etcd")) as world:
        yield world


@pytest.fixture(params=["embedded", "etcd"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    """Runs a story on a new store."""
    address = "embedded"
    if request.param == "etcd":
        etcd: EtcdWorld = request.getfixturevalue("etcd")
        address = f"etcd://{etcd.endpoints}/{tmp_path.name}"

    def run(story: Story) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(30), open_store(parse_store(address), tmp_path) as store:
                await story(store)

        asyncio.run(bounded())

    return run
