"""The rows of the engine benchmark with their bars, and the tables it prints."""

from __future__ import annotations

import os
import platform
import statistics
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tests.bench.engine_contenders import CONTENDERS, OURS, PEERS

RATE, LESS, WITHIN = "rate", "less", "within"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    `kind` rate: ours / the better peer, at least `bar`. less: ours / the smaller peer, at most `bar`.
    within: a figure of ours alone, at most `bar`.
    """

    name: str
    title: str
    group: str
    bar: float | None
    kind: str = RATE
    figure: str = "per_s"


ROWS = (
    Row("put", "put one by one, no sync", "put", 1.2),
    Row("batch", "batches of 1000", "batch", 2.5),
    Row("settled", "the same until flush and compaction have settled", "batch", 1.0),
    Row("write_amp", "write amplification of that (bytes to write calls / user bytes)", "batch", None, LESS, "factor"),
    Row("sync", "put one by one with sync", "sync", 1.0),
    Row("sync64", "64 writers with sync (ours: async tasks)", "sync", 1.5),
    Row("sync64_threads", "64 writers with sync (ours: threads)", "sync", None),
    Row("get", "random get, block cache warm", "warm", 1.5),
    Row("get_cold", "random get, block cache empty", "cold", 1.0),
    Row("get_4x", "random get, data 4x the cache", "big", None),
    Row("get_many", "get_many of 100", "warm", 2.0),
    Row("get_many_4x", "get_many of 100, data 4x the cache", "big", None),
    Row("miss", "get of a missing key", "warm", 2.0),
    Row("miss_4x", "get of a missing key, data 4x the cache", "big", None),
    Row("scan", "full ordered scan, cache warm", "warm", 1.5),
    Row("scan_cold", "full ordered scan, cache empty", "cold", 1.5),
    Row("scan_4x", "full ordered scan, data 4x the cache", "big", None),
    Row("seek", "seek + 50 rows forward", "warm", 1.0),
    Row("seek_back", "seek + 50 rows reverse", "warm", 1.0),
    Row("seek_4x", "seek + 50 rows forward, data 4x the cache", "big", None),
    Row("seek_back_4x", "seek + 50 rows reverse, data 4x the cache", "big", None),
    Row("recover", "open after a crash, log written one by one", "recover", 1.0),
    Row("recover_batches", "open after a crash, log written in batches of 1000", "recover", 1.0),
    Row("disk", "bytes on disk after compaction", "compact", 1.0, LESS, "bytes"),
    Row("memory", "peak memory (PSS, children included), load + gets + scan", "memory", 1.5, LESS, "peak_bytes"),
    Row("tail_put", "p99 of put at half load, compacting / not", "tail", 3.0, WITHIN, "ratio"),
    Row("tail_get", "p99 of get at half load, compacting / not", "tail", 3.0, WITHIN, "ratio"),
    Row("lag", "longest stall of the loop, ms", "lag", 20.0, WITHIN, "longest_ms"),
)
"""In the order they are run and printed."""

Found = dict[tuple[int, str, str], list[dict[str, float]]]
"""(value bytes, row, contender) -> the figures of each round."""


def figure(found: Found, value_bytes: int, row: Row, contender: str) -> list[float]:
    """The row's figure in each round."""
    return [figures[row.figure] for figures in found.get((value_bytes, row.name, contender), [])]


def ratios(found: Found, value_bytes: int, row: Row) -> list[float]:
    """Per round ours to the peer that is better by the median; empty when there is nothing to compare."""
    ours = figure(found, value_bytes, row, OURS)
    if row.kind == WITHIN:
        return ours
    peers = [rounds for peer in PEERS if (rounds := figure(found, value_bytes, row, peer))]
    if not ours or not peers:
        return []
    best = (max if row.kind == RATE else min)(peers, key=statistics.median)
    return [one / other for one, other in zip(ours, best, strict=True)]


def met(row: Row, ratio: float) -> bool | None:
    if row.bar is None:
        return None
    return ratio >= row.bar if row.kind == RATE else ratio <= row.bar


def main_table(found: Found, value_bytes: int) -> Iterator[str]:
    """Ratios with their bars, then what each contender did."""
    columns = "".join(f"{name:>10}" for name in CONTENDERS)
    yield f"{'values of ' + str(value_bytes) + ' B':<58}{'bar':>6}{'ratio':>8}{'spread':>14}  {'met':<5}{columns}"
    for row in ROWS:
        rounds = ratios(found, value_bytes, row)
        cells = [figure(found, value_bytes, row, name) for name in CONTENDERS]
        if not any(cells):
            continue
        bar = "-" if row.bar is None else f"{row.bar:g}"
        if rounds:
            ratio = statistics.median(rounds)
            verdict = {True: "yes", False: "NO", None: ""}[met(row, ratio)]
            middle = f"{ratio:>8.2f}{f'{min(rounds):.2f}-{max(rounds):.2f}':>14}  {verdict:<5}"
        else:
            middle = f"{'-':>8}{'':>14}  {'':<5}"
        shown = "".join(f"{_short(statistics.median(cell)) if cell else '-':>10}" for cell in cells)
        yield f"{row.title:<58}{bar:>6}{middle}{shown}"


def cost_table(found: Found, value_bytes: int) -> Iterator[str]:
    """CPU time of an operation, with that of threads and children."""
    yield f"{'CPU, us per operation, values of ' + str(value_bytes) + ' B':<92}" + "".join(
        f"{n:>10}" for n in CONTENDERS
    )
    yield from _side_table(found, value_bytes, "cpu_us", 1.0)


def memory_table(found: Found, value_bytes: int) -> Iterator[str]:
    """Peak memory of the process and its children in each work."""
    yield f"{'peak memory with children (PSS), MB, values of ' + str(value_bytes) + ' B':<92}" + "".join(
        f"{n:>10}" for n in CONTENDERS
    )
    yield from _side_table(found, value_bytes, "peak_bytes", 1e-6)


def _side_table(found: Found, value_bytes: int, key: str, factor: float) -> Iterator[str]:
    groups: set[str] = set()
    for row in ROWS:
        if key == "peak_bytes" and row.group in groups:
            continue
        cells = []
        for name in CONTENDERS:
            rounds = [f[key] * factor for f in found.get((value_bytes, row.name, name), []) if key in f]
            cells.append(f"{_short(statistics.median(rounds)) if rounds else '-':>10}")
        if any(cell.strip() != "-" for cell in cells):
            groups.add(row.group)
            title = f"{row.group}: {', '.join(r.name for r in ROWS if r.group == row.group)}"
            yield f"{(title[:90] if key == 'peak_bytes' else row.title):<92}" + "".join(cells)


def details(found: Found, value_bytes: int) -> Iterator[str]:
    """Latencies and stalls in full."""
    for name in ("tail_put", "tail_get", "lag"):
        for contender in CONTENDERS:
            rounds = found.get((value_bytes, name, contender), [])
            if rounds:
                medians = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
                shown = "  ".join(f"{key} {_short(value)}" for key, value in medians.items() if key != "peak_bytes")
                yield f"{name:<9} {contender:<9} {shown}"


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    flags = sysconfig.get_config_var("PY_CFLAGS") or ""
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "optimisation": [word for word in flags.split() if word.startswith("-O")][-1:],
        "config_args": sysconfig.get_config_var("CONFIG_ARGS"),
        "profile_guided": "--enable-optimizations" in (sysconfig.get_config_var("CONFIG_ARGS") or ""),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.release()}",
    }


def machine_lines(facts: dict[str, Any], versions: dict[str, str], settings: Sequence[str]) -> Iterator[str]:
    yield (
        f"{facts['python']} {' '.join(facts['optimisation'])}, "
        f"{'with' if facts['profile_guided'] else 'without'} profile-guided optimisation; {facts['cores']} cores "
        f"{facts['machine']}, {facts['system']}, load {facts['load']:.1f} at the start"
    )
    yield f"built with: {facts['config_args']}"
    yield "  ".join(f"{name}: {version}" for name, version in versions.items())
    yield from settings


def _short(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
