"""What a node makes of its share of a read or write over several shards."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from shardkv.errors import BatchTooLarge, InvalidArgument, WrongShard
from shardkv.limits import DEFAULT_LIMITS
from shardkv.transport.admission import overloaded
from shardkv.wire.messages import (
    OK,
    Conditions,
    Kind,
    Op,
    Read,
    SharedRead,
    SharedWrite,
    Write,
    WriteResult,
    decode_partial_read_reply,
    decode_read_reply,
    decode_write_reply,
    reply_error,
)
from tests.node.test_process import World, node_world

APPLIED, EXISTED, REFUSED = WriteResult.APPLIED, WriteResult.APPLIED_EXISTED, WriteResult.REFUSED
KEYS = [b"a", b"b", b"c", b"d", b"e"]


def run(directory: Path, story: Callable[[World], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        async with node_world(directory, durability="os") as world:
            await world.serving()
            await story(world)

    asyncio.run(main())


async def read(world: World, shards: list[tuple[int, int, int]], *, versions: bool = False) -> Any:
    """The reply, or the error."""
    reply = await world.ask(Op.READ, SharedRead(KEYS, versions, shards=shards), shard=None, epoch=None)
    return decode_partial_read_reply(reply.payload) if reply.status == OK else reply_error(reply.payload)


async def write(world: World, shards: list[tuple[int, int, int]], asked: SharedWrite | None = None) -> Any:
    """The reply, or the error."""
    asked = asked or SharedWrite(None, None, int(Kind.PUT), KEYS, KEYS, want_existed=True)
    asked.shards = shards
    reply = await world.ask(Op.WRITE, asked, shard=None, epoch=None)
    return decode_write_reply(reply.payload) if reply.status == OK else reply_error(reply.payload)


def codes(reply: Any) -> dict[int, str]:
    """Of the problems, by shard."""
    return {problem.shard: problem.code for problem in reply.problems}


async def held(world: World, shard: int) -> list[tuple[bytes | None, int]]:
    """Value and version of each key in a shard."""
    reply = await world.ask(Op.READ, Read(KEYS, want_versions=True), shard=shard, epoch=1)
    found = decode_read_reply(reply.payload)
    return list(zip(found.values, found.versions, strict=True))


def test_each_shard_gets_its_own_keys_in_one_write_of_its_own(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        reply = await write(world, [(2, 1, 3), (1, 1, 2)])
        assert (list(reply.results), reply.version, reply.problems) == ([APPLIED] * 5, None, [])
        second, first = await held(world, 2), await held(world, 1)
        assert [value for value, _ in second] == [b"a", b"b", b"c", None, None]
        assert [value for value, _ in first] == [None, None, None, b"d", b"e"]
        assert len({version for _, version in second[:3]}) == 1
        again = SharedWrite(None, None, b"\1\2\1\2\1", KEYS, [b"1", b"", b"3", b"", b"5"], want_existed=True)
        assert list((await write(world, [(2, 1, 1), (1, 1, 4)], again)).results) == [EXISTED, 0, 0, EXISTED, EXISTED]
        assert [value for value, _ in await held(world, 1)] == [None, None, b"3", None, b"5"]
        found = await read(world, [(1, 1, 3), (2, 1, 2)], versions=True)
        assert (found.values, found.missing, found.problems) == ([None, None, b"3", None, None], [], [])
        assert [bool(version) for version in found.versions] == [False, False, True, False, False]
        assert (await read(world, [(2, 1, 5)])).versions is None

    run(tmp_path, story)


def test_the_writes_of_a_share_are_of_one_group(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        before = world.node._committer.groups
        await write(world, [(1, 1, 1), (2, 1, 1), (3, 1, 1), (4, 1, 2)])
        assert world.node._committer.groups == before + 1

    run(tmp_path, story)


def test_shards_that_are_not_the_node_s_at_this_epoch_are_problems_beside_the_others(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        shards = [(1, 1, 1), (2, 7, 2), (99, 1, 1), (3, 1, 1)]
        reply = await write(world, shards)
        assert list(reply.results) == [APPLIED, REFUSED, REFUSED, REFUSED, APPLIED]
        assert [(problem.shard, problem.code) for problem in reply.problems] == [
            (2, "stale_epoch"),
            (99, "wrong_shard"),
        ]
        assert [value for value, _ in await held(world, 2)] == [None] * 5
        found = await read(world, shards, versions=True)
        assert (found.values, found.missing) == ([b"a", None, None, None, b"e"], [1, 2, 3])
        assert len(found.versions) == 5
        assert [(problem.shard, problem.code) for problem in found.problems] == [
            (2, "stale_epoch"),
            (99, "wrong_shard"),
        ]

    run(tmp_path, story)


def test_a_shard_whose_write_is_not_taken_leaves_the_others_theirs(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        committer = world.node._committer
        submit, calls = committer.submit, []

        def full_at_second(*arguments: Any) -> None:
            calls.append(arguments)
            if len(calls) == 2:
                raise overloaded("Full.", retry_after_s=1)
            submit(*arguments)

        committer.submit = full_at_second  # type: ignore[method-assign]
        reply = await write(world, [(1, 1, 2), (2, 1, 2), (3, 1, 1)])
        assert list(reply.results) == [APPLIED, APPLIED, REFUSED, REFUSED, APPLIED]
        assert codes(reply) == {2: "overloaded"}

    run(tmp_path, story)


@pytest.mark.parametrize(
    "shards", [[(1, 1, 4)], [(1, 1, 6)], [(1, 1, 3), (1, 1, 2)], [(1, 1, 5), (2, 1, 0)], [(1, 1, 6), (2, 1, -1)]]
)
def test_a_share_that_does_not_name_the_shard_of_each_key_is_refused(
    tmp_path: Path, shards: list[tuple[int, int, int]]
) -> None:
    async def story(world: World) -> None:
        assert isinstance(await read(world, shards), InvalidArgument)
        assert isinstance(await write(world, shards), InvalidArgument)
        assert [value for value, _ in await held(world, 1)] == [None] * 5

    run(tmp_path, story)


def test_a_request_that_names_no_shard_at_all_is_about_none_of_the_node_s(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        assert isinstance(await read(world, []), WrongShard)
        assert isinstance(await write(world, []), WrongShard)

    run(tmp_path, story)


def test_conditions_and_numbers_need_a_shard_of_their_own(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        conditional = SharedWrite(None, Conditions([b"a"], [0]), 1, [b"a"], [b"1"], want_existed=False)
        number = SharedWrite(None, None, int(Kind.INCR), [b"a"], [b"1"], want_existed=False)
        for asked in (conditional, number):
            assert isinstance(await write(world, [(1, 1, 1)], asked), InvalidArgument)

    run(tmp_path, story)


def test_the_values_of_all_shards_together_stop_at_the_size_of_a_frame(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        big = bytes(DEFAULT_LIMITS.value_bytes_max)
        for shard in (1, 2, 3):
            await world.ask(
                Op.WRITE, Write(None, None, 1, [KEYS[shard]], [big], want_existed=False), shard=shard, epoch=1
            )
        error = await read(world, [(4, 1, 1), (1, 1, 1), (2, 1, 1), (3, 1, 2)])
        assert isinstance(error, BatchTooLarge)
        assert "The first 5 values" in error.message

    run(tmp_path, story)
