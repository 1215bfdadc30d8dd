"""`cluster status` and `cluster down`: looking at and stopping a cluster that another process launched.

Invariant: nothing here needs the launcher to be alive. What runs is what the recorded pids and births say, and what
serves is what answers a ping.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from shardkv.config import ClusterSection
from shardkv.directory_lock import is_locked, lock_holder
from shardkv.errors import LaunchError
from shardkv.launcher.plan import INNER_HOST, local_address
from shardkv.launcher.processes import RunningProcess, find_running, take_over, wait_for_end
from shardkv.launcher.state import (
    ClusterFile,
    Layout,
    ProcessesFile,
    ProcessRecord,
    birth_of,
    is_running,
    read_state,
    write_state,
)
from shardkv.launcher.supervisor import KILL_WAIT_S, stop_in_order

DEFAULT_DATA_DIR = ClusterSection().data_dir
SERVING, DEGRADED, ENDED, STOPPED = "serving", "degraded", "ended", "stopped"


def address_in(data_dir: str | None) -> str | None:
    """Where clients on this machine reach the cluster in a directory; None: the default one, and there is none.

    Raises LaunchError when there is no cluster in a directory that was named.
    """
    layout = Layout(data_dir or DEFAULT_DATA_DIR)
    if data_dir is None and not layout.processes_file.exists():
        return None
    cluster, file = _files(layout)
    return local_address(file.bind, cluster.port)


def cluster_status(layout: Layout, *, memory: bool = True) -> dict[str, Any]:
    """The cluster in `layout` as plain data. `state`: serving (everything answers), degraded, stopped.

    `memory`: also what each process holds, which takes a while to find out.
    Raises LaunchError when there is no cluster there.
    """
    cluster, file = _files(layout)
    launcher = launcher_pid(layout)
    running = {record.name: record.pid if is_running(record) else 0 for record in file.processes}
    health = None
    if any(running.values()):
        from shardkv.launcher.readiness import Registered, check_health

        remembered = {
            record.name: Registered(record.pid, record.address) for record in file.processes if record.address
        }
        health = check_health(local_address(INNER_HOST, cluster.meta_port), running, remembered=remembered)
    processes = [
        {
            "name": record.name,
            "role": record.role,
            "state": _state(
                record,
                running[record.name],
                health.problems.get(record.name) if health else None,
                launched=launcher is not None,
            ),
            "pid": running[record.name] or None,
            "address": health.addresses.get(record.name) if health else None,
            "restarts": record.restarts,
            "memory_bytes": memory_bytes(running[record.name]) if memory and running[record.name] else None,
            "problem": record.problem or None,
            "log": str(layout.log_of(record.name)),
        }
        for record in file.processes
    ]
    serving = all(process["state"] == SERVING for process in processes)
    return {
        "state": SERVING if serving else DEGRADED if any(running.values()) else STOPPED,
        "address": local_address(file.bind, cluster.port),
        "meta_address": local_address(INNER_HOST, cluster.meta_port),
        "data_dir": str(layout.directory),
        "launcher_pid": launcher,
        "cluster_id": health.cluster_id if health else None,
        "nodes": sum(record.role == "node" for record in file.processes),
        "partition": cluster.partition,
        "shards": cluster.shards,
        "keyspaces": health.keyspaces if health else {},
        "processes": processes,
    }


def memory_bytes(pid: int) -> int | None:
    """What a process and its workers hold, pages shared with others counted in part (PSS); None when it is gone."""
    import psutil

    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
        return sum(member.memory_full_info().pss for member in family)
    except psutil.Error:
        return None


def _state(record: ProcessRecord, pid: int, problem: str | None, *, launched: bool) -> str:
    """One or two words: serving, starting, not answering, restarting, crash loop, failed, ended, stopped.

    ended: nobody stopped it and nobody restarts it.
    """
    if not pid:
        if record.state in ("starting", "running") or (not launched and record.state in ("restarting", "crash loop")):
            return ENDED
        return record.state if record.state in ("restarting", "crash loop", "failed") else STOPPED
    if problem is None:
        return SERVING
    return "starting" if record.state == "starting" else "not answering"


def _files(layout: Layout) -> tuple[ClusterFile, ProcessesFile]:
    cluster = read_state(layout.cluster_file, ClusterFile)
    processes = read_state(layout.processes_file, ProcessesFile)
    if cluster is None or processes is None:
        raise LaunchError(
            f"There is no cluster in {layout.directory}.", hint="Say with --data-dir where it is, or start one."
        )
    return cluster, processes


def launcher_pid(layout: Layout) -> int | None:
    """The pid of the launcher of this directory; None when none lives."""
    return lock_holder(layout.lock) if is_locked(layout.lock) else None


def stop_cluster(layout: Layout, *, grace_s: float) -> list[str]:
    """Stop everything: through the launcher if one lives, else directly. The names that ran.

    `grace_s`: how long each role may take before it is killed. Raises LaunchError.
    """
    _, file = _files(layout)
    names = [record.name for record in file.processes if is_running(record)]
    pid = launcher_pid(layout)
    if pid is not None:
        _stop_launcher(layout, pid, grace_s)
    file = read_state(layout.processes_file, ProcessesFile) or file
    recorded = {record.pid for record in file.processes}
    found = [record for record in find_running(layout) if record.pid not in recorded]
    left = [(record, process) for record in [*file.processes, *found] if (process := take_over(record)) is not None]
    stop_in_order(left, grace_s)
    for record in file.processes:
        if record.state != "failed":
            record.pid, record.state, record.problem = 0, "stopped", ""
    write_state(layout.processes_file, file)
    return names + [record.name for record in found]


def _stop_launcher(layout: Layout, pid: int, grace_s: float) -> None:
    """SIGTERM to the launcher, which stops its cluster; SIGKILL when it does not end in time."""
    fd = os.pidfd_open(pid)
    if lock_holder(layout.lock) != pid or not is_locked(layout.lock):
        os.close(fd)
        return
    launcher = RunningProcess(pid, birth_of(pid) or "", fd, None)
    launcher.send(signal.SIGTERM)
    end = time.monotonic() + 3 * (grace_s + KILL_WAIT_S)
    while not launcher.ended() and time.monotonic() < end:
        wait_for_end([launcher], end - time.monotonic())
    launcher.send(signal.SIGKILL)
    launcher.reap()
