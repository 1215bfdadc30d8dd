"""The works of the engine benchmark. Each group of them runs in a process of its own, for one contender, one round.

    python -m tests.bench.engine_works SPEC        SPEC: JSON of `Spec`; the last line printed is JSON of the figures

Only calls of the store are timed: making values and reading keys from files is not. CPU time is that of the process
and all its children, less what making the data took. A read work checks what it got; a wrong count ends the run.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.bench.engine_contenders import OURS, Budget, Handle, directory_bytes, open_store
from tests.bench.engine_data import KEY_BYTES, key_chunks, values

WRITERS = 64
MULTI = 100
SEEK_ROWS = 50
LOG_MEMTABLES = 4
"""A memtable this much larger than the log: nothing is flushed before the crash, all must be recovered."""
Figures = dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One run. Directories as strings, sizes in bytes."""

    contender: str
    group: str
    rows: list[str]
    keys: str
    """Directory of the key files."""
    directory: str
    """Of the store."""
    value_bytes: int
    memtable_bytes: int
    cache_bytes: int
    codec: str
    key_count: int
    synced: int
    log_bytes: int
    seed: int

    def budget(self, *, sync: bool = False, memtable_bytes: int | None = None) -> Budget:
        return Budget(
            memtable_bytes=memtable_bytes or self.memtable_bytes,
            cache_bytes=self.cache_bytes,
            codec=self.codec,
            sync=sync,
        )


@dataclass
class Meter:
    """Time spent inside `running`, and CPU time since it was made less what was spent outside."""

    seconds: float = 0.0
    _cpu_begin: float = field(default_factory=lambda: cpu_s())
    _idle_cpu: float = field(default_factory=time.thread_time)
    _inside_cpu: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        cpu, began = time.thread_time(), time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began
        self._inside_cpu += time.thread_time() - cpu

    def figures(self, operations: int) -> dict[str, float]:
        outside = time.thread_time() - self._idle_cpu - self._inside_cpu
        return {
            "operations": operations,
            "seconds": self.seconds,
            "per_s": operations / self.seconds,
            "cpu_us": 1e6 * max(0.0, cpu_s() - self._cpu_begin - outside) / operations,
        }


def cpu_s() -> float:
    """CPU time of this process and all its children so far."""
    own, dead = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    total = own.ru_utime + own.ru_stime + dead.ru_utime + dead.ru_stime
    for child in psutil.Process().children(recursive=True):
        times = child.cpu_times()
        total += times.user + times.system
    return total


def written_bytes() -> int:
    """Bytes this process and its children gave to write calls so far."""
    process = psutil.Process()
    return sum(one.io_counters().write_chars for one in (process, *process.children(recursive=True)))


def put_chunks(spec: Spec, keys_max: int | None = None) -> Iterator[tuple[Sequence[bytes], list[bytes]]]:
    """Keys in put order with their values, a chunk at a time; the same in every contender of a round."""
    for number, keys in enumerate(key_chunks(Path(spec.keys) / "puts", keys_max)):
        yield keys, values(spec.seed * 1_000_003 + number, len(keys), spec.value_bytes)


# --- writing ---


def run_put(spec: Spec) -> Figures:
    store = open_store(spec.contender, spec.directory, spec.budget())
    put = store.put
    meter, count = Meter(), 0
    for keys, given in put_chunks(spec):
        with meter.running():
            for key, value in zip(keys, given, strict=True):
                put(key, value)
        count += len(keys)
    figures = meter.figures(count)
    store.close()
    return {"put": figures}


def run_batch(spec: Spec) -> Figures:
    """Load in batches, then wait until it has settled. The store stays, as the data of the read works."""
    store = open_store(spec.contender, spec.directory, spec.budget())
    written = written_bytes()
    meter, count = Meter(), 0
    for keys, given in put_chunks(spec):
        with meter.running():
            store.write_batch(keys, given)
        count += len(keys)
    found = {"batch": meter.figures(count)}
    settling = time.perf_counter()
    meter.seconds += store.settle() - settling
    found["settled"] = meter.figures(count)
    user_bytes = count * (KEY_BYTES + spec.value_bytes)
    found["write_amp"] = {"factor": (written_bytes() - written) / user_bytes}
    store.close()
    return found


def run_sync(spec: Spec) -> Figures:
    """Acknowledged when on disk: one by one, and from many writers at once."""
    found: Figures = {}
    if "sync" in spec.rows:
        store = open_store(spec.contender, spec.directory, spec.budget(sync=True))
        meter, count = Meter(), 0
        for keys, given in put_chunks(spec, keys_max=spec.synced):
            with meter.running():
                for key, value in zip(keys, given, strict=True):
                    store.put(key, value)
            count += len(keys)
        found["sync"] = meter.figures(count)
        store.close()
    pairs = [
        pair for keys, given in put_chunks(spec, keys_max=8 * spec.synced) for pair in zip(keys, given, strict=True)
    ]
    shares = [pairs[number::WRITERS] for number in range(WRITERS)]
    if "sync64_threads" in spec.rows or ("sync64" in spec.rows and spec.contender != OURS):
        found["sync64_threads"] = _threads(spec, shares, len(pairs))
        found["sync64"] = found["sync64_threads"]
    if spec.contender == OURS and "sync64" in spec.rows:
        found["sync64"] = _tasks(spec, shares, len(pairs))
    return found


def _threads(spec: Spec, shares: list[list[tuple[bytes, bytes]]], count: int) -> dict[str, float]:
    store = open_store(spec.contender, spec.directory + "-threads", spec.budget(sync=True))
    put = store.put

    def work(share: list[tuple[bytes, bytes]]) -> None:
        for key, value in share:
            put(key, value)

    threads = [threading.Thread(target=work, args=(share,)) for share in shares]
    meter = Meter()
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    meter.seconds = time.perf_counter() - began
    figures = meter.figures(count)
    store.close()
    return figures


def _tasks(spec: Spec, shares: list[list[tuple[bytes, bytes]]], count: int) -> dict[str, float]:
    """As many tasks on one loop, over the store and committer a node is made of."""
    from tests.bench.engine_loop import LoopStore, run_on_loop

    async def main() -> dict[str, float]:
        store = LoopStore(spec.directory + "-tasks", spec.budget(sync=True))

        async def work(share: list[tuple[bytes, bytes]]) -> None:
            for key, value in share:
                await store.put(key, value)

        meter = Meter()
        began = time.perf_counter()
        await asyncio.gather(*map(work, shares))
        meter.seconds = time.perf_counter() - began
        figures = meter.figures(count)
        store.close()
        return figures

    return run_on_loop(main)


# --- reading ---


def run_warm(spec: Spec) -> Figures:
    """Reads with a cache that holds everything, each after a pass that filled it."""
    return _reads(spec, "")


def run_big(spec: Spec) -> Figures:
    """The same reads with a cache a quarter of the data."""
    return _reads(spec, "_4x")


def _reads(spec: Spec, suffix: str) -> Figures:
    warm_directory(spec.directory)
    store = open_store(spec.contender, spec.directory, spec.budget())
    found: Figures = {}
    for name, work in (
        ("get", _get),
        ("get_many", _get_many),
        ("miss", _miss),
        ("seek", _seek),
        ("seek_back", _seek_back),
        ("scan", _scan),
    ):
        if name + suffix in spec.rows:
            work(spec, store)
            found[name + suffix] = work(spec, store)
    store.close()
    return found


def run_cold(spec: Spec) -> Figures:
    """Reads right after opening: nothing in the block cache, the files in the cache of the system."""
    warm_directory(spec.directory)
    found: Figures = {}
    if "get_cold" in spec.rows:
        store = open_store(spec.contender, spec.directory, spec.budget())
        found["get_cold"] = _get(spec, store, "cold")
        store.close()
    if "scan_cold" in spec.rows:
        store = open_store(spec.contender, spec.directory, spec.budget())
        found["scan_cold"] = _scan(spec, store)
        store.close()
    return found


def _get(spec: Spec, store: Handle, file: str = "gets") -> dict[str, float]:
    get = store.get
    meter, count, missing = Meter(), 0, 0
    for keys in key_chunks(Path(spec.keys) / file):
        with meter.running():
            for key in keys:
                if get(key) is None:
                    missing += 1
        count += len(keys)
    require(missing == 0, f"{missing} of {count} keys were not found")
    return meter.figures(count)


def _get_many(spec: Spec, store: Handle) -> dict[str, float]:
    get_many = store.get_many
    meter, count, missing = Meter(), 0, 0
    for keys in key_chunks(Path(spec.keys) / "gets"):
        for low in range(0, len(keys), MULTI):
            wanted = list(keys[low : low + MULTI])
            with meter.running():
                got = get_many(wanted)
            missing += got.count(None)
            count += len(wanted)
    require(missing == 0, f"{missing} of {count} keys were not found")
    return meter.figures(count)


def _miss(spec: Spec, store: Handle) -> dict[str, float]:
    get = store.get
    meter, count, hits = Meter(), 0, 0
    for keys in key_chunks(Path(spec.keys) / "misses"):
        with meter.running():
            for key in keys:
                if get(key) is not None:
                    hits += 1
        count += len(keys)
    require(hits == 0, f"{hits} of {count} absent keys were found")
    return meter.figures(count)


def _seek(spec: Spec, store: Handle) -> dict[str, float]:
    return _seek_rows(spec, store.forward)


def _seek_back(spec: Spec, store: Handle) -> dict[str, float]:
    return _seek_rows(spec, store.backward)


def _seek_rows(spec: Spec, seek: Callable[[bytes, int], Any]) -> dict[str, float]:
    meter, count, rows = Meter(), 0, 0
    for keys in key_chunks(Path(spec.keys) / "seeks"):
        with meter.running():
            for key in keys:
                for _key, _value in seek(key, SEEK_ROWS):
                    rows += 1
        count += len(keys)
    require(rows > 0.9 * SEEK_ROWS * count, f"{count} seeks gave {rows} rows")
    return meter.figures(count)


def _scan(spec: Spec, store: Handle) -> dict[str, float]:
    meter, rows = Meter(), 0
    with meter.running():
        for _key, _value in store.scan():
            rows += 1
    require(rows == spec.key_count, f"a scan gave {rows} rows of {spec.key_count}")
    return meter.figures(rows)


def warm_directory(directory: str) -> None:
    """Have the system cache all files."""
    for folder, _, names in os.walk(directory):
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                while file.read(1 << 20):
                    pass


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise SystemExit(f"A contender gave a wrong answer: {otherwise}.")


# --- opening, disk, memory ---


def run_log(spec: Spec) -> Figures:
    """Log so many bytes of rows, nothing of it flushed, and end as `kill -9` does. Never returns."""
    store = open_store(spec.contender, spec.directory, spec.budget(memtable_bytes=LOG_MEMTABLES * spec.log_bytes))
    left = spec.log_bytes // (KEY_BYTES + spec.value_bytes)
    while left > 0:
        for keys, given in put_chunks(spec, keys_max=left):
            if spec.rows == ["recover"]:
                for key, value in zip(keys, given, strict=True):
                    store.put(key, value)
            else:
                store.write_batch(keys, given)
            left -= len(keys)
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def run_recover(spec: Spec) -> Figures:
    """Open what `run_log` left, up to the first answer."""
    size = directory_bytes(spec.directory)
    warm_directory(spec.directory)
    first = next(key_chunks(Path(spec.keys) / "puts"))[0]
    meter = Meter()
    with meter.running():
        store = open_store(spec.contender, spec.directory, spec.budget(memtable_bytes=LOG_MEMTABLES * spec.log_bytes))
        found = store.get(first)
    require(found is not None, "the first put was gone after a crash")
    figures = meter.figures(1)
    figures["megabytes"] = size / 1e6
    store.close()
    return {spec.rows[0]: figures}


def run_compact(spec: Spec) -> Figures:
    store = open_store(spec.contender, spec.directory, spec.budget())
    meter = Meter()
    with meter.running():
        store.compact()
    figures = meter.figures(1)
    store.settle()
    store.close()
    figures["bytes"] = directory_bytes(spec.directory)
    return {"disk": figures}


def run_memory(spec: Spec) -> Figures:
    """A life under a small budget: load, settle, random gets, a scan. The parent watches the memory."""
    store = open_store(spec.contender, spec.directory, spec.budget())
    for keys, given in put_chunks(spec):
        store.write_batch(keys, given)
    store.settle()
    _get(spec, store)
    _scan(spec, store)
    store.close()
    return {"memory": {}}


# --- the run ---


def run_tail(spec: Spec) -> Figures:
    from tests.bench.engine_tail import run_tail as work

    return work(spec)


def run_lag(spec: Spec) -> Figures:
    from tests.bench.engine_loop import run_lag as work

    return work(spec)


GROUPS: dict[str, Callable[[Spec], Figures]] = {
    "put": run_put,
    "batch": run_batch,
    "sync": run_sync,
    "warm": run_warm,
    "big": run_big,
    "cold": run_cold,
    "log": run_log,
    "recover": run_recover,
    "compact": run_compact,
    "memory": run_memory,
    "tail": run_tail,
    "lag": run_lag,
}


def main() -> None:
    spec = Spec(**json.loads(sys.argv[1]))
    figures = GROUPS[spec.group](spec)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
