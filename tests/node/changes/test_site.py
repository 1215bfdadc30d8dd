"""What runs in threads for changes: what is removed after a change stays removed."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from shardkv_node.changes.site import Site


def site() -> Site:
    """With threads, and nothing else."""
    names: dict[str, Any] = dict.fromkeys(Site.__dataclass_fields__)
    made: Any = SimpleNamespace(**(names | {"threads": ThreadPoolExecutor(2), "_in_threads": set()}))
    for name in ("in_thread", "after_threads"):
        setattr(made, name, getattr(Site, name).__get__(made))
    return made  # type: ignore[no-any-return]


def test_what_a_cancelled_caller_began_in_a_thread_ends_before_what_comes_after(tmp_path: Path) -> None:
    late, go_on = tmp_path / "late", threading.Event()

    def write_late() -> None:
        go_on.wait(10)
        late.touch()

    async def story() -> None:
        here = site()
        fetching = asyncio.create_task(here.in_thread(write_late))
        await asyncio.sleep(0)
        fetching.cancel()
        with suppress(asyncio.CancelledError):
            await fetching
        removing = asyncio.create_task(here.after_threads(lambda: late.unlink(missing_ok=True)))
        await asyncio.wait([removing], timeout=0.05)
        assert not removing.done()
        go_on.set()
        await removing
        assert not late.exists()

    asyncio.run(story())
