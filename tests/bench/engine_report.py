"""The rows of the engine benchmark with their bars, and the tables it prints."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from tests.bench.engine_contenders import CONTENDERS, OURS, PEERS
from tests.bench.report import LESS, RATE, WITHIN, heading, row_line, short


@dataclass(frozen=True)
class Row:
    """One line of the table. The peer of the ratio is the better of PEERS."""

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


def main_table(found: Found, value_bytes: int) -> Iterator[str]:
    """Ratios with their bars, then what each contender did."""
    yield heading(f"values of {value_bytes} B", CONTENDERS)
    for row in ROWS:
        cells = [figure(found, value_bytes, row, name) for name in CONTENDERS]
        if any(cells):
            yield row_line(row.title, row.kind, row.bar, ratios(found, value_bytes, row), cells)


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
            cells.append(f"{short(statistics.median(rounds)) if rounds else '-':>10}")
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
                shown = "  ".join(f"{key} {short(value)}" for key, value in medians.items() if key != "peak_bytes")
                yield f"{name:<9} {contender:<9} {shown}"
