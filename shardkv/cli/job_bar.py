"""A job's progress bar on standard error; where that is no terminal, a line whenever the job's state is new.

Invariant: the bar is gone when it ends; what the job waits for stands above it.
"""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from shardkv.admin import Job


class JobBar:
    def __init__(self, job: Job) -> None:
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._job = job
        self._said = ""

    def __enter__(self) -> JobBar:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, SpinnerColumn, TextColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[rate]}"),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(_label(self._job), total=None, rate="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, job: Job) -> None:
        """The job as it is now."""
        news = f"Job {job.id} ({job.kind}): {job.problem or job.state}" if not job.ended else ""
        if news and news != self._said and (job.problem or self._bar is None):
            self._say(news)
        self._said = news or self._said
        if self._bar is not None and self._task is not None:
            total, done = (job.bytes_total, job.bytes_done) if job.bytes_total else _counts(job)
            self._bar.update(self._task, description=_label(job), total=total, completed=done, rate=_rate(job))

    def _say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            click.echo(text, err=True)


def _label(job: Job) -> str:
    over = len(job.done) + len(job.skipped)
    how_far = f" {over}/{len(job.moves)} shards" if job.moves else ""
    phases = sorted({change.phase for change in job.changes})
    return f"job {job.id} {job.kind}{how_far} {job.state}{': ' if phases else ''}{', '.join(phases)}"


def _counts(job: Job) -> tuple[int | None, int]:
    return len(job.moves) or None, len(job.done) + len(job.skipped)


def _rate(job: Job) -> str:
    from shardkv.cli.steering import size_text, time_text

    if not job.changes:
        return ""
    left = f", {time_text(job.eta_s)} left" if job.eta_s is not None else ""
    return f"{size_text(job.bytes_s)}/s{left}"
