"""The cluster beside redis and twemproxy, in one run: servers, routers and Python clients.

    python -m tests.bench.cluster [--quick] [--rounds 3] [--only ROW ...] [--values 100 ...] [--json]

Starts redis-server and nutcracker (Debian packages of these names) and our processes on loopback, in directories of
its own, and stops them at the end, also after Ctrl-C. Round after round, both contenders do the same work in turn,
when neither has anything left to do; ratios are medians over the rounds. What is not installed is left out, and said.

Cores: the load generator or client has the last one; all processes of a contender may use the others (on two cores:
share one). Rows of a single blocking caller run everything on one core: with a hop between cores in every call, the
hops would be what is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec

from shardkv.loadgen.apart import run_load
from shardkv.loadgen.load import Figures, Load
from tests.bench import cluster_report as report
from tests.bench.cluster_clients import ClientWork
from tests.bench.cluster_report import CONTENDERS, OURS, PEER, ROWS, Row
from tests.bench.cluster_servers import NUTCRACKER, REDIS, Contender, missing, ours, redis, twemproxy, versions
from tests.bench.report import machine, machine_lines, note

CONNECTIONS = 50
FILL_DEPTH = 100
ROUTERS_CORES = 4
"""Two routers are compared with one where there are at least so many cores."""

Start = Callable[[Path], AbstractContextManager[Contender]]

STARTS: dict[str, dict[str, Start]] = {
    "direct": {
        OURS: lambda place: ours(place, "interval", nodes=1, direct=True),
        PEER: lambda place: redis(place, "everysec"),
    },
    "durable": {
        OURS: lambda place: ours(place, "always", nodes=1, direct=True),
        PEER: lambda place: redis(place, "always"),
    },
    "router": {
        OURS: lambda place: ours(place, "interval", nodes=2),
        PEER: lambda place: twemproxy(place, "everysec", servers=2),
    },
    "routers": {
        OURS: lambda place: ours(place, "interval", nodes=2, routers=2),
        PEER: lambda place: ours(place, "interval", nodes=2),
    },
    "scan": {
        OURS: lambda place: ours(place, "interval", nodes=3),
        PEER: lambda place: redis(place, "everysec"),
    },
}
NEEDED = {"direct": [REDIS], "durable": [REDIS], "router": [REDIS, NUTCRACKER], "scan": [REDIS]}


class Bench:
    """One run: rounds over groups of rows, and what was found."""

    def __init__(self, options: argparse.Namespace, root: Path) -> None:
        self.options = options
        self.found: report.Found = {}
        self._root = root
        cores = sorted(os.sched_getaffinity(0))
        self._client_core, self._server_cores = cores[-1:], cores[:-1] or cores

    def run(self, rows: list[Row]) -> None:
        groups = list(dict.fromkeys(row.group for row in rows))
        for group in groups:
            with started(group, self._root / group) as contenders:
                for value_bytes in self.options.values:
                    self._run_group(group, [row for row in rows if row.group == group], contenders, value_bytes)
            shutil.rmtree(self._root / group)
        note("")

    def _run_group(self, group: str, rows: list[Row], contenders: dict[str, Contender], value_bytes: int) -> None:
        first = value_bytes == self.options.values[0]
        rows = [row for row in rows if (first or row.large) and not row.of]
        if not rows:
            return
        for name, contender in contenders.items():
            note(f"{value_bytes} B  {group}: filling {name}")
            self._fill(contender, group, value_bytes)
        for number in range(self.options.rounds):
            for row in rows:
                for name in CONTENDERS if number % 2 == 0 else reversed(CONTENDERS):
                    note(f"{value_bytes} B  round {number + 1}  {row.name:<16} {name}")
                    for contender in contenders.values():
                        contender.settle()
                    figures = self._run_row(row, contenders[name], value_bytes)
                    self.found.setdefault((value_bytes, row.name, name), []).append(figures)

    def _fill(self, contender: Contender, group: str, value_bytes: int) -> None:
        if group == "scan":
            figures = self._run_client("load", contender, value_bytes, together=False)
        else:
            load = self._load("set", FILL_DEPTH, contender, value_bytes)
            figures = run_load(msgspec.structs.replace(load, seconds=None))
        if figures.problem:
            raise SystemExit(f"The records for {group} could not be written. {figures.problem}")

    def _run_row(self, row: Row, contender: Contender, value_bytes: int) -> Figures:
        if row.load is None:
            return self._run_client(row.client, contender, value_bytes, together=row.together)
        contender.pin(self._server_cores)
        return run_load(self._load(*row.load, contender, value_bytes))

    def _load(self, operation: str, depth: int, contender: Contender, value_bytes: int) -> Load:
        return Load(
            server=contender.server,
            operation="set" if operation == "set" else "get",
            connections=CONNECTIONS,
            depth=depth,
            keys=self.options.keys,
            value_bytes=value_bytes,
            seconds=self.options.seconds,
            cores=self._client_core,
            watch=contender.pids,
        )

    def _run_client(self, name: str, contender: Contender, value_bytes: int, *, together: bool) -> Figures:
        contender.pin(self._client_core if together else self._server_cores)
        work = ClientWork(
            work=name,
            server=contender.server,
            seconds=self.options.seconds,
            keys=self.options.rows if name in ("load", "scan") else self.options.keys,
            value_bytes=value_bytes,
            cores=self._client_core,
            watch=contender.pids,
        )
        command = [sys.executable, "-m", "tests.bench.cluster_clients", msgspec.json.encode(work).decode()]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
        if done.returncode != 0:
            return Figures(problem=f"The client failed with exit code {done.returncode}.")
        return msgspec.json.decode(done.stdout.splitlines()[-1], type=Figures)


@contextlib.contextmanager
def started(group: str, place: Path) -> Iterator[dict[str, Contender]]:
    """The contenders of a group, running; while they are being stopped, Ctrl-C has to wait."""
    waiting: list[int] = []
    with contextlib.ExitStack() as stack:
        try:
            contenders = {}
            for name, start in STARTS[group].items():
                note(f"{group}: starting {name}")
                contenders[name] = stack.enter_context(start(place / name))
            yield contenders
        finally:
            stopping = (signal.SIGINT, signal.SIGTERM)
            before = {number: signal.signal(number, lambda number, _: waiting.append(number)) for number in stopping}
    for number, handler in before.items():
        signal.signal(number, handler)
    if waiting:
        raise KeyboardInterrupt


def left_out(rows: list[Row]) -> tuple[list[Row], list[str]]:
    """The rows that can be run here, and why the others cannot."""
    kept, why = [], {}
    for row in rows:
        needed = [*NEEDED.get(row.group, []), *(["redis-py"] if row.client else [])]
        reason = missing(needed)
        if row.group == "routers" and (os.cpu_count() or 1) < ROUTERS_CORES:
            reason = f"two routers are compared with one on {ROUTERS_CORES} cores or more"
        if reason is None:
            kept.append(row)
        else:
            why.setdefault(reason, []).append(row.name)
    return kept, [f"left out: {', '.join(names)}: {reason}" for reason, names in why.items()]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="about two minutes: few keys, short runs, one round")
    parser.add_argument("--rounds", type=int, help="default 3")
    parser.add_argument("--seconds", type=float, help="of one run; default 3")
    parser.add_argument("--keys", type=int, help="records that are set and got; fewer when values are large")
    parser.add_argument("--rows", type=int, help="rows of the scan")
    parser.add_argument("--values", type=int, nargs="+", help="bytes of a value; default 100 1024 16384")
    parser.add_argument("--only", nargs="+", metavar="ROW", choices=[row.name for row in ROWS])
    parser.add_argument("--directory", help="where data is kept; default: the directory for temporary files")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    quick = {"rounds": 1, "seconds": 0.7, "keys": 20_000, "rows": 50_000, "values": [100]}
    full = {"rounds": 3, "seconds": 3.0, "keys": 100_000, "rows": 1_000_000, "values": [100, 1024, 16_384]}
    for name, value in (quick if options.quick else full).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    options = parse_arguments()
    signal.signal(signal.SIGTERM, _interrupt)
    facts, known = machine(), versions()
    wanted = [row for row in ROWS if not options.only or row.name in options.only]
    wanted += [row for row in ROWS if row.name in {one.of for one in wanted} and row not in wanted]
    rows, settings = left_out(wanted)
    settings.append(
        f"{options.keys:,} keys of 16 B (scan: {options.rows:,} rows), {CONNECTIONS} connections, "
        f"{options.rounds} rounds of {options.seconds:g} s; ratio: ours / the peer's"
    )
    with tempfile.TemporaryDirectory(prefix="shardkv-bench-", dir=options.directory) as name:
        bench = Bench(options, Path(name))
        try:
            bench.run(rows)
        except KeyboardInterrupt:
            raise SystemExit("Interrupted; everything that was started is stopped.") from None
    if options.json:
        _print_json(facts, known, settings, bench)
        return
    for line in machine_lines(facts, known, settings):
        print(line)
    for value_bytes in options.values:
        tables = (
            report.main_table(bench.found, value_bytes, options.values[0]),
            report.cost_table(bench.found, value_bytes),
            report.latency_table(bench.found, value_bytes),
        )
        for table in tables:
            print()
            for line in table:
                print(line)


def _print_json(facts: dict[str, object], known: dict[str, str], settings: list[str], bench: Bench) -> None:
    rows = []
    for value_bytes in bench.options.values:
        for row in ROWS:
            rounds = {name: report.rounds_of(bench.found, value_bytes, row, name) for name in CONTENDERS}
            if any(rounds.values()):
                bar = report.bar_of(row, value_bytes, bench.options.values[0])
                told = {"value_bytes": value_bytes, "row": row.name, "bar": bar, "kind": row.kind}
                rows.append(told | {"ratios": report.ratios(bench.found, value_bytes, row)} | rounds)
    found = {"machine": facts, "versions": known, "settings": settings, "rows": rows}
    print(json.dumps(msgspec.to_builtins(found), indent=2))


if __name__ == "__main__":
    main()
