"""Fences are on disk before they count, and stay until they are removed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from shardkv.control.duties import Fence
from shardkv.errors import StorageError, UnsupportedFormat
from shardkv_node.changes.fences import FILE, FenceFile

ONE, TWO = Fence(7, 3, "c0ffee"), Fence(8, 1, "beef")


def run(story: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(story())


def test_a_fence_is_on_disk_when_add_returns_and_gone_when_remove_does(tmp_path: Path) -> None:
    async def story() -> None:
        file = FenceFile(str(tmp_path))
        await file.add([ONE, TWO])
        assert FenceFile(str(tmp_path)).all == {ONE, TWO}
        await file.remove([ONE])
        assert FenceFile(str(tmp_path)).all == {TWO} == file.all

    run(story)


def test_what_is_being_fenced_is_not_served_before_it_is_on_disk(tmp_path: Path) -> None:
    async def story() -> None:
        file = FenceFile(str(tmp_path))
        adding = asyncio.ensure_future(file.add([ONE]))
        await asyncio.sleep(0)
        assert file.holds(7, 3)
        assert not file.holds(7, 4), "its epoch has risen"
        assert not file.holds(8, 3)
        await adding

    run(story)


def test_changes_of_the_file_do_not_overtake_each_other(tmp_path: Path) -> None:
    async def story() -> None:
        file = FenceFile(str(tmp_path))
        many = [Fence(shard, 1, "c") for shard in range(20)]
        await asyncio.gather(*(file.add([one]) for one in many), file.remove([TWO]))
        assert FenceFile(str(tmp_path)).all == set(many)
        cancelled = asyncio.ensure_future(file.add([ONE]))
        await asyncio.sleep(0)
        cancelled.cancel()
        await file.add([TWO])
        assert {TWO, *many} <= FenceFile(str(tmp_path)).all

    run(story)


def test_the_highest_revision_is_kept(tmp_path: Path) -> None:
    async def story() -> None:
        file = FenceFile(str(tmp_path))
        file.note_revision(12)
        file.note_revision(9)
        assert file.revision == 12
        await file.save()
        assert FenceFile(str(tmp_path)).revision == 12
        file.note_revision(20)
        await file.add([ONE])
        assert FenceFile(str(tmp_path)).revision == 20

    run(story)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    async def story() -> None:
        (tmp_path / FILE).write_text("{")
        with pytest.raises(StorageError):
            FenceFile(str(tmp_path))
        (tmp_path / FILE).write_text(json.dumps({"format": 99, "revision": 1, "fences": []}))
        with pytest.raises(UnsupportedFormat):
            FenceFile(str(tmp_path))

    run(story)
