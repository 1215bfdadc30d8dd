"""`cluster restart --rolling`: every process is stopped and comes back, one after the other, while the cluster serves.

A process is told to stop, which it does in order: it answers what it has begun. Its launcher starts it again. Routers
park requests for a node that is away, and clients that lose their router try again within their timeout.

Invariant: no process is stopped before all others serve.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shardkv.errors import LaunchError, ShardKVError
from shardkv.launcher.control import SERVING, cluster_status, launcher_pid
from shardkv.launcher.processes import take_over
from shardkv.launcher.readiness import check_routed
from shardkv.launcher.state import Layout, ProcessesFile, ProcessRecord, read_state

ORDER = ("node", "router", "meta")
POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Restarted:
    """One process that is back."""

    name: str
    pid: int
    seconds: float


def restart_rolling(layout: Layout, *, timeout_s: float, on_restarted: Callable[[Restarted], None]) -> list[Restarted]:
    """Restart all processes. Raises LaunchError when one does not come back in time: the rest is left as it is."""
    if launcher_pid(layout) is None:
        raise LaunchError(
            f"The cluster in {layout.directory} has no launcher that would start its processes again.",
            hint="`shardkv cluster up` takes it over.",
        )
    _wait_serving(layout, time.monotonic() + timeout_s, "The cluster does not serve as it is")
    done = []
    for role in ORDER:
        for record in [each for each in _records(layout) if each.role == role and each.state != "stopped"]:
            restarted = _restart(layout, record, timeout_s)
            on_restarted(restarted)
            done.append(restarted)
    return done


def _restart(layout: Layout, record: ProcessRecord, timeout_s: float) -> Restarted:
    began = time.monotonic()
    process = take_over(record)
    if process is not None:
        process.send(signal.SIGTERM)
        os.close(process.fd)
    end = began + timeout_s
    while True:
        known = next((each for each in _records(layout) if each.name == record.name), None)
        if known is None:
            break
        if known.pid and (known.pid, known.birth) != (record.pid, record.birth):
            break
        if time.monotonic() > end:
            raise LaunchError(
                f"{record.name} was told to stop and was not started again within {timeout_s:g} s. {known.problem}",
                hint="See `shardkv cluster status`, and the logs.",
            )
        time.sleep(POLL_S)
    _wait_serving(layout, end, f"{record.name} was restarted and the cluster does not serve")
    pid = next((each.pid for each in _records(layout) if each.name == record.name), 0)
    return Restarted(record.name, pid, time.monotonic() - began)


def _wait_serving(layout: Layout, end: float, complaint: str) -> None:
    """Until every process answers and every shard can be read. Raises LaunchError."""
    while True:
        status = cluster_status(layout, memory=False)
        problem = _problem(status)
        if problem is None:
            return
        if time.monotonic() > end:
            raise LaunchError(f"{complaint}: {problem}", hint="See `shardkv cluster status`, and the logs.")
        time.sleep(POLL_S)


def _problem(status: dict[str, Any]) -> str | None:
    for process in status["processes"]:
        if process["state"] != SERVING:
            return f"{process['name']} is {process['state']}."
    routers = [process["address"] for process in status["processes"] if process["role"] == "router"]
    try:
        for address in routers:
            check_routed(address, status["cluster_id"])
    except ShardKVError as error:
        return error.message
    return None


def _records(layout: Layout) -> list[ProcessRecord]:
    found = read_state(layout.processes_file, ProcessesFile)
    return found.processes if found is not None else []
