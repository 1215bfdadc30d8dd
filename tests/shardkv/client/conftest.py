"""A misbehaving router, and both kinds of client connected to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.shardkv.client.dict_router import DictRouter
from tests.shardkv.client.faces import FACES, open_face


@pytest.fixture
def router() -> Iterator[DictRouter]:
    with DictRouter() as running:
        yield running


@pytest.fixture(params=FACES)
def db(request: pytest.FixtureRequest, router: DictRouter) -> Iterator[Any]:
    with open_face(request.param, router.address, timeout=2) as client:
        yield client
