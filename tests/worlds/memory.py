"""The most memory processes take while something goes on, exactly: the kernel keeps it, nothing is sampled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

RESET_PEAK = "5"
"""What `clear_refs` of proc(5) takes for this."""


class Peaks:
    """Resident memory of processes, by name and pid, above what they have now."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._pids = dict(pids)
        self._before: dict[str, int] = {}
        self.restart()

    def restart(self) -> None:
        """Forget what was until now."""
        for name, pid in self._pids.items():
            Path(f"/proc/{pid}/clear_refs").write_text(RESET_PEAK)
            self._before[name] = status_bytes(pid, "VmRSS")

    def grown_bytes(self) -> dict[str, int]:
        """By how much each had grown at most since the start."""
        return {name: status_bytes(pid, "VmHWM") - self._before[name] for name, pid in self._pids.items()}


def status_bytes(pid: int | str, field: str) -> int:
    """A field of /proc/PID/status that is given in kB: VmRSS is resident now, VmHWM at most."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == field:
            return int(rest.split()[0]) * 1024
    raise LookupError(f"/proc/{pid}/status has no {field}.")
