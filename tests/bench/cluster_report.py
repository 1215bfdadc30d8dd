"""The rows of the cluster benchmark with their bars, and the tables it prints."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from shardkv.loadgen.load import Figures
from tests.bench.report import LESS, RATE, TITLE_WIDTH, heading, row_line, short

OURS, PEER = "shardkv", "peer"
CONTENDERS = (OURS, PEER)
GROUPS = {
    "direct": "redis-server, AOF everysec (ours: interval of 1 s), spoken to directly",
    "durable": "redis-server, AOF always (ours: always), spoken to directly",
    "router": "twemproxy over two redis-servers (ours: a router over two nodes)",
    "routers": "ours with one router",
    "scan": "redis-server with all the rows, spoken to directly (ours: a router over three nodes, hash)",
}
"""What each group is measured against."""


@dataclass(frozen=True)
class Row:
    """One line of the table. A `load` is (operation, requests under way on each of 50 connections); else `client` is a
    work of cluster_clients. `together`: everything on one core, so that no hop between cores hides the work."""

    name: str
    title: str
    group: str
    bar: float | None
    load: tuple[Literal["set", "get"], int] | None = None
    client: str = ""
    together: bool = False
    large: bool = False
    """Also with larger values, and then without a bar."""
    of: str = ""
    """Not run by itself: the CPU time of the servers in this row."""

    @property
    def kind(self) -> str:
        return LESS if self.of else RATE


ROWS = (
    Row("direct_set_1", "node: set, one at a time", "direct", 0.9, ("set", 1), large=True),
    Row("direct_get_1", "node: get, one at a time", "direct", 0.85, ("get", 1), large=True),
    Row("direct_set_32", "node: set, pipelined by 32", "direct", 1.0, ("set", 32), large=True),
    Row("direct_get_32", "node: get, pipelined by 32", "direct", 0.75, ("get", 32), large=True),
    Row("durable_set_1", "node: set on disk, one at a time", "durable", 0.8, ("set", 1)),
    Row("durable_set_32", "node: set on disk, pipelined by 32", "durable", 1.5, ("set", 32)),
    Row("router_set_1", "router: set, one at a time", "router", 0.6, ("set", 1), large=True),
    Row("router_get_1", "router: get, one at a time", "router", 0.6, ("get", 1), large=True),
    Row("router_set_32", "router: set, pipelined by 32", "router", 1.5, ("set", 32), large=True),
    Row("router_get_32", "router: get, pipelined by 32", "router", 1.5, ("get", 32), large=True),
    Row("router_cpu_set", "router + node: CPU us per set, pipelined by 32", "router", 2.0, of="router_set_32"),
    Row("router_cpu_get", "router + node: CPU us per get, pipelined by 32", "router", 2.0, of="router_get_32"),
    Row("two_routers", "two routers: get, pipelined by 32", "routers", 1.6, ("get", 32)),
    Row("client_put", "Python: put, one blocking caller", "router", 1.2, client="put", together=True),
    Row("client_get", "Python: get, one blocking caller", "router", 1.2, client="get", together=True),
    Row("client_put_many", "Python: put_many of 100 / mset", "router", 2.0, client="put_many"),
    Row("client_get_many", "Python: get_many of 100 / mget", "router", 2.0, client="get_many"),
    Row("async_put", "Python async: put, 64 tasks", "router", 3.0, client="async_put"),
    Row("async_get", "Python async: get, 64 tasks", "router", 3.0, client="async_get"),
    Row("scan", "Python: scan, ordered / scan_iter + mget, rows", "scan", 5.0, client="scan"),
)
"""In the order they are run and printed, group by group."""

Found = dict[tuple[int, str, str], list[Figures]]
"""(value bytes, row, contender) -> the figures of each round."""


def rounds_of(found: Found, value_bytes: int, row: Row, contender: str) -> list[Figures]:
    return found.get((value_bytes, row.of or row.name, contender), [])


def void_reason(row: Row, figures: Figures) -> str | None:
    """Why figures do not count; a client may be as busy as it likes, a generator may not."""
    return figures.problem if row.client else figures.void


def figure(found: Found, value_bytes: int, row: Row, contender: str) -> list[float]:
    """The row's figure in each round; empty when one of them is void."""
    rounds = rounds_of(found, value_bytes, row, contender)
    if any(void_reason(row, one) for one in rounds):
        return []
    return [sum(one.cpu_us.values()) if row.of else one.per_s for one in rounds]


def ratios(found: Found, value_bytes: int, row: Row) -> list[float]:
    """Ours / the peer's in each round; empty when there is nothing to compare."""
    ours, theirs = (figure(found, value_bytes, row, name) for name in CONTENDERS)
    return [one / other for one, other in zip(ours, theirs, strict=False) if other]


def bar_of(row: Row, value_bytes: int, first: int) -> float | None:
    """The bars are for the first size of values."""
    return row.bar if value_bytes == first else None


def main_table(found: Found, value_bytes: int, first: int) -> Iterator[str]:
    """Ratios with their bars, then operations per second of both; group by group."""
    yield heading(f"values of {value_bytes} B, operations per second", CONTENDERS)
    group = ""
    for row in ROWS:
        if not any(rounds_of(found, value_bytes, row, name) for name in CONTENDERS):
            continue
        if row.group != group:
            group = row.group
            yield f"against {GROUPS[group]}"
        cells = [figure(found, value_bytes, row, name) for name in CONTENDERS]
        bar = bar_of(row, value_bytes, first)
        yield row_line("  " + row.title, row.kind, bar, ratios(found, value_bytes, row), cells)
    for row in ROWS:
        for name in CONTENDERS:
            for number, one in enumerate(rounds_of(found, value_bytes, row, name), 1):
                if not row.of and (reason := void_reason(row, one)):
                    yield f"void: {row.name}, {name}, round {number}: {reason}"


def cost_table(found: Found, value_bytes: int) -> Iterator[str]:
    """CPU time of an operation in each process, and the ratio of what the servers together take."""
    yield f"{f'CPU, us per operation, values of {value_bytes} B':<{TITLE_WIDTH}}{'ratio':>6}  {OURS:<64}{PEER}"
    for row in ROWS:
        costs = [_costs(rounds_of(found, value_bytes, row, name)) for name in CONTENDERS]
        if row.of or not all(costs):
            continue
        ours, theirs = (sum(one for name, one in cost.items() if name != "client") for cost in costs)
        ratio = f"{ours / theirs:.2f}" if theirs else "-"
        yield f"  {row.title:<{TITLE_WIDTH - 2}}{ratio:>6}  {_told(costs[0]):<64}{_told(costs[1])}"


def _costs(rounds: list[Figures]) -> dict[str, float]:
    """The median of each process."""
    names = rounds[0].cpu_us if rounds else {}
    return {name: statistics.median(one.cpu_us.get(name, 0.0) for one in rounds) for name in names}


def _told(costs: dict[str, float]) -> str:
    return "  ".join(f"{name} {short(one)}" for name, one in costs.items())


def latency_table(found: Found, value_bytes: int) -> Iterator[str]:
    """Latencies of an exchange or call, and how busy the generator or client was."""
    columns = f"{'p50':>8}{'p99':>8}{'p99.9':>8}{'busy':>6}"
    yield f"{f'latency, ms, values of {value_bytes} B':<{TITLE_WIDTH}}{OURS:>8}{'':<{len(columns) - 8}}{PEER:>8}"
    yield f"{'':<{TITLE_WIDTH}}{columns}{columns}"
    for row in ROWS:
        if row.of or row.client == "scan":
            continue
        rounds = [rounds_of(found, value_bytes, row, name) for name in CONTENDERS]
        if all(rounds):
            yield f"  {row.title:<{TITLE_WIDTH - 2}}" + "".join(map(_latencies, rounds))


def _latencies(rounds: list[Figures]) -> str:
    def middle(name: str) -> float:
        return statistics.median(getattr(one, name) for one in rounds)

    shown = [f"{middle(name) / 1000:>8.3f}" for name in ("p50_us", "p99_us", "p999_us")]
    return "".join(shown) + f"{middle('busy'):>6.0%}"
