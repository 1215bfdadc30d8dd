"""What a person is told when a cluster is up."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shardkv.launcher.plan import Plan

DEFAULT_PORT = 7400


@dataclass(frozen=True, slots=True)
class Started:
    """A cluster that serves."""

    plan: Plan
    addresses: dict[str, str]
    pids: dict[str, int]
    adopted: list[str]
    seconds: float


def summary(started: Started) -> str:
    """The cluster in a few lines: address, data directory, processes, what to try."""
    plan = started.plan
    layout, file = plan.layout, plan.file
    rows = [
        (name, str(pid), started.addresses.get(name, ""), os.path.relpath(layout.log_of(name), layout.directory))
        for name, pid in started.pids.items()
    ]
    header = ("process", "pid", "own address", "log (in the data directory)")
    adopted = f" Found still running: {', '.join(started.adopted)}." if started.adopted else ""
    return "\n".join(
        [
            f"shardkv is up after {started.seconds:.1f} s: {file.partition}, {file.shards} shards.{adopted}",
            f"  address         {plan.address}{' (port as at the last start)' if plan.port_kept else ''}",
            f"  data directory  {layout.directory}",
            "",
            *table(header, rows),
            "",
            f"Try this: {try_line(plan)}",
        ]
    )


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of a table, columns aligned, indented by two."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]


def try_line(plan: Plan) -> str:
    """A command a person can paste."""
    command = command_name()
    if plan.address != f"127.0.0.1:{DEFAULT_PORT}":
        command = f"{command} --router {plan.address}"
    return f"{command} put hello world && {command} get hello"


def command_name() -> str:
    """How this installation's `shardkv` is called from here."""
    installed = Path(sys.executable).parent / "shardkv"
    if not installed.exists():
        return f"{shlex.quote(sys.executable)} -m shardkv"
    found = shutil.which("shardkv")
    if found is not None and Path(found).resolve() == installed.resolve():
        return "shardkv"
    relative = os.path.relpath(installed)
    return shlex.quote(relative if len(relative) < len(str(installed)) else str(installed))
