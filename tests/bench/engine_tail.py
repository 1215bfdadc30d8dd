"""How late puts and gets are at half load, with no compaction and while one runs, in the same process.

Half load is half of what a closed loop of puts and gets reached just before. Operations come in small groups on a
fixed schedule. The memtable is so large that only the compactions asked for flush it, one right after the other.
Two figures for each operation: service (start to end of the call) and response (from when it was due, so a stall
counts for everyone who would have come meanwhile). The bar is held to the worse ratio of the two.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

from tests.bench.engine_contenders import Handle, open_store
from tests.bench.engine_data import key_chunks, values
from tests.bench.engine_works import Figures, Spec, put_chunks

PAIRS = 8
"""Puts, and as many gets, of one group."""
CALIBRATION_S = 1.0
PHASE_S = 4.0
LOAD = 0.5
MEMTABLE_BYTES = 512 * 1024 * 1024


def run_tail(spec: Spec) -> Figures:
    store = open_store(spec.contender, spec.directory, spec.budget(memtable_bytes=MEMTABLE_BYTES))
    for keys, given in put_chunks(spec):
        store.write_batch(keys, given)
    store.settle()
    keys = [key for chunk in key_chunks(Path(spec.keys) / "gets") for key in chunk]
    given = values(spec.seed, 1000, spec.value_bytes)
    pairs_per_s = _closed_loop(store, keys, given)
    store.settle()
    calm = _open_loop(store, keys, given, pairs_per_s * LOAD)
    store.settle()
    over = threading.Event()
    compactions = _Compactions(store, over)
    compactions.start()
    busy = _open_loop(store, keys, given, pairs_per_s * LOAD)
    over.set()
    compactions.join()
    store.close()
    if compactions.count == 0 and compactions.seconds < PHASE_S / 2:
        raise SystemExit("No compaction ran while latency was measured.")
    found: Figures = {}
    for operation in ("put", "get"):
        figures = {f"calm_{name}": value for name, value in calm[operation].items()}
        figures |= {f"busy_{name}": value for name, value in busy[operation].items()}
        figures["ratio"] = max(busy[operation][name] / calm[operation][name] for name in ("service_us", "response_us"))
        figures["pairs_per_s"] = pairs_per_s * LOAD
        found[f"tail_{operation}"] = figures
    return found


class _Compactions(threading.Thread):
    """One full compaction after the other."""

    def __init__(self, store: Handle, over: threading.Event) -> None:
        super().__init__(daemon=True)
        self._store = store
        self._over = over
        self._began = time.perf_counter()
        self.count = 0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    def run(self) -> None:
        while not self._over.is_set():
            self._store.compact()
            self.count += 1


def _closed_loop(store: Handle, keys: list[bytes], given: list[bytes]) -> float:
    """Pairs of put and get per second, flat out."""
    began, done = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < CALIBRATION_S:
        for number in range(done, done + 100):
            key = keys[number % len(keys)]
            store.put(key, given[number % len(given)])
            store.get(keys[-1 - number % len(keys)])
        done += 100
    return done / spent


def _open_loop(store: Handle, keys: list[bytes], given: list[bytes], pairs_per_s: float) -> dict[str, dict[str, float]]:
    """p99 of service and response, microseconds, per operation."""
    times: dict[str, dict[str, list[float]]] = {
        operation: {"service_us": [], "response_us": []} for operation in ("put", "get")
    }
    put_service, put_response = times["put"]["service_us"], times["put"]["response_us"]
    get_service, get_response = times["get"]["service_us"], times["get"]["response_us"]
    clock = time.perf_counter
    began, number = clock(), 0
    due = began
    while due < began + PHASE_S:
        wait = due - clock()
        if wait > 0:
            time.sleep(wait)
        for _ in range(PAIRS):
            key, other = keys[number % len(keys)], keys[-1 - number % len(keys)]
            value = given[number % len(given)]
            start = clock()
            store.put(key, value)
            middle = clock()
            store.get(other)
            end = clock()
            put_service.append(middle - start)
            put_response.append(middle - due)
            get_service.append(end - middle)
            get_response.append(end - due)
            number += 1
        due += PAIRS / pairs_per_s
    return {
        operation: {name: 1e6 * sorted(found)[int(0.99 * len(found))] for name, found in kinds.items()}
        for operation, kinds in times.items()
    }
