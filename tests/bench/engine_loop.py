"""Our store on an event loop, as a node drives it: group commit from many tasks, and a probe of the loop's lag."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import uvloop

from shardkv.errors import ShardKVError
from shardkv.transport.loop import GC_THRESHOLDS
from shardkv_node.committer import Committer
from shardkv_node.engine.columns import PUT
from shardkv_node.engine.options import Options
from shardkv_node.engine.store import Store
from shardkv_node.engine.write import Write
from tests.bench.engine_contenders import FILTER_BITS, L0_STOP, L0_TRIGGER, Budget
from tests.bench.engine_data import key_chunks, values
from tests.bench.engine_works import Figures, Spec

T = TypeVar("T")
PROBE_S = 0.001
LAG_PUTS = 500_000
WRITES_PER_TURN = 100


class LoopStore:
    """Store and committer, put together as in a node. Made on a running loop."""

    def __init__(self, directory: str, budget: Budget) -> None:
        self._loop = asyncio.get_running_loop()
        options = Options(
            durability="always" if budget.sync else "os",
            memtable_bytes_max=budget.memtable_bytes,
            frozen_memtables_max=1,
            block_cache_bytes=budget.cache_bytes,
            upper_compression=budget.codec,
            bottom_compression=budget.codec,
            filter_bits_per_key=FILTER_BITS,
            l0_compaction_trigger=L0_TRIGGER,
            l0_stall_tables=L0_STOP,
        )
        self.store = Store.open(directory, options, post=self._post)
        self.tablet = self.store.create_tablet(b"bench")
        self.committer = Committer(self.store, on_fatal=_fatal)

    def _post(self, work: Callable[[], None]) -> None:
        self._loop.call_soon_threadsafe(work)

    async def put(self, key: bytes, value: bytes) -> None:
        future = self._loop.create_future()
        self.committer.submit(Write(self.tablet, [key], PUT, [value], done=partial(_acknowledge, future)), None)
        await future

    def close(self) -> None:
        self.store.close()


def _acknowledge(future: asyncio.Future[None], write: Write) -> None:
    if write.error is None:
        future.set_result(None)
    else:
        future.set_exception(write.error)


def _fatal(error: ShardKVError) -> None:
    raise error


def run_on_loop(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    gc.set_threshold(*GC_THRESHOLDS)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


class LagProbe:
    """Asks for the loop every millisecond and notes how late it came, the longest per stage.

    Also how long the loop's thread was busy in between: on a machine with other work it comes late without being busy.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._due = self._loop.time() + PROBE_S
        self._stage = ""
        self.longest_s: dict[str, float] = {}
        self.longest_cpu_s: dict[str, float] = {}
        self._cpu_s = time.thread_time()
        self._timer = self._loop.call_at(self._due, self._fire)

    async def stage(self, name: str) -> None:
        """What follows counts under this name, once what came before has been noted."""
        await asyncio.sleep(5 * PROBE_S)
        self._stage = name

    def _fire(self) -> None:
        now = time.monotonic()
        late = now - self._due
        self.longest_s[self._stage] = max(late, self.longest_s.get(self._stage, 0.0))
        cpu_s = time.thread_time()
        busy, self._cpu_s = cpu_s - self._cpu_s, cpu_s
        self.longest_cpu_s[self._stage] = max(busy, self.longest_cpu_s.get(self._stage, 0.0))
        self._due = now + PROBE_S
        self._timer = self._loop.call_at(self._due, self._fire)

    def stop(self) -> None:
        self._timer.cancel()


def run_lag(spec: Spec) -> Figures:
    return run_on_loop(lambda: _lag(spec))


async def _lag(spec: Spec) -> Figures:
    """Half a million puts into one memtable, the first scan over them, the flush that drops it, a dropped tablet."""
    puts = min(LAG_PUTS, spec.key_count)
    host = LoopStore(spec.directory, Budget(memtable_bytes=1 << 30, cache_bytes=1 << 26, codec=spec.codec))
    store = host.store
    probe = LagProbe()
    await probe.stage("puts")
    await _fill(spec, host, puts)
    await probe.stage("first_scan")
    while not store.ready_to_scan((host.tablet,)):
        await asyncio.sleep(0)
    page = store.scan_page((host.tablet,), b"", None, limit=1000, bytes_max=4 << 20)
    if len(page.keys) != 1000:
        raise SystemExit("A contender gave a wrong answer: the first page is short.")
    await probe.stage("ordered_puts")
    await _fill(spec, host, puts // 10, offset=1)
    await probe.stage("flush_and_drop")
    store.flush()
    while not store.maintenance.idle:
        await asyncio.sleep(PROBE_S)
    await probe.stage("refill")
    await _fill(spec, host, puts)
    await probe.stage("drop_tablet")
    store.drop_tablet(host.tablet)
    await probe.stage("end")
    probe.stop()
    host.close()
    shown = [name for name in probe.longest_s if name not in ("", "refill", "end")]
    found = {f"{name}_ms": 1000 * probe.longest_s[name] for name in shown}
    return {"lag": found | {f"{name}_busy_ms": 1000 * probe.longest_cpu_s[name] for name in shown}}


async def _fill(spec: Spec, host: LoopStore, puts: int, offset: int = 0) -> None:
    for number, keys in enumerate(key_chunks(Path(spec.keys) / "puts", puts)):
        given = values(number + offset, len(keys), spec.value_bytes)
        for low in range(0, len(keys), WRITES_PER_TURN):
            share = zip(keys[low : low + WRITES_PER_TURN], given[low : low + WRITES_PER_TURN], strict=True)
            await asyncio.gather(*(host.put(key, value) for key, value in share))
