"""Starting, finding again and signalling operating system processes.

Invariant: a signal is sent through a pidfd, taken before the process was recognised as ours, so it can never reach
a stranger that was given the same pid.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from shardkv.errors import LaunchError
from shardkv.launcher.plan import ProcessSpec
from shardkv.launcher.state import Layout, ProcessRecord, birth_of

LAST_WORDS_BYTES = 4096
_ROLE_OF_MODULE = {"shardkv": "meta", "shardkv_node": "node", "shardkv_router": "router"}


class RunningProcess:
    """A live process, started here or taken over. `fd` becomes readable when it ends."""

    def __init__(self, pid: int, birth: str, fd: int, popen: subprocess.Popen[bytes] | None) -> None:
        self.pid = pid
        self.birth = birth
        self.fd = fd
        self.reaped = False
        self._popen = popen

    def send(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens when the process has ended."""
        try:
            signal.pidfd_send_signal(self.fd, number)
        except ProcessLookupError:
            return

    def ended(self) -> bool:
        return bool(select.select([self.fd], [], [], 0)[0])

    def reap(self) -> int | None:
        """Close the books of an ended process; its exit code, negative for a signal, None for one taken over."""
        self.reaped = True
        os.close(self.fd)
        return self._popen.wait() if self._popen is not None else None


def start(spec: ProcessSpec, directory: Path) -> RunningProcess:
    """Start a process in a session of its own, so that neither Ctrl-C nor our death reaches it. Raises LaunchError.

    Its output goes to its log from the first byte on.
    """
    try:
        with open(spec.log, "ab") as log:
            popen = subprocess.Popen(
                spec.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=directory,
                start_new_session=True,
            )
    except OSError as error:
        raise LaunchError(f"{spec.name} could not be started: {error}.") from error
    fd = os.pidfd_open(popen.pid)
    return RunningProcess(popen.pid, birth_of(popen.pid) or "", fd, popen)


def take_over(record: ProcessRecord) -> RunningProcess | None:
    """The recorded process, if it still runs."""
    if record.pid <= 0:
        return None
    try:
        fd = os.pidfd_open(record.pid)
    except OSError:
        return None
    if birth_of(record.pid) != record.birth:
        os.close(fd)
        return None
    return RunningProcess(record.pid, record.birth, fd, None)


def find_running(layout: Layout) -> list[ProcessRecord]:
    """Every process of the cluster in `layout` that runs, found by its command line.

    The record on disk misses one that was started just before its launcher was killed; left alone, it would keep its
    data directory locked.
    """
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            command = Path(f"/proc/{entry}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
        except OSError:
            continue
        name, birth = _name_in(command, layout), birth_of(int(entry))
        if name and birth:
            role = _ROLE_OF_MODULE[command[3]]
            found.append(
                ProcessRecord(name=name, role=role, command=command, pid=int(entry), birth=birth, state="starting")
            )
    return found


def cluster_at(port: int) -> Path | None:
    """The data directory of the cluster whose launched router has `port`; None when there is none."""
    for entry in os.listdir("/proc"):
        try:
            command = Path(f"/proc/{entry}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
        except OSError:
            continue
        if command[1:4] != ["-P", "-m", "shardkv_router"]:
            continue
        options = dict(pairwise(command))
        if options.get("--port") == str(port) and "--log-file" in options:
            return Path(options["--log-file"]).parent.parent
    return None


def _name_in(command: list[str], layout: Layout) -> str | None:
    """The name a process was started under, if `command` is one that a launcher of this directory made."""
    if len(command) < 4 or command[1:3] != ["-P", "-m"] or command[3] not in _ROLE_OF_MODULE:
        return None
    for option, value in pairwise(command):
        if option == "--log-file" and Path(value).parent == layout.logs:
            return Path(value).stem
    return None


def wait_for_end(processes: Iterable[RunningProcess], timeout_s: float) -> None:
    """Wait until one of them has ended, or the time is up."""
    select.select([process.fd for process in processes], [], [], max(0.0, timeout_s))


def last_words(log: Path) -> str:
    """The last line of a log that says something; empty when there is none."""
    try:
        with open(log, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - LAST_WORDS_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    said = [line.strip() for line in lines if line.strip()]
    return said[-1].removeprefix("Error: ") if said else ""
