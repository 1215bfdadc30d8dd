"""What is put off to the end of a loop's turn runs once, in order, whatever else fails, and leaves room for others."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from shardkv.transport.turn import STEPS, Turn, turn_of


def run(story: Callable[[Turn], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(10):
            await story(turn_of(asyncio.get_running_loop()))

    asyncio.run(bounded())


def test_calls_run_once_in_order_and_not_inside_of_defer() -> None:
    async def story(turn: Turn) -> None:
        done: list[int] = []
        for number in range(5):
            turn.defer(lambda number=number: done.append(number))
        assert done == []
        await asyncio.sleep(0.01)
        assert done == [0, 1, 2, 3, 4]
        assert turn_of(asyncio.get_running_loop()) is turn

    run(story)


def test_one_that_fails_keeps_none_of_the_others_from_running() -> None:
    async def story(turn: Turn) -> None:
        done: list[str] = []
        turn.defer(lambda: 1 // 0)
        turn.defer(lambda: turn.defer(lambda: done.append("later")))
        turn.defer(lambda: done.append("now"))
        await asyncio.sleep(0.01)
        assert done == ["now", "later"]

    run(story)


def test_calls_that_put_off_calls_for_ever_leave_the_loop_to_others() -> None:
    async def story(turn: Turn) -> None:
        count = 0

        def again() -> None:
            nonlocal count
            count += 1
            if count < 1000 * STEPS:
                turn.defer(again)

        turn.defer(again)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert 0 < count <= 4 * STEPS
        while count < 1000 * STEPS:
            await asyncio.sleep(0.01)

    run(story)


def test_an_event_that_comes_alone_has_its_calls_run_at_once() -> None:
    async def story(turn: Turn) -> None:
        done: list[str] = []
        await asyncio.sleep(0.01)
        assert turn.enter()
        turn.defer(lambda: done.append("of the event"))
        assert done == []
        turn.leave()
        assert done == ["of the event"]

    run(story)


def test_events_that_come_together_share_the_end_of_the_turn() -> None:
    async def story(turn: Turn) -> None:
        done: list[str] = []
        turn.defer(lambda: done.append("first"))
        assert not turn.enter()
        turn.defer(lambda: done.append("second"))
        assert not turn.enter()
        assert done == []
        await asyncio.sleep(0.01)
        assert done == ["first", "second"]
        assert not turn.enter(), "they came together just now"

    run(story)
