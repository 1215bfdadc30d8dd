"""`Scan` and `AsyncScan`: the rows of a scan as a user iterates over them, and where it stands.

Invariant: `cursor` begins right after the row that was handed out last, also in the middle of a page; nothing is read
ahead of it that a scan begun there would not read again.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator
from itertools import chain
from typing import Generic, TypeVar, cast

from shardkv.client.arguments import Decode, Out, as_given
from shardkv.client.missing import Missing
from shardkv.client.scan import ScanPlan
from shardkv.wire.messages import Page

Row = TypeVar("Row")
RowsOf = Callable[[Page, Iterator[bytes]], Iterable[Row]]
"""The rows of a page, taking its keys from the iterator: one key for each row, just before that row is handed out."""


class Scan(Iterator[Row], Generic[Row]):
    """An iterator over rows, in key order. `cursor` may be asked for at any time."""

    def __init__(self, plan: ScanPlan, pages: Iterator[Page], rows_of: RowsOf[Row]) -> None:
        self._plan = plan
        self._rows = chain.from_iterable(rows_of(page, plan.unread) for page in pages)

    def __iter__(self) -> Iterator[Row]:
        return self._rows  # without a frame of Python for each row

    def __next__(self) -> Row:
        return next(self._rows)

    @property
    def cursor(self) -> str | None:
        """What is left after the row handed out last, as text: pass it to `scan(cursor=...)` of any client, at any
        time. None when nothing is left."""
        return self._plan.cursor

    @property
    def missing(self) -> list[Missing]:
        """With `on_shard_error="partial"`: what the pages read so far lacked. Look once the last row was read."""
        return list(self._plan.missing)


class AsyncScan(AsyncIterator[Row], Generic[Row]):
    """An asynchronous iterator over rows, in key order. `cursor` may be asked for at any time."""

    def __init__(self, plan: ScanPlan, pages: AsyncGenerator[Page, None], rows_of: RowsOf[Row]) -> None:
        self._plan = plan
        self._rows = self._handed_out(pages, rows_of)

    def __aiter__(self) -> AsyncIterator[Row]:
        return self._rows

    async def __anext__(self) -> Row:
        return await anext(self._rows)

    async def aclose(self) -> None:
        """End the scan; a page that is on its way is no longer waited for."""
        await self._rows.aclose()

    @property
    def cursor(self) -> str | None:
        """As `Scan.cursor`."""
        return self._plan.cursor

    @property
    def missing(self) -> list[Missing]:
        """As `Scan.missing`."""
        return list(self._plan.missing)

    async def _handed_out(self, pages: AsyncGenerator[Page, None], rows_of: RowsOf[Row]) -> AsyncGenerator[Row, None]:
        try:
            async for page in pages:
                for row in rows_of(page, self._plan.unread):
                    yield row
        finally:
            await pages.aclose()


def pairs_of(decode: Decode[Out]) -> RowsOf[tuple[Out, Out]]:
    """(key, value) of a page's rows, decoded."""
    if decode is as_given:
        return lambda page, keys: cast(Iterator[tuple[Out, Out]], zip(keys, page.values or (), strict=False))
    return lambda page, keys: (
        (decode(key), decode(value)) for key, value in zip(keys, page.values or (), strict=False)
    )


def keys_of(decode: Decode[Out]) -> RowsOf[Out]:
    """The keys of a page's rows, decoded."""
    return lambda page, keys: map(decode, keys)
