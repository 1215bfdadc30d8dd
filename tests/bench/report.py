"""What the tables of all benchmarks share: a line with bar, ratio and spread, short numbers, facts of the machine."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from typing import Any

RATE, LESS, WITHIN = "rate", "less", "within"
"""Kinds of bars. rate: ours / the peer's, at least the bar. less: ours / the peer's, at most the bar. within: a
figure of ours alone, at most the bar."""
TITLE_WIDTH = 58


def met(kind: str, bar: float | None, ratio: float) -> bool | None:
    """Whether a bar is met; None when there is none."""
    if bar is None:
        return None
    return ratio >= bar if kind == RATE else ratio <= bar


def heading(title: str, columns: Sequence[str]) -> str:
    """The first line of a table of `row_line`s."""
    return f"{title:<{TITLE_WIDTH}}{'bar':>6}{'ratio':>8}{'spread':>14}  {'met':<5}" + "".join(
        f"{name:>10}" for name in columns
    )


def row_line(
    title: str, kind: str, bar: float | None, ratios: Sequence[float], cells: Sequence[Sequence[float]]
) -> str:
    """A row: `ratios` of each round (none: nothing to compare with), and each contender's figure in each round."""
    if ratios:
        ratio = statistics.median(ratios)
        verdict = {True: "yes", False: "NO", None: ""}[met(kind, bar, ratio)]
        middle = f"{ratio:>8.2f}{f'{min(ratios):.2f}-{max(ratios):.2f}':>14}  {verdict:<5}"
    else:
        middle = f"{'-':>8}{'':>14}  {'':<5}"
    shown = "".join(f"{short(statistics.median(cell)) if cell else '-':>10}" for cell in cells)
    return f"{title:<{TITLE_WIDTH}}{'-' if bar is None else f'{bar:g}':>6}{middle}{shown}"


def short(number: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def note(text: str) -> None:
    """Progress, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


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
