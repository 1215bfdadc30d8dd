"""What one node makes of conditions, numbers, times to live, versions and ranges, as a router asks for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shardkv.errors import (
    BatchTooLarge,
    ConditionFailed,
    InvalidArgument,
    InvalidNumber,
    InvalidRange,
    ShardFenced,
    ShardKVError,
    StaleEpoch,
    WrongShard,
)
from shardkv.limits import DEFAULT_LIMITS
from shardkv.wire.messages import (
    OK,
    Conditions,
    Count,
    DeleteRange,
    Kind,
    Op,
    Read,
    Write,
    WriteReply,
    decode_count_reply,
    decode_delete_range_reply,
    decode_read_reply,
    decode_write_reply,
    reply_error,
)
from shardkv_node import ranges
from tests.node.test_process import World, node_world

Story = Callable[[World], Coroutine[Any, Any, None]]


def run(directory: Path, story: Story) -> None:
    async def main() -> None:
        async with node_world(directory, durability="os") as world:
            await world.serving()
            await story(world)

    asyncio.run(main())


async def ask(world: World, op: Op, message: object, decode: Callable[[msgspec.Raw], Any]) -> Any:
    """The reply, or the error."""
    reply = await world.ask(op, message, shard=1, epoch=1)
    return decode(reply.payload) if reply.status == OK else reply_error(reply.payload)


async def write(
    world: World,
    key: bytes,
    value: bytes = b"v",
    *,
    kind: Kind = Kind.PUT,
    conditions: Conditions | None = None,
    ttl_ms: int | None = None,
) -> Any:
    asked = Write(None, conditions, int(kind), [key], [value], False, ttl_ms)
    return await ask(world, Op.WRITE, asked, decode_write_reply)


async def read(world: World, *keys: bytes) -> list[tuple[bytes | None, int]]:
    reply = await ask(world, Op.READ, Read(list(keys), want_versions=True), decode_read_reply)
    return list(zip(reply.values, reply.versions, strict=True))


def test_a_version_that_was_read_can_be_asked_for(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        first = await write(world, b"k", b"1")
        assert await read(world, b"none", b"k") == [(None, 0), (b"1", first.version)]
        second = await write(world, b"k", b"2", conditions=Conditions([b"k", b"none"], [first.version, 0]))
        assert isinstance(second, WriteReply)
        error = await write(world, b"k", b"3", conditions=Conditions([b"k"], [first.version]))
        assert isinstance(error, ConditionFailed)
        assert error.detail == {"key": b"k", "expected": first.version, "found": second.version}
        assert await read(world, b"k") == [(b"2", second.version)]
        plain = await ask(world, Op.READ, Read([b"k"]), decode_read_reply)
        assert (plain.values, plain.versions) == ([b"2"], None)

    run(tmp_path, story)


def test_values_with_versions_stop_at_the_size_of_a_frame(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await write(world, b"big", bytes(DEFAULT_LIMITS.value_bytes_max))
        error = await ask(world, Op.READ, Read([b"big"] * 3, want_versions=True), decode_read_reply)
        assert isinstance(error, BatchTooLarge)
        assert "The first 3 values" in error.message

    run(tmp_path, story)


def test_a_number_is_added_to_and_told(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        told = await asyncio.gather(*[write(world, b"n", b"2", kind=Kind.INCR) for _ in range(20)])
        assert sorted(reply.number for reply in told) == list(range(2, 42, 2))
        assert [value for value, _ in await read(world, b"n")] == [b"40"]
        await write(world, b"n", b"text")
        assert isinstance(await write(world, b"n", b"1", kind=Kind.INCR), InvalidNumber)
        refused = await write(world, b"n", b"1", kind=Kind.INCR, conditions=Conditions([b"n"], [0]))
        assert isinstance(refused, ConditionFailed)
        assert (await write(world, b"n")).number is None

    run(tmp_path, story)


def test_what_has_a_time_to_live_ends_by_the_store_s_clock(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        store = world.node._store
        clock = store._now_ms
        now = store.time_ms()
        store._now_ms = lambda: now
        assert isinstance(await write(world, b"k", ttl_ms=1000), WriteReply)
        assert (await write(world, b"n", b"1", kind=Kind.INCR, ttl_ms=2000)).number == 1
        assert (await write(world, b"n", b"1", kind=Kind.INCR)).number == 2
        for later_ms, found in ((999, [b"v", b"2"]), (1000, [None, b"2"]), (1999, [None, b"2"]), (2000, [None, None])):
            store._now_ms = lambda later_ms=later_ms: now + later_ms  # type: ignore[misc]
            assert [value for value, _ in await read(world, b"k", b"n")] == found, later_ms
        store._now_ms = clock

    run(tmp_path, story)


async def steps(world: World, op: Op, stop: bytes | None, limit: int | None = None) -> list[int]:
    """What each step over [start, stop) said, to the end."""
    told: list[int] = []
    start: bytes | None = b""
    while start is not None:
        if op is Op.COUNT:
            counted = await ask(world, op, Count(start, stop), decode_count_reply)
            told.append(counted.count)
            start = counted.frontier
        else:
            deleted = await ask(world, op, DeleteRange(start, stop, limit), decode_delete_range_reply)
            told.append(deleted.deleted)
            start = deleted.frontier
        assert told[-1] <= (ranges.COUNT_KEYS if op is Op.COUNT else ranges.DELETE_KEYS)
    return told


def test_ranges_are_counted_and_deleted_in_bounded_steps(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        keys = [b"%06d" % number for number in range(20_000)]
        for first in range(0, len(keys), 10_000):
            part = keys[first : first + 10_000]
            put = Write(None, None, 1, part, [b"v"] * len(part), False)
            assert isinstance(await ask(world, Op.WRITE, put, decode_write_reply), WriteReply)
        assert sum(await steps(world, Op.COUNT, None)) == 20_000
        assert len(await steps(world, Op.COUNT, None)) >= 3
        assert sum(await steps(world, Op.COUNT, b"000777")) == 777
        assert await steps(world, Op.DELETE_RANGE, b"002500") == [1000, 1000, 500]
        assert await steps(world, Op.DELETE_RANGE, b"002510", limit=3) == [3, 3, 3, 1]
        assert sum(await steps(world, Op.COUNT, None)) == 20_000 - 2510
        assert sum(await steps(world, Op.DELETE_RANGE, b"002510")) == 0
        assert sum(await steps(world, Op.DELETE_RANGE, None)) == 20_000 - 2510
        assert sum(await steps(world, Op.COUNT, None)) == 0
        assert [value for value, _ in await read(world, keys[0], keys[-1])] == [None, None]

    run(tmp_path, story)


@pytest.mark.parametrize(
    ("message", "op", "kind"),
    [
        (Count(b"b", b"a"), Op.COUNT, InvalidRange),
        (DeleteRange(b"b", b"a", None), Op.DELETE_RANGE, InvalidRange),
        (DeleteRange(b"", None, 0), Op.DELETE_RANGE, InvalidArgument),
        (DeleteRange(b"", None, -1), Op.DELETE_RANGE, InvalidArgument),
        ([b""], Op.COUNT, InvalidArgument),
        ([b"", b"", "x"], Op.DELETE_RANGE, InvalidArgument),
    ],
)
def test_a_range_that_makes_no_sense_is_refused(
    tmp_path: Path, message: object, op: Op, kind: type[ShardKVError]
) -> None:
    async def story(world: World) -> None:
        assert isinstance(await ask(world, op, message, lambda payload: payload), kind)

    run(tmp_path, story)


def test_ranges_of_other_shards_and_epochs_are_refused(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await write(world, b"k")
        for op, message in ((Op.COUNT, Count(b"", None)), (Op.DELETE_RANGE, DeleteRange(b"", None, None))):
            for shard, epoch, error in ((1, 2, StaleEpoch), (9, 1, WrongShard), (None, None, WrongShard)):
                reply = await world.ask(op, message, shard=shard, epoch=epoch)
                assert isinstance(reply_error(reply.payload), error)
        assert await steps(world, Op.COUNT, None) == [1]

    run(tmp_path, story)


def test_a_write_to_a_tablet_that_is_about_to_be_split_is_to_be_sent_again(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        tablet = world.node._ownership.tablet_of(1, 1)
        world.node._store.fence_tablet(tablet)
        put = Write(None, None, Kind.PUT, [b"k"], [b"v"], False)
        assert isinstance(await ask(world, Op.WRITE, put, decode_write_reply), ShardFenced)
        read: Any = await ask(world, Op.READ, Read([b"k"]), decode_read_reply)
        assert read.values == [None]
        world.node._store.lift_fence(tablet)
        assert (await ask(world, Op.WRITE, put, decode_write_reply)).results == b"\0"

    run(tmp_path, story)
