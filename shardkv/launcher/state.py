"""What a launcher leaves on disk for the next one, and for `status`, `logs` and `down`.

    DIR/run/launcher.lock    locked while a launcher lives (directory_lock.py)
    DIR/run/cluster.json     the cluster's shape and ports: made at the first start, kept by all later ones
    DIR/run/processes.json   the processes as the launcher last saw them
    DIR/meta  DIR/node-<n>   what the processes keep          DIR/logs/<process>.log

Invariant: both JSON files are replaced whole, never written in place. A pid alone is never trusted: a process is the
one recorded only if it also started at the recorded tick of the recorded boot, so a stale file harms nobody.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TypeVar

import msgspec

from shardkv.errors import StorageError, UnsupportedFormat

FORMAT = 1
State = TypeVar("State", "ClusterFile", "ProcessesFile")


class Layout:
    """Where things are in a cluster's data directory."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory).resolve()
        self.run = self.directory / "run"
        self.lock = self.run / "launcher.lock"
        self.cluster_file = self.run / "cluster.json"
        self.processes_file = self.run / "processes.json"
        self.logs = self.directory / "logs"

    def make(self) -> None:
        """Make the directories that the launcher itself writes to. Raises StorageError."""
        try:
            self.run.mkdir(parents=True, exist_ok=True)
            self.logs.mkdir(exist_ok=True)
            writable = os.access(self.run, os.W_OK | os.X_OK) and os.access(self.logs, os.W_OK | os.X_OK)
            reason = None if writable else os.strerror(errno.EACCES)
        except OSError as error:
            reason = error.strerror
        if reason:
            raise StorageError(
                f"{self.directory} cannot be used as a data directory: {reason.lower()}.",
                hint="Choose one that can be written to with --data-dir.",
            )

    def data_of(self, process: str) -> Path:
        return self.directory / process

    def log_of(self, process: str) -> Path:
        return self.logs / f"{process}.log"


class ClusterFile(msgspec.Struct, frozen=True, kw_only=True):
    """`cluster.json`. The metadata store has the final word on the shape; this copy lets the launcher speak first."""

    format: int = FORMAT
    nodes: int
    partition: str
    shards: int
    split_at: list[str]
    port: int
    meta_port: int


class ProcessRecord(msgspec.Struct, kw_only=True):
    """One process of the cluster. `state` is one of starting, running, restarting, crash loop, failed, stopped."""

    name: str
    role: str
    command: list[str]
    pid: int
    birth: str
    """When it started, as `birth_of` tells."""
    state: str
    address: str = ""
    """Where it was last known to serve."""
    restarts: int = 0
    problem: str = ""
    """Why it last ended, and its last words."""


class ProcessesFile(msgspec.Struct, kw_only=True):
    """`processes.json`."""

    format: int = FORMAT
    bind: str
    processes: list[ProcessRecord]
    removed: list[str] = []
    """Nodes that were removed from the cluster: they are not started again."""


def read_state(path: Path, kind: type[State]) -> State | None:
    """The file's content; None when there is no such file. Raises UnsupportedFormat, StorageError."""
    try:
        data = path.read_bytes()
        found = msgspec.json.decode(data)
        version = found.get("format") if isinstance(found, dict) else None
        if isinstance(version, int) and version > FORMAT:
            raise UnsupportedFormat(
                f"{path} has format {version}; this shardkv knows format {FORMAT}.",
                hint="Start it with the version of shardkv that wrote it, or a newer one.",
            )
        return msgspec.convert(found, kind)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}.") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise StorageError(
            f"{path} is damaged: {error}.", hint="Restore it from a copy, or move it away: it is then made anew."
        ) from error


def write_state(path: Path, state: ClusterFile | ProcessesFile) -> None:
    """Replace the file by `state`, so that any reader sees the old or the new one whole. Raises StorageError."""
    fresh = path.with_name(f"{path.name}.new")
    try:
        with open(fresh, "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(state)) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}.") from error


def birth_of(pid: int) -> str | None:
    """When process `pid` started, as `boot id/clock ticks since boot`; None when it does not run.

    Ticks since boot, not wall time: a clock that is set leaves them alone. Format: proc(5), /proc/PID/stat field 22;
    the fields are counted from behind the command name, which may hold anything.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    zombie_or_dead = fields[0] in "ZXx"
    return None if zombie_or_dead else f"{boot}/{fields[19]}"


def is_running(record: ProcessRecord) -> bool:
    """Whether the very process that was recorded still runs."""
    return record.pid > 0 and birth_of(record.pid) == record.birth
