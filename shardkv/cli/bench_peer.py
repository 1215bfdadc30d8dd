"""`shardkv bench --peer`: the same load against a router and against a redis server, in turn, and the ratios.

Invariant: a round of figures counts only when both servers answered every request rightly and the generator had time
to spare; else the ratio is missing and the reason is told.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import msgspec

from shardkv.cli.options import Target
from shardkv.errors import InvalidArgument
from shardkv.loadgen.apart import run_load
from shardkv.loadgen.load import Figures, Load, Server
from shardkv.transport.address import parse_address

REDIS_PORT = 6379
OURS, PEER = "shardkv", "redis"
FIGURES = ("per_s", "p50_us", "p99_us", "p999_us", "busy")

Operation = Literal["set", "get"]
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What to compare, and how often."""

    operations: Sequence[Operation]
    connections: int
    depth: int
    value_bytes: int
    keys: int
    seconds: float
    rounds: int
    seed: int


def peer_server(url: str) -> Server:
    """The server of redis://[[USER]:PASSWORD@]HOST[:PORT][/DATABASE]. Raises InvalidArgument."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise _not_a_peer(url) from None
    database = parts.path.strip("/") or "0"
    if parts.scheme != "redis" or not parts.hostname or not database.isdigit():
        raise _not_a_peer(url)
    return Server(
        protocol="redis",
        host=parts.hostname,
        port=port or REDIS_PORT,
        user=unquote(parts.username) if parts.username else None,
        password=None if parts.password is None else unquote(parts.password),
        database=int(database),
    )


def _not_a_peer(url: str) -> InvalidArgument:
    return InvalidArgument(f"{url!r} is not the address of a peer.", hint="Write redis://HOST:PORT.")


def our_server(target: Target) -> Server:
    """The first of the target's routers."""
    host, port = parse_address(target.router.split(",")[0])
    return Server(protocol="shardkv", host=host, port=port, keyspace=target.keyspace)


def compare(target: Target, peer: str, wanted: Comparison, tell: Tell) -> list[dict[str, Any]]:
    """One result for each operation: the figures of both servers in every round. `tell` hears what is going on.

    Raises InvalidArgument.
    """
    servers = {OURS: our_server(target), PEER: peer_server(peer)}
    loads = {
        name: Load(
            server=server,
            operation="set",
            connections=wanted.connections,
            depth=wanted.depth,
            keys=wanted.keys,
            value_bytes=wanted.value_bytes,
            seconds=wanted.seconds,
            seed=wanted.seed,
        )
        for name, server in servers.items()
    }
    problems: dict[str, str | None] = {}
    for name, load in loads.items():
        tell(f"{name}: writing {load.records:,} records")
        problems[name] = run_load(msgspec.structs.replace(load, seconds=None)).problem
    return [_compared(operation, loads, wanted.rounds, problems, tell) for operation in wanted.operations]


def _compared(
    operation: Operation,
    loads: dict[str, Load],
    rounds: int,
    problems: dict[str, str | None],
    tell: Tell,
) -> dict[str, Any]:
    found: dict[str, list[Figures]] = {name: [] for name in loads}
    for number in range(rounds):
        for name in sorted(loads, reverse=bool(number % 2)):
            tell(f"{name}: {operation}, round {number + 1}")
            problem = problems[name]
            figures = run_load(msgspec.structs.replace(loads[name], operation=operation)) if not problem else Figures()
            figures.problem = figures.problem or problem
            found[name].append(figures)
    load = loads[OURS]
    void = {name: next((one.void for one in figures if one.void), None) for name, figures in found.items()}
    ratios = [ours.per_s / peer.per_s for ours, peer in zip(found[OURS], found[PEER], strict=True) if peer.operations]
    return {
        "operation": operation,
        "connections": load.connections,
        "depth": load.depth,
        "value_bytes": load.value_bytes,
        "keys": load.records,
        "rounds": rounds,
        "ratio": None if any(void.values()) else round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "void": {name: reason for name, reason in void.items() if reason},
        **{name: _medians(figures) for name, figures in found.items()},
    }


def _medians(rounds: Sequence[Figures]) -> dict[str, float]:
    return {name: round(statistics.median(getattr(one, name) for one in rounds), 3) for name in FIGURES}


def as_text(results: Sequence[dict[str, Any]]) -> str:
    """The results for a person."""
    lines = []
    for result in results:
        lines.append(
            f"{result['operation']}, {result['connections']} connections x {result['depth']}, {result['keys']:,} keys, "
            f"values of {result['value_bytes']} B, medians of {result['rounds']}"
        )
        for name in (OURS, PEER):
            told = result[name]
            lines.append(
                f"  {name:8} {told['per_s']:>12,.0f} per second   p50 {told['p50_us'] / 1000:.2f} ms, "
                f"p99 {told['p99_us'] / 1000:.2f} ms, p99.9 {told['p999_us'] / 1000:.2f} ms   "
                f"generator {told['busy']:.0%} busy"
            )
        if result["ratio"] is not None:
            spread = f"{min(result['ratios']):.2f}-{max(result['ratios']):.2f}"
            lines.append(f"  ratio    {result['ratio']:>12.2f}   ({spread})")
        lines += [f"  void     {name}: {reason}" for name, reason in result["void"].items()]
    return "\n".join(lines)
