"""Tells a process from its forked children without asking the system each time: `os.getpid` costs as much as a read.

`mark()` differs between a process and every child made by `os.fork`; other forks cannot run Python safely.
"""

from __future__ import annotations

import os

_marks = [0]


def _in_child() -> None:
    _marks[0] += 1


def watch() -> list[int]:
    """A list whose only number is counted up in every child. Keep both: a number that differs says that of a child."""
    if not _marks[0]:
        _marks[0] = 1
        os.register_at_fork(after_in_child=_in_child)
    return _marks
