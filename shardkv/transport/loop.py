"""Runs a program's main coroutine on the fastest loop there is, with SIGTERM and SIGINT turned into an event.

Invariant: a signal handler only sets the event; the program acts on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import resource
import signal
from collections.abc import Callable, Coroutine
from typing import Any

GC_THRESHOLDS = (50_000, 50, 1000)
"""A young pass every 50,000 new containers and an old one rarely: a full pass over big dicts takes tens of ms."""

MMAP_THRESHOLD = 4 * 1024 * 1024
TRIM_THRESHOLD = 8 * 1024 * 1024
"""Bytes. A freed buffer smaller than the first one, and so much free memory at the heap's end, are kept for the next
one: given back to the system each time, they cost a page fault every 4 KiB, which for pages of a scan is more than all
else that is done with them."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Names of glibc's."""

Main = Callable[[asyncio.Event], Coroutine[Any, Any, int]]


def run_program(main: Main) -> int:
    """Run `main(stop)` until it returns its exit code; `stop` is set by SIGTERM or SIGINT."""
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_with_signals(main))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


async def _with_signals(main: Main) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    gc.set_threshold(*GC_THRESHOLDS)
    _allow_many_files()
    _keep_freed_memory()
    return await main(stop)


def _keep_freed_memory() -> None:
    """Have the C library keep as much freed memory as is needed again and again, where it can be told so."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, TRIM_THRESHOLD)


def _allow_many_files() -> None:
    """Raise the limit of open files, sockets included, to what the system lets this process have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def run_until(stop: asyncio.Event, *jobs: Coroutine[Any, Any, None]) -> None:
    """Run all jobs at once until `stop` is set; then cancel those still running. Raises what a job raises."""
    stopped = asyncio.ensure_future(stop.wait())
    tasks: set[asyncio.Task[Any]] = {asyncio.ensure_future(job) for job in jobs}
    running = {stopped, *tasks}
    try:
        while not stopped.done():
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
    finally:
        for task in (stopped, *tasks):
            task.cancel()
        await asyncio.gather(stopped, *tasks, return_exceptions=True)
