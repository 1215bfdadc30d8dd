"""The asyncio client: sharing the connection, cancelling, reading ahead, event loops."""

from __future__ import annotations

import asyncio

import pytest

from shardkv import AsyncClient, InvalidArgument, OutcomeUnknown
from shardkv.wire.messages import Op


def test_concurrent_calls_share_one_connection(router):
    async def run() -> None:
        async with AsyncClient(router.address) as db:
            await asyncio.gather(*(db.put(f"k{number}", str(number)) for number in range(500)))
            values = await asyncio.gather(*(db.get(f"k{number}") for number in range(500)))
            assert values == [str(number).encode() for number in range(500)]
            assert router.connections == 1

    asyncio.run(run())


def test_a_slow_call_holds_up_no_other(router):
    router.delay_s = lambda op: 0.5 if op is Op.SCAN else 0.0

    async def run() -> None:
        async with AsyncClient(router.address) as db:
            slow = asyncio.create_task(_listed(db.scan()))
            await asyncio.sleep(0)
            for number in range(20):
                await db.put(str(number), "v", timeout=0.3)
            assert not slow.done()
            await slow

    asyncio.run(run())


def test_cancelling_a_call_disturbs_no_other(router):
    router.store = {b"a": b"1", b"b": b"2"}

    async def run() -> None:
        async with AsyncClient(router.address) as db:
            await db.ping()
            router.delay_s = lambda op: 0.1
            doomed = [asyncio.create_task(db.get("a")) for _ in range(20)]
            kept = [asyncio.create_task(db.get("b")) for _ in range(20)]
            await asyncio.sleep(0.02)
            for task in doomed:
                task.cancel()
            assert await asyncio.gather(*kept) == [b"2"] * 20
            assert all(task.cancelled() for task in doomed)
            router.delay_s = lambda op: 0.0
            assert await asyncio.gather(*(db.get("b") for _ in range(40))) == [b"2"] * 40
            assert router.connections == 1

    asyncio.run(run())


def test_the_next_page_is_fetched_while_one_is_used(router):
    router.store = {b"%03d" % number: b"v" for number in range(100)}
    router.page_rows = 10

    async def run() -> None:
        async with AsyncClient(router.address) as db:
            rows = db.scan(keys_only=True)
            assert await anext(rows) == b"000"
            while len(router.requests) < 2:
                await asyncio.sleep(0.001)
            await rows.aclose()
            await db.ping()
            assert len(router.requests) == 2

    asyncio.run(asyncio.wait_for(run(), 5))


def test_leaving_a_scan_early_leaves_nothing_behind(router, caplog):
    router.store = {b"%03d" % number: b"v" for number in range(100)}
    router.page_rows = 10

    async def run() -> None:
        async with AsyncClient(router.address) as db:
            await db.ping()
            before = asyncio.all_tasks()
            rows = db.scan()
            await anext(rows)
            router.delay_s = lambda op: 0.5
            await asyncio.sleep(0)
            for _ in range(10):
                await anext(rows)
            assert asyncio.all_tasks() > before
            await rows.aclose()
            assert asyncio.all_tasks() == before
            router.delay_s = lambda op: 0.0
            assert await db.get("001") == b"v"

    asyncio.run(run())
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_closing_ends_calls_in_flight(router):
    router.delay_s = lambda op: 1.0

    async def run() -> None:
        db = AsyncClient(router.address)
        write = asyncio.create_task(db.put("k", "v"))
        while not router.requests:
            await asyncio.sleep(0.001)
        await db.close()
        with pytest.raises(OutcomeUnknown):
            await asyncio.wait_for(write, 0.5)

    asyncio.run(run())


def test_another_event_loop_is_refused_with_a_reason(router):
    db = AsyncClient(router.address)

    async def use() -> None:
        await db.get("k")

    asyncio.run(use())
    with pytest.raises(InvalidArgument, match="another event loop"):
        asyncio.run(use())


async def _listed(rows):
    return [row async for row in rows]
