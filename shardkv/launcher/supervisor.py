"""Keeps the processes of a cluster running, and stops them in order.

Signal handlers only wake the loop; the loop acts. Routers stop before nodes, nodes before the metadata process.

Invariants: one name never runs twice at a time; what ends is reported with how it ended and its last words; the
record on disk is written after every change, so that whoever comes next finds what runs.
"""

from __future__ import annotations

import select
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardkv.errors import StorageError
from shardkv.launcher.plan import Plan, ProcessSpec, node_spec, process_specs
from shardkv.launcher.processes import RunningProcess, find_running, last_words, start, take_over, wait_for_end
from shardkv.launcher.restarts import Restarts, exit_words
from shardkv.launcher.state import ProcessesFile, ProcessRecord, write_state
from shardkv.programs import EXIT_OK

if TYPE_CHECKING:
    from shardkv.launcher.readiness import Registered
    from shardkv.topology.documents import WantedDocument

STOP_ORDER = ("router", "node", "meta")
KILL_WAIT_S = 5.0

Report = Callable[[str], None]


@dataclass(slots=True)
class Child:
    """One process of the cluster, running or not."""

    spec: ProcessSpec
    record: ProcessRecord
    restarts: Restarts
    running: RunningProcess | None = None
    served: bool = False
    """Whether this start of it was seen to serve."""
    restart_at: float | None = None
    kill_at: float | None = None
    """When it is killed, since it was told to stop for good; None: it is to run."""


class Supervisor:
    """`report` takes sentences for a person; `clock` is monotonic seconds."""

    def __init__(self, plan: Plan, *, report: Report, clock: Callable[[], float] = time.monotonic) -> None:
        self._plan = plan
        self._report = report
        self._clock = clock
        launcher = plan.config.launcher
        self._grace_s = launcher.stop_grace_ms / 1000
        self._removed: set[str] = set(plan.removed)
        self.children = {spec.name: Child(spec, _new_record(spec), Restarts(launcher)) for spec in process_specs(plan)}

    # Starting

    def adopt(self, records: Iterable[ProcessRecord]) -> list[str]:
        """Take over what runs as it should, recorded or found; stop what runs otherwise. The names taken over."""
        strangers: list[tuple[ProcessRecord, RunningProcess]] = []
        taken: set[int] = set()
        for record in [*records, *find_running(self._plan.layout)]:
            running = take_over(record) if record.pid not in taken else None
            if running is None:
                continue
            taken.add(running.pid)
            child = self.children.get(record.name)
            if child is None or child.running or record.command != list(child.spec.command):
                strangers.append((record, running))
            else:
                child.running, child.served, child.record = running, True, record
                record.state = "running"
        if strangers:
            names = ", ".join(record.name for record, _ in strangers)
            self._report(f"Stopping {names}: still running, and to be started in another way.")
            stop_in_order(strangers, self._grace_s)
        return [child.spec.name for child in self.children.values() if child.running]

    def start_missing(self) -> None:
        """Start every process that does not run. Raises LaunchError."""
        for child in self.children.values():
            if child.running is None:
                self._start(child)
        self.save()

    def want_nodes(self, wanted: Mapping[str, WantedDocument]) -> None:
        """Start the nodes that are wanted of this launcher, and stop those that were removed. Raises LaunchError.

        A node that nothing is said of stays as it is.
        """
        changed = False
        for name, document in wanted.items():
            child = self.children.get(name)
            if document.state == "removed":
                changed = self._remove(name, child) or changed
            elif child is None and document.started_by == "launcher":
                spec = node_spec(self._plan, name)
                child = self.children[name] = Child(spec, _new_record(spec), Restarts(self._plan.config.launcher))
                self._removed.discard(name)
                self._report(f"{name} was added.")
                self._start(child)
                changed = True
        if changed:
            self.save()

    def _remove(self, name: str, child: Child | None) -> bool:
        """Begin to stop a node for good. Whether that is new."""
        if child is None or child.kill_at is not None:
            return False
        self._removed.add(name)
        child.restart_at, child.kill_at = None, self._clock() + self._grace_s
        if child.running is None:
            self._forget(child)
        else:
            child.running.send(signal.SIGTERM)
        return True

    def _forget(self, child: Child) -> None:
        """Of a node that was removed and has ended."""
        del self.children[child.spec.name]
        self._report(f"{child.spec.name} was removed, and has ended. Its data stays in its directory.")

    def _start(self, child: Child) -> None:
        child.running = start(child.spec, self._plan.layout.directory)
        child.served = False
        child.restart_at = None
        child.record.pid, child.record.birth = child.running.pid, child.running.birth
        child.record.state = "starting"

    # Watching

    def watch(self, wake_fd: int, *more_fds: int, timeout_s: float) -> bool:
        """Wait for news, at most `timeout_s`, and deal with it. Returns whether `wake_fd` had something to read.

        Something to read in one of `more_fds` ends the waiting as well.
        """
        now = self._clock()
        due = [at for child in self.children.values() for at in (child.restart_at, child.kill_at) if at is not None]
        fds = [child.running.fd for child in self.children.values() if child.running]
        pause_s = max(0.0, min([timeout_s, *(at - now for at in due)]))
        readable = select.select([wake_fd, *more_fds, *fds], [], [], pause_s)[0]
        changed = False
        for child in list(self.children.values()):
            if child.running is not None and child.running.fd in readable:
                self._ended(child)
                changed = True
            elif child.restart_at is not None and child.restart_at <= self._clock():
                self._start(child)
                changed = True
            elif child.kill_at is not None and child.running is not None and child.kill_at <= self._clock():
                child.running.send(signal.SIGKILL)
                child.kill_at += KILL_WAIT_S
        if changed:
            self.save()
        return wake_fd in readable

    def note_registered(self, registered: Mapping[str, Registered]) -> None:
        """Take note of which starts the metadata process knows: those serve."""
        changed = False
        for child in self.children.values():
            known = registered.get(child.spec.name)
            if child.running is None or known is None or known.pid != child.running.pid:
                continue
            if not child.served or child.record.address != known.address:
                child.served = changed = True
                child.record.state, child.record.address = "running", known.address
        if changed:
            self.save()

    @property
    def unsettled(self) -> bool:
        """Whether some process runs that has not been seen to serve."""
        return any(child.running and not child.served for child in self.children.values())

    @property
    def failed(self) -> list[Child]:
        """Processes that will not be started again."""
        return [child for child in self.children.values() if child.record.state == "failed"]

    def pids(self) -> dict[str, int]:
        """The pid of each process; 0 when it does not run now."""
        return {name: child.running.pid if child.running else 0 for name, child in self.children.items()}

    def _ended(self, child: Child) -> None:
        assert child.running is not None
        exit_code = child.running.reap()
        child.running = None
        if child.kill_at is not None:
            self._forget(child)
            return
        if exit_code == EXIT_OK and child.served:
            child.record.state, child.restart_at = "restarting", self._clock()
            self._report(f"{child.spec.name} was told to stop, and is started again.")
            return
        verdict = child.restarts.died(self._clock(), exit_code, served=child.served)
        record = child.record
        ending = f"{exit_words(exit_code)}{_last_words(child, exit_code)}"
        record.problem = f"It {ending}"
        record.restarts = child.restarts.count
        child.restart_at = verdict.restart_at
        if verdict.restart_at is None:
            record.state = "failed"
            self._report(f"{record.name} will not be started again: it {ending}")
        elif verdict.crash_loop:
            record.state = "crash loop"
            pause_s = verdict.restart_at - self._clock()
            self._report(
                f"{record.name} keeps dying ({record.restarts} times by now; log: {child.spec.log}; next start in "
                f"{pause_s:.1f} s): it {ending}"
            )
        else:
            record.state = "restarting"
            self._report(f"{record.name} is started again: it {ending}")

    # Stopping

    def stop(self, interrupted: Callable[[], bool] = lambda: False) -> None:
        """Stop everything, in order. When `interrupted()` turns true, kill what is left at once."""
        running = [(child.record, child.running) for child in self.children.values() if child.running]
        killed = stop_in_order(running, self._grace_s, interrupted)
        for name in killed:
            self._report(f"{name} had not stopped yet and was killed.")
        for child in self.children.values():
            child.running, child.restart_at = None, None
            child.record.pid = 0
            if child.record.state != "failed":
                child.record.state, child.record.problem = "stopped", ""
        self.save()

    def save(self) -> None:
        """Write the record for the next launcher, and for status and down."""
        records = [child.record for child in self.children.values()]
        found = ProcessesFile(bind=self._plan.bind, processes=records, removed=sorted(self._removed))
        try:
            write_state(self._plan.layout.processes_file, found)
        except StorageError as error:
            self._report(str(error))


def stop_in_order(
    running: Iterable[tuple[ProcessRecord, RunningProcess]],
    grace_s: float,
    interrupted: Callable[[], bool] = lambda: False,
) -> list[str]:
    """SIGTERM to each role in turn, SIGKILL to what outlives `grace_s`; the names that had to be killed."""
    left = list(running)
    killed: list[str] = []
    for role in STOP_ORDER:
        group = [(record, process) for record, process in left if record.role == role]
        for _, process in group:
            process.send(signal.SIGTERM)
        group = _await_end(group, time.monotonic() + grace_s, interrupted)
        for record, process in group:
            process.send(signal.SIGKILL)
            killed.append(record.name)
        _await_end(group, time.monotonic() + KILL_WAIT_S, lambda: False)
    return killed


def _await_end(
    group: list[tuple[ProcessRecord, RunningProcess]], end: float, interrupted: Callable[[], bool]
) -> list[tuple[ProcessRecord, RunningProcess]]:
    """Wait until all of the group ended, `end` (monotonic), or an interruption; those that still run."""
    while group and time.monotonic() < end and not interrupted():
        wait_for_end((process for _, process in group), min(0.2, end - time.monotonic()))
        for _, process in group:
            if process.ended():
                process.reap()
        group = [(record, process) for record, process in group if not process.reaped]
    return group


def _last_words(child: Child, exit_code: int | None) -> str:
    """What it said before it ended, as the end of a sentence; a process killed from outside had nothing to say."""
    killed = exit_code is None or -exit_code in (signal.SIGKILL, signal.SIGTERM)
    words = "" if killed else last_words(child.spec.log)
    return f", saying: {words}" if words else "."


def _new_record(spec: ProcessSpec) -> ProcessRecord:
    return ProcessRecord(name=spec.name, role=spec.role, command=list(spec.command), pid=0, birth="", state="stopped")
