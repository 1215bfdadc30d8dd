"""Runs a program's main coroutine on the fastest loop there is, with SIGTERM and SIGINT turned into an event.

Invariant: a signal handler only sets the event; the program acts on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import resource
import signal
from collections.abc import Callable, Coroutine
from typing import Any

GC_THRESHOLDS = (50_000, 50, 1000)
"""A young pass every 50,000 new containers and an old one rarely: a full pass over big dicts takes tens of ms."""

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
    return await main(stop)


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
