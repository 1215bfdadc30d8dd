"""Direct mode beside a router: one blocking caller, the same calls at the same cluster, in turns.

    python -m tests.bench.direct [--rounds 15] [--round-s 0.2] [--nodes 2] [--json]

Starts a cluster of one router. Keys of 16 bytes, values of 100; put, get, and put_many and get_many of 100. Everything
runs on one core, lest the hops between cores be what is measured. Each round does every work in both modes, one after
the other, in turning order. Prints, for each work, medians over the rounds of p50 and of CPU per call (client, router
and nodes), and the ratios direct / router.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any

from shardkv import Client
from shardkv.loadgen.cpu import cpu_s_of
from tests.bench.cluster_servers import Contender, ours
from tests.bench.report import machine, note

KEYS, BATCH, VALUE_BYTES = 20_000, 100, 100
ROUTER, DIRECT = "router", "direct"
MODES = [ROUTER, DIRECT]

Call = Callable[[], object]


def calls(db: Client[bytes], seed: int) -> dict[str, Iterator[Call]]:
    """For each work, calls for ever."""
    rng = Random(seed)
    keys = [f"user:{number:011}" for number in rng.sample(range(KEYS), KEYS)]
    value = rng.randbytes(VALUE_BYTES)
    parts = [keys[start : start + BATCH] for start in range(0, KEYS, BATCH)]
    return {
        "put": ((lambda key=key: db.put(key, value)) for key in cycle(keys)),
        "get": ((lambda key=key: db.get(key)) for key in cycle(keys)),
        "put_many of 100": ((lambda part=part: db.put_many(dict.fromkeys(part, value))) for part in cycle(parts)),
        "get_many of 100": ((lambda part=part: db.get_many(part)) for part in cycle(parts)),
    }


def run(work: Iterator[Call], contender: Contender, seconds: float) -> dict[str, float]:
    """Microseconds per call: the median time, and CPU of everybody."""
    took: list[int] = []
    used, mine = cpu_s_of(contender.pids), time.process_time()
    end = time.perf_counter_ns() + int(seconds * 1e9)
    while (began := time.perf_counter_ns()) < end:
        next(work)()
        took.append(time.perf_counter_ns() - began)
    client = time.process_time() - mine
    after = cpu_s_of(contender.pids)
    spent = {name: (after[name] - used[name]) * 1e6 / len(took) for name in used}
    router = sum(one for name, one in spent.items() if name.startswith("router"))
    figures = {"p50": statistics.median(took) / 1e3, "client": client * 1e6 / len(took), "router": router}
    figures["nodes"] = sum(spent.values()) - router
    return figures | {"cpu": figures["client"] + sum(spent.values())}


def measure(contender: Contender, rounds: int, seconds: float) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Figures by work and mode, one for each round."""
    address = f"{contender.server.host}:{contender.server.port}"
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    with Client(address, timeout=30) as far, Client(address, timeout=30, direct=True) as near:
        works = {ROUTER: calls(far, 1), DIRECT: calls(near, 1)}
        for name in works[ROUTER]:
            for mode in MODES:
                run(works[mode][name], contender, seconds)
        for number in range(rounds):
            for name in works[ROUTER]:
                for mode in MODES if number % 2 else reversed(MODES):
                    note(f"round {number + 1}  {name}  {mode}")
                    figures = run(works[mode][name], contender, seconds)
                    found.setdefault(name, {}).setdefault(mode, []).append(figures)
    note("")
    return found


def table(found: dict[str, dict[str, list[dict[str, float]]]]) -> Iterator[str]:
    columns = ["p50", "cpu", "client", "router", "nodes"]
    yield "us per call, medians" + " " * 8 + "".join(f"{name:>9}" for name in columns)
    for name, modes in found.items():
        for mode in MODES:
            cells = [statistics.median(one[column] for one in modes[mode]) for column in columns]
            yield f"{name:<18}{mode:<10}" + "".join(f"{cell:>9.0f}" for cell in cells)
        pairs = list(zip(modes[DIRECT], modes[ROUTER], strict=True))
        ratios = [statistics.median(near[column] / far[column] for near, far in pairs) for column in columns[:3]]
        yield f"{name:<18}{'ratio':<10}" + "".join(f"{ratio:>9.2f}" for ratio in ratios)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--round-s", type=float, default=0.2)
    options.add_argument("--nodes", type=int, default=2)
    options.add_argument("--json", action="store_true")
    asked = options.parse_args()
    core = sorted(os.sched_getaffinity(0))[-1:]
    with tempfile.TemporaryDirectory() as place, ours(Path(place) / "ours", "interval", nodes=asked.nodes) as contender:
        os.sched_setaffinity(0, core)
        contender.pin(core)
        found: Any = measure(contender, asked.rounds, asked.round_s)
    print(json.dumps({"machine": machine(), "found": found}) if asked.json else "\n".join(table(found)))


if __name__ == "__main__":
    main()
