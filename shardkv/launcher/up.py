"""`cluster up`: one launcher's life, from the lock on the data directory to the last process stopped.

    lock -> plan -> adopt what runs -> check the port -> start what is missing -> wait until it serves -> watch -> stop

Invariant: one launcher for each data directory. A start that fails stops all it found or started, and says why.
"""

from __future__ import annotations

import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from shardkv.config import Config
from shardkv.directory_lock import DirectoryLock
from shardkv.errors import LaunchError, ShardKVError, StoreLocked
from shardkv.launcher.plan import INNER_HOST, META, Plan, make_plan
from shardkv.launcher.ports import check_port
from shardkv.launcher.processes import cluster_at
from shardkv.launcher.state import ClusterFile, Layout, ProcessesFile, read_state, write_state
from shardkv.launcher.summary import Started
from shardkv.launcher.supervisor import Report, Supervisor
from shardkv.programs import check_bind

POLL_S = 0.03
WATCH_S = 3600.0
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_cluster(
    config: Config, *, config_file: str | None, report: Report, on_ready: Callable[[Started], None]
) -> None:
    """Bring the cluster up, call `on_ready`, watch it until a stop signal, stop it.

    `report` takes sentences about what happens meanwhile. Raises LaunchError, StorageError, InvalidArgument.
    """
    began = time.monotonic()
    check_bind(config.cluster.bind, insecure=config.cluster.insecure)
    layout = Layout(config.cluster.data_dir)
    lock = _lock(layout)
    try:
        with _stop_signals() as signals:
            before = read_state(layout.processes_file, ProcessesFile)
            plan = make_plan(config, layout, read_state(layout.cluster_file, ClusterFile), config_file, before)
            supervisor = Supervisor(plan, report=report)
            try:
                adopted = _start(plan, supervisor)
                addresses = _wait_until_ready(plan, supervisor, signals, began)
                if addresses is not None:
                    seconds = time.monotonic() - began
                    on_ready(Started(plan, addresses, supervisor.pids(), adopted, seconds))
                    _watch(plan, supervisor, signals)
            finally:
                _stop(supervisor, signals, report)
    finally:
        lock.release()


def _lock(layout: Layout) -> DirectoryLock:
    layout.make()
    try:
        return DirectoryLock(layout.lock)
    except StoreLocked as error:
        pid = error.detail.get("pid")
        raise LaunchError(
            f"The cluster in {layout.directory} is already up: its launcher is process {pid or '(unknown)'}.",
            hint="See `shardkv cluster status`; `shardkv cluster down` stops it.",
        ) from error


def _start(plan: Plan, supervisor: Supervisor) -> list[str]:
    """Adopt and start. Returns the names of the adopted."""
    layout = plan.layout
    before = read_state(layout.processes_file, ProcessesFile)
    adopted = supervisor.adopt(before.processes if before is not None else [])
    if not any(supervisor.children[name].spec.role == "router" for name in adopted):
        _check_routers_port(plan)
    if META not in adopted:
        _check_meta_port(plan)
    write_state(layout.cluster_file, plan.file)
    supervisor.start_missing()
    return adopted


def _check_routers_port(plan: Plan) -> None:
    """Raises LaunchError, which names the cluster that has the port if it is one of ours."""
    try:
        check_port(plan.bind, plan.file.port)
    except LaunchError as error:
        directory = cluster_at(plan.file.port)
        if directory is None:
            raise
        raise LaunchError(
            f"Port {plan.file.port} is taken by another shardkv cluster, the one in {directory}.",
            hint=f"`shardkv cluster down --data-dir {shlex.quote(str(directory))}` stops it; "
            "or choose another port with --port.",
        ) from error


def _check_meta_port(plan: Plan) -> None:
    """The port kept for the metadata process may be taken by a stranger since."""
    try:
        check_port(INNER_HOST, plan.file.meta_port)
    except LaunchError as error:
        raise LaunchError(
            f"The metadata process of this cluster uses port {plan.file.meta_port}, and another program has taken it.",
            hint=f'Stop that program, or change "meta_port" in {plan.layout.cluster_file}.',
        ) from error


def _wait_until_ready(plan: Plan, supervisor: Supervisor, signals: _StopSignals, began: float) -> dict[str, str] | None:
    """The address of each process once all of them serve; None when told to stop. Raises LaunchError."""
    from shardkv.launcher.readiness import check_health, check_routed

    end = began + plan.config.launcher.ready_timeout_ms / 1000
    problems: dict[str, str] = {}
    while not signals.arrived():
        supervisor.watch(signals.fd, timeout_s=POLL_S)
        if supervisor.failed:
            child = supervisor.failed[0]
            raise LaunchError(f"{child.spec.name} cannot run. {child.record.problem}")
        health = check_health(plan.meta_address, supervisor.pids())
        supervisor.note_registered(health.registered)
        problems = health.problems
        if not problems:
            try:
                for child in supervisor.children.values():
                    if child.spec.role == "router":
                        check_routed(health.addresses[child.spec.name], health.cluster_id)
                check_routed(plan.address, health.cluster_id)
            except ShardKVError as error:
                problems = {"the routers": error.message}
            else:
                return health.addresses
        if time.monotonic() > end:
            raise _not_ready(plan, supervisor, problems)
    return None


def _not_ready(plan: Plan, supervisor: Supervisor, problems: dict[str, str]) -> LaunchError:
    died = {name: child.record.problem for name, child in supervisor.children.items() if child.record.restarts}
    told = " ".join(f"{name}: {problem}" for name, problem in {**problems, **died}.items())
    seconds = plan.config.launcher.ready_timeout_ms / 1000
    return LaunchError(
        f"The cluster does not serve after {seconds:g} s. {told}", hint=f"See the logs in {plan.layout.logs}."
    )


def _watch(plan: Plan, supervisor: Supervisor, signals: _StopSignals) -> None:
    """Restart what ends, start nodes that are added and stop those that are removed, until a stop signal."""
    from shardkv.launcher.readiness import check_health
    from shardkv.launcher.wanted import WantedFollower

    follower = WantedFollower(plan.meta_address)
    try:
        while not signals.arrived():
            unsettled = supervisor.unsettled
            supervisor.watch(signals.fd, follower.fd, timeout_s=POLL_S * 5 if unsettled else WATCH_S)
            supervisor.want_nodes(follower.take())
            if unsettled:
                supervisor.note_registered(check_health(plan.meta_address, {}).registered)
    finally:
        follower.close()


def _stop(supervisor: Supervisor, signals: _StopSignals, report: Report) -> None:
    if any(supervisor.pids().values()):
        report("Stopping: routers first, then nodes, then the metadata process.")
    signals.forget()
    supervisor.stop(interrupted=signals.arrived)


class _StopSignals:
    """Remembers that a stop signal came; `fd` becomes readable then."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._seen = False

    def arrived(self) -> bool:
        with suppress(BlockingIOError):
            self._seen = bool(os.read(self.fd, 1024)) or self._seen
        return self._seen

    def forget(self) -> None:
        """From now on `arrived` tells of further signals."""
        self.arrived()
        self._seen = False


@contextmanager
def _stop_signals() -> Iterator[_StopSignals]:
    """Stop signals write to a pipe instead of ending the process."""
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def wake(number: int, frame: object) -> None:
        try:
            os.write(writer, b"s")
        except BlockingIOError:
            return

    before = {number: signal.signal(number, wake) for number in STOP_SIGNALS}
    try:
        yield _StopSignals(reader)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)
