"""Both clients behind one blocking face, so that one test speaks for both."""

from __future__ import annotations

import asyncio
from typing import Any

from shardkv import AsyncClient, Client

FACES = ["sync", "async"]
DIRECT_FACES = ["sync direct", "async direct"]


class BlockingAsync:
    """An AsyncClient on a loop of its own; each call runs the loop until it is answered."""

    def __init__(self, address: Any, **options: Any) -> None:
        self._runner = asyncio.Runner()
        self._db = AsyncClient(address, **options)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._db, name)
        if name in ("scan", "get_range"):
            return lambda *args, **options: BlockingScan(self._runner, found(*args, **options))
        return lambda *args, **options: self._runner.run(found(*args, **options))

    def write_in_batch(self, fill: Any, **options: Any) -> None:
        async def run() -> None:
            async with self._db.batch(**options) as batch:
                fill(batch)

        self._runner.run(run())

    def __enter__(self) -> BlockingAsync:
        return self

    def __exit__(self, *exc: object) -> None:
        self._runner.run(self._db.close())
        self._runner.close()


class BlockingScan:
    """An AsyncScan, row by row."""

    def __init__(self, runner: asyncio.Runner, scan: Any) -> None:
        self._runner = runner
        self._scan = scan

    def __iter__(self) -> BlockingScan:
        return self

    def __next__(self) -> Any:
        try:
            return self._runner.run(self._scan.__anext__())
        except StopAsyncIteration:
            raise StopIteration from None

    @property
    def cursor(self) -> str | None:
        return self._scan.cursor


class Blocking(Client):
    def write_in_batch(self, fill: Any, **options: Any) -> None:
        with self.batch(**options) as batch:
            fill(batch)


def open_face(face: str, address: Any, **options: Any) -> Any:
    """A client of that kind, as a context manager."""
    kind, _, direct = face.partition(" ")
    if direct:
        options["direct"] = True
    return Blocking(address, **options) if kind == "sync" else BlockingAsync(address, **options)
