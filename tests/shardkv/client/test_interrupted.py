"""The blocking client's calls, ended by an exception at each step at which a signal's handler may raise one.

What must hold afterwards, also with a single connection: the next calls work, each gets its own answer, and nothing of
what was begun is kept.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from shardkv import Client
from tests.shardkv.client.dict_router import DictRouter

ROWS = 40
pytestmark = pytest.mark.filterwarnings("ignore:unclosed", "ignore::pytest.PytestUnraisableExceptionWarning")
"""A socket that was being made is closed by who finds it unused."""

EVENTS = {"call", "return", "c_return"}
"""Handlers of signals run when a function begins and when one has returned."""


class Interrupted(Exception):
    """What a handler raised."""


def everywhere(call: Callable[[], object]) -> Iterator[int]:
    """Make the call again and again, interrupted at its first step, its second, and so on to its end."""
    step = 0
    left = 0

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal left
        if event in EVENTS and not frame.f_code.co_filename.endswith("_weakrefset.py"):  # which would swallow it
            left -= 1
            if not left:
                sys.setprofile(None)
                raise Interrupted

    while left <= 0:
        step += 1
        left = step
        sys.setprofile(watch)
        try:
            call()
        except Interrupted:
            pass
        finally:
            sys.setprofile(None)
        yield step


@pytest.fixture
def db(router: DictRouter) -> Iterator[Client[bytes]]:
    router.page_rows = 7
    router.store.update({b"%02d" % number: b"value %d" % number for number in range(ROWS)})
    with Client(router.address, timeout=5, connections_max=1) as client:
        yield client


CALLS: dict[str, Callable[[Client[bytes]], object]] = {
    "get": lambda db: db.get("01"),
    "put": lambda db: db.put("new", "value"),
    "put_many": lambda db: db.put_many({"new": "value", "newer": "value"}),
    "get_many": lambda db: db.get_many(["01", "02"]),
    "scan": lambda db: list(db.scan(limit=20)),
    "count": lambda db: db.count(),
}


@pytest.mark.parametrize("connected", [True, False], ids=["connected", "new"])
@pytest.mark.parametrize("what", CALLS)
def test_a_call_that_is_interrupted_anywhere_disturbs_no_other(
    db: Client[bytes], router: DictRouter, what: str, connected: bool
) -> None:
    def call() -> object:
        if not connected:
            for connection in db._pool._idle:
                connection.usable = False
        return CALLS[what](db)

    steps = 0
    for steps in everywhere(call):
        number = steps % ROWS
        assert db.get(b"%02d" % number) == b"value %d" % number
    assert steps > 30
    assert db.get_many(router.store) == router.store
    assert router.connections == 1
    assert len(db._pool._made) < 5
