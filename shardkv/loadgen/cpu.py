"""CPU time of processes, from outside."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import psutil


def cpu_s(pid: int) -> float:
    """Seconds of CPU a process has used, all threads, with its children that live or were waited for; 0.0 if gone.

    The system counts in hundredths of a second.
    """
    used = 0.0
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                used += sum(one.cpu_times()[:4])  # user, system, and both of children that ended
    return used


def cpu_s_of(processes: Mapping[str, int]) -> dict[str, float]:
    """`cpu_s` of each, by name."""
    return {name: cpu_s(pid) for name, pid in processes.items()}
