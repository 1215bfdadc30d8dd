"""`shardkv bench`: runs a workload with asyncio clients and tells throughput and latency; with --peer, hands over to
the comparison with redis.

Invariant: every operation is timed from the call to its answer, and failed ones are counted, not hidden.
"""

from __future__ import annotations

import asyncio
import sys
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

import click

from shardkv.cli.main import UNAVAILABLE
from shardkv.cli.options import Target, as_json, counted, with_target
from shardkv.errors import ShardKVError

if TYPE_CHECKING:
    from shardkv.cli.bench_peer import Operation
    from shardkv.client.aio import AsyncClient
    from shardkv.loadgen.workloads import Chooser

DEFAULT_SECONDS = 10.0
DEFAULT_PEER_SECONDS = 3.0
LOAD_BATCH = 4_000
VALUE_VARIANTS = 64
SHOW_EVERY_S = 0.5
PEER_WORKLOADS: dict[str, Operation] = {"fill": "set", "read": "get"}
WORKLOAD_NAMES = ["fill", "read", "mixed", "scan", *(f"ycsb-{letter}" for letter in "abcdef")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to run."""

    workload: str
    clients: int
    pipeline: int
    value_bytes: int
    keys: int
    operations: int | None
    seconds: float | None
    seed: int


@click.command()
@click.option("--workload", type=click.Choice(WORKLOAD_NAMES), default="mixed", show_default=True)
@click.option("--clients", type=click.IntRange(min=1), default=8, show_default=True, help="Connections.")
@click.option(
    "--pipeline", type=click.IntRange(min=1), default=8, show_default=True, help="Requests in flight on each."
)
@click.option(
    "--value-bytes", type=click.IntRange(min=0), default=100, show_default=True, help="Half of it compresses."
)
@click.option("--keys", type=click.IntRange(min=1), default=100_000, show_default=True, help="Records to work on.")
@click.option("--operations", type=click.IntRange(min=1), help="Stop after so many. [fill: one for each key]")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    help="Stop after so long. [default: 10; with --peer 3 for each run]",
)
@click.option("--seed", type=int, default=1, show_default=True, help="The same seed asks for the same keys.")
@click.option("--peer", metavar="URL", help="Run fill and read against this redis server too: redis://HOST:PORT.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="With --peer: runs of each.")
@click.option("--json", "json_wanted", is_flag=True, help="Print one JSON object.")
@with_target
@click.pass_context
def bench(
    ctx: click.Context,
    target: Target,
    *,
    workload: str,
    clients: int,
    pipeline: int,
    value_bytes: int,
    keys: int,
    operations: int | None,
    seconds: float | None,
    seed: int,
    peer: str | None,
    rounds: int,
    json_wanted: bool,
) -> int:
    """Measure throughput and latency of a workload on keys that begin with "bench:".

    All workloads but fill work on --keys records, which are written first when they are not there.

    With --peer the keys are written to and read from a redis server as well, in turn, by a generator that sends the
    same requests, encoded beforehand, to both; the ratio is ours / redis. It overwrites "bench:" keys there.

    \b
    Example:
      shardkv bench --workload fill --keys 100000
      shardkv bench --workload ycsb-b --clients 16 --pipeline 32 --seconds 5 --json
      shardkv bench --peer redis://127.0.0.1:6379 --clients 50 --pipeline 32
    """
    if peer is not None:
        given = ctx.get_parameter_source("workload") is not click.core.ParameterSource.DEFAULT
        if operations is not None or (given and workload not in PEER_WORKLOADS):
            raise click.UsageError("--peer compares the workloads fill and read, for --seconds.", ctx)
        return _bench_peer(
            target,
            peer,
            [PEER_WORKLOADS[workload]] if given else [*PEER_WORKLOADS.values()],
            json_wanted=json_wanted,
            connections=clients,
            depth=pipeline,
            value_bytes=value_bytes,
            keys=keys,
            seconds=seconds or DEFAULT_PEER_SECONDS,
            rounds=rounds,
            seed=seed,
        )
    from shardkv.transport.loop import run_program

    if operations is None and seconds is None:
        operations, seconds = (keys, None) if workload == "fill" else (None, DEFAULT_SECONDS)
    plan = Plan(
        workload=workload,
        clients=clients,
        pipeline=pipeline,
        value_bytes=value_bytes,
        keys=keys,
        operations=operations,
        seconds=seconds,
        seed=seed,
    )

    async def main(stop: asyncio.Event) -> int:
        result = await run_plan(target, plan, stop)
        click.echo(as_json(result) if json_wanted else as_text(result))
        return 0 if result["operations"] else UNAVAILABLE

    return run_program(main)


def _bench_peer(target: Target, peer: str, operations: list[Operation], *, json_wanted: bool, **asked: Any) -> int:
    from shardkv.cli import bench_peer

    wanted = bench_peer.Comparison(operations=operations, **asked)
    results = bench_peer.compare(target, peer, wanted, _show)
    _show("")
    click.echo(as_json(results) if json_wanted else bench_peer.as_text(results))
    return UNAVAILABLE if any(result["ratio"] is None for result in results) else 0


class Run:
    """The running of a plan: when to stop, and what was measured."""

    def __init__(self, plan: Plan, chooser: Chooser, stop: asyncio.Event) -> None:
        self.chooser = chooser
        self.took: dict[str, array[float]] = {}
        self.rows = 0
        self.errors = Counter[str]()
        self.values = _values(plan)
        self._workload = plan.workload
        self._stop = stop
        self._left = plan.operations
        self._ends_at = None if plan.seconds is None else time.perf_counter() + plan.seconds
        self._operations: list[str] = []

    def next_operation(self) -> str | None:
        """What to do next; None when it is time to stop."""
        if self._stop.is_set() or (self._ends_at is not None and time.perf_counter() >= self._ends_at):
            return None
        if self._left is not None:
            if self._left == 0:
                return None
            self._left -= 1
        if not self._operations:
            self._operations = self.chooser.operations(1_000)
        return self._operations.pop()

    def so_far(self, took_s: float) -> str:
        """What was done after `took_s`, on a line."""
        done = sum(map(len, self.took.values()))
        rate = done / max(took_s, 1e-3)
        return f"{self._workload}: {took_s:.0f} s, {counted(done, 'operation')}, {rate:,.0f} per second"

    def note(self, operation: str, took_s: float) -> None:
        """One operation was answered."""
        if operation not in self.took:
            self.took[operation] = array("d")
        self.took[operation].append(took_s)


async def run_plan(target: Target, plan: Plan, stop: asyncio.Event) -> dict[str, Any]:
    """Load what the workload needs, run it, and return what was measured."""
    from shardkv.client.aio import AsyncClient
    from shardkv.loadgen.workloads import WORKLOADS, Chooser

    fill = plan.workload == "fill"
    clients = [
        AsyncClient(target.router, keyspace=target.keyspace, timeout=target.timeout_s) for _ in range(plan.clients)
    ]
    try:
        with _told(lambda: f"{plan.workload}: loading {counted(plan.keys, 'record')}"):
            loaded_s = 0.0 if fill else await _load(clients[0], plan)
        await asyncio.gather(*(db.ping() for db in clients))
        run = Run(plan, Chooser(WORKLOADS[plan.workload], 0 if fill else plan.keys, Random(plan.seed)), stop)
        began = time.perf_counter()
        with _told(lambda: run.so_far(time.perf_counter() - began)):
            await asyncio.gather(*(_work(db, run) for db in clients for _ in range(plan.pipeline)))
        return _result(plan, run, time.perf_counter() - began, loaded_s)
    finally:
        for db in clients:
            await db.close()


@contextmanager
def _told(line: Callable[[], str]) -> Iterator[None]:
    """Meanwhile shows `line()` on stderr, if that is a terminal, and wipes it at the end."""
    if not sys.stderr.isatty():
        yield
        return

    async def show() -> None:
        while True:
            _show(line())
            await asyncio.sleep(SHOW_EVERY_S)

    shower = asyncio.get_running_loop().create_task(show())
    try:
        yield
    finally:
        shower.cancel()
        _show("")


def _show(line: str) -> None:
    """Put `line` in place of what stands on the terminal's last line; nothing where there is no terminal."""
    if sys.stderr.isatty():
        click.echo(f"\r{line}\x1b[K", err=True, nl=False)


async def _load(db: AsyncClient[bytes], plan: Plan) -> float:
    """Write the records unless they are there; how many seconds it took."""
    from shardkv.loadgen.workloads import key_of

    if await db.get(key_of(plan.keys - 1)) is not None:
        return 0.0
    began = time.perf_counter()
    values = _values(plan)
    for start in range(0, plan.keys, LOAD_BATCH):
        numbers = range(start, min(start + LOAD_BATCH, plan.keys))
        await db.put_many({key_of(number): values[number % VALUE_VARIANTS] for number in numbers}, timeout=60)
    return time.perf_counter() - began


async def _work(db: AsyncClient[bytes], run: Run) -> None:
    """One request after another until it is time to stop."""
    from shardkv.loadgen.workloads import INSERT, MODIFY, READ, SCAN, key_of

    chooser = run.chooser
    while (operation := run.next_operation()) is not None:
        number = chooser.fresh() if operation == INSERT else chooser.existing()
        key, value = key_of(number), run.values[number % VALUE_VARIANTS]
        began = time.perf_counter()
        try:
            if operation == READ:
                await db.get(key)
            elif operation == SCAN:
                rows = [row async for row in db.scan(key, limit=chooser.scan_rows())]
                run.rows += len(rows)
            else:
                if operation == MODIFY:
                    await db.get(key)
                await db.put(key, value)
        except ShardKVError as error:
            run.errors[error.code] += 1
        else:
            run.note(operation, time.perf_counter() - began)


def _values(plan: Plan) -> list[bytes]:
    """Values of which about half compresses away."""
    random = Random(plan.seed)
    half = plan.value_bytes // 2
    return [random.randbytes(half) + b"x" * (plan.value_bytes - half) for _ in range(VALUE_VARIANTS)]


def _result(plan: Plan, run: Run, took_s: float, loaded_s: float) -> dict[str, Any]:
    everything = sorted(took for column in run.took.values() for took in column)
    return {
        "workload": plan.workload,
        "clients": plan.clients,
        "pipeline": plan.pipeline,
        "value_bytes": plan.value_bytes,
        "keys": plan.keys,
        "load_seconds": round(loaded_s, 3),
        "seconds": round(took_s, 3),
        "operations": len(everything),
        "operations_per_second": round(len(everything) / took_s, 1),
        "rows_scanned": run.rows,
        "errors": dict(run.errors),
        "latency_ms": percentiles_ms(everything),
        "by_operation": {
            name: {"operations": len(column), "latency_ms": percentiles_ms(sorted(column))}
            for name, column in sorted(run.took.items())
        },
    }


def percentiles_ms(took_s: list[float]) -> dict[str, float]:
    """p50, p99, p99.9 and the most, of ascending seconds, in milliseconds (nearest rank)."""
    if not took_s:
        return {}
    ranks = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999, "max": 1.0}
    last = len(took_s) - 1
    return {name: round(took_s[min(last, int(share * len(took_s)))] * 1000, 3) for name, share in ranks.items()}


def as_text(result: dict[str, Any]) -> str:
    """The result for a person."""
    latency = ", ".join(f"{name} {value:.2f} ms" for name, value in result["latency_ms"].items())
    lines = [
        f"{result['workload']}: {result['operations']:,} operations in {result['seconds']:.2f} s, "
        f"{result['operations_per_second']:,.0f} per second, {result['clients']} clients x {result['pipeline']}",
        f"  latency    {latency or 'nothing was answered'}",
    ]
    if len(result["by_operation"]) > 1:
        lines += [
            f"  {name:9}  {told['operations']:,}: "
            + ", ".join(f"{rank} {value:.2f} ms" for rank, value in told["latency_ms"].items())
            for name, told in result["by_operation"].items()
        ]
    if result["rows_scanned"]:
        lines.append(f"  rows       {result['rows_scanned']:,} ({result['rows_scanned'] / result['seconds']:,.0f}/s)")
    if result["errors"]:
        lines.append("  errors     " + ", ".join(f"{code} {count}" for code, count in result["errors"].items()))
    return "\n".join(lines)
