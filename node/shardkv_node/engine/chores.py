"""`Chores`: what nobody waits for and would hold up whoever did it: deleting files, freeing the memory of many rows.

Deleting a table of 32 MB takes the system some milliseconds, freeing half a million rows takes Python 60. So a thread
does them, in short steps, and lets others have the interpreter in between.

Invariant: chores are done in the order given, each to its end, also those that are left when `close` is called.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Protocol

STEP_PAUSE_S = 0.0005
"""Between two steps of a chore: whoever waits for the interpreter gets it now, not after the usual 5 ms."""

Step = Callable[[], bool]
"""Does a part of the chore, in a millisecond at most where it computes; returns whether there is more to do."""


class Chores(Protocol):
    def submit(self, step: Step) -> None:
        """Call `step` until it returns False. It must not raise."""
        ...

    def close(self) -> None:
        """Do what is left. What comes later is done at once."""
        ...


class InlineChores:
    """Does each chore inside `submit`."""

    def submit(self, step: Step) -> None:
        while step():
            pass

    def close(self) -> None:
        pass


class ThreadChores:
    """One daemon thread, started by the first chore."""

    def __init__(self) -> None:
        self._steps: queue.SimpleQueue[Step | None] = queue.SimpleQueue()
        self._closed = False
        self._thread: threading.Thread | None = None

    def submit(self, step: Step) -> None:
        if self._closed:
            InlineChores().submit(step)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="shardkv-chores", daemon=True)
            self._thread.start()
        self._steps.put(step)

    def close(self) -> None:
        self._closed = True
        self._steps.put(None)
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while (step := self._steps.get()) is not None:
            while step():
                if not self._closed:
                    time.sleep(STEP_PAUSE_S)
