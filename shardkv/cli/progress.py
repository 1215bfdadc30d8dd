"""A progress bar on stderr with rate and time left; nothing when stderr is not a terminal.

Invariant: the bar is gone when it ends, and what is said meanwhile stands above it.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID


class Progress:
    """`total_bytes` None: the size is not known, so there is no bar and no time left, only count and rate.

    `wanted` False: nothing is shown, because what the command writes goes to the same terminal.
    """

    def __init__(self, total_bytes: int | None, label: str, *, wanted: bool = True) -> None:
        self._wanted = wanted
        self._total = total_bytes
        self._label = label
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._began = time.monotonic()

    def __enter__(self) -> Progress:
        if self._wanted and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            known = [BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TextColumn("ETA"), TimeRemainingColumn()]
            self._bar = Bar(
                SpinnerColumn(),
                TextColumn(self._label),
                *(known if self._total is not None else [TimeElapsedColumn()]),
                TextColumn("{task.fields[rows]:,} rows, {task.fields[rate]:,.0f}/s"),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(self._label, total=self._total, rows=0, rate=0.0)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, bytes_done: int, rows: int, *, rows_before: int = 0) -> None:
        """`rows` are done, `rows_before` of them by an earlier run, which do not count for the rate."""
        if self._bar is not None and self._task is not None:
            took = max(time.monotonic() - self._began, 1e-3)
            self._bar.update(self._task, completed=bytes_done, rows=rows, rate=(rows - rows_before) / took)

    def say(self, text: str) -> None:
        """Print a line on stderr, above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            click.echo(text, err=True)
