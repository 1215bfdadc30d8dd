"""One timer for many deadlines: each is told, in time, once, and only while somebody waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from shardkv.client.deadlines import Deadlines


class Call:
    """Notes when it was told."""

    def __init__(self, deadlines: Deadlines, after_s: float) -> None:
        self.deadline = asyncio.get_running_loop().time() + after_s
        self.told: list[float] = []
        self.ended = asyncio.Event()
        deadlines.watch(self, self.deadline)

    def time_out(self) -> None:
        self.told.append(asyncio.get_running_loop().time())
        self.ended.set()


def run(story: Callable[[Deadlines], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(20):
            await story(Deadlines())

    asyncio.run(main())


def test_each_is_told_once_and_never_early() -> None:
    async def story(deadlines: Deadlines) -> None:
        calls = [Call(deadlines, after_s) for after_s in (0.03, 0.01, 0.05, 0.01, 0.02, 0)]
        for call in calls:
            await call.ended.wait()
        assert all(len(call.told) == 1 and call.told[0] >= call.deadline for call in calls)

    run(story)


def test_what_is_forgotten_is_not_told_and_holds_up_nobody() -> None:
    async def story(deadlines: Deadlines) -> None:
        forgotten, call, later = Call(deadlines, 0.01), Call(deadlines, 0.02), Call(deadlines, 1000)
        deadlines.forget(forgotten)
        await call.ended.wait()
        assert not forgotten.told
        assert not later.told
        deadlines.forget(later)

    run(story)


def test_one_that_comes_later_with_less_time_is_told_first() -> None:
    async def story(deadlines: Deadlines) -> None:
        long = Call(deadlines, 1000)
        await asyncio.sleep(0)
        await Call(deadlines, 0.01).ended.wait()
        assert not long.told
        await Call(deadlines, 0.01).ended.wait()

    run(story)


def test_a_closed_one_leaves_no_timer_and_may_be_used_again() -> None:
    async def story(deadlines: Deadlines) -> None:
        call = Call(deadlines, 0.01)
        deadlines.forget(call)
        deadlines.close()
        await asyncio.sleep(0.02)
        await Call(deadlines, 0.01).ended.wait()
        assert not call.told

    run(story)
