"""A progress bar on stderr with rate and time left; silent when stderr is not a terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID


class Progress:
    """`total_bytes` None: the size is not known, so there is no bar and no time left, only count and rate."""

    def __init__(self, total_bytes: int | None, label: str) -> None:
        self._total = total_bytes
        self._label = label
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._began = time.monotonic()

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
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
