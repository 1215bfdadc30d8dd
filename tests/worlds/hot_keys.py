"""Many clients on few keys, each writing down exactly what it was told.

acknowledged   it took effect between call and end
not found      a read's or delete's answer like any other
refused        a write that raised what says "not applied": not in the history, so its value must never be read
failed         a read that raised: says nothing
unknown        OutcomeUnknown, or cancelled: it may take effect at any time after the call, or never
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

from shardkv import AsyncClient, Client
from shardkv.errors import DeadlineExceeded, OutcomeUnknown, UnavailableError
from shardkv.limits import Limits
from tests.worlds.linearizability import FOREVER, UNKNOWN, Delete, Get, Operation, Put

REFUSALS = (DeadlineExceeded, UnavailableError)
"""The errors that say "not applied" and may be expected under faults; anything else is a surprise."""
TIMEOUTS_S = (0.15, 0.4, 1.0, 2.5)
PAUSE_MOST_S = 0.01
LONG_VALUE_CHANCE = 0.05
LONG_VALUE_BYTES = (20_000, 300_000)
"""Long ones cross links in many pieces, and are cut in the middle."""
CANCEL_CHANCE = 0.1
PATIENCE_S = 30
IMPATIENT = Limits(silence_timeout_ms=1000)


class Diary:
    """What one client did and was told."""

    def __init__(self, who: str, seed: int, keys: Sequence[bytes]) -> None:
        self.who = who
        self.rng = random.Random(f"{seed} {who}")
        self.operations: list[Operation] = []
        self.counts: Counter[str] = Counter()
        self._keys = keys
        self._written = 0

    def plan(self) -> tuple[bytes, Put | Get | Delete, bytes, float]:
        """What to do next: key, action, value to put, timeout in seconds."""
        key, timeout_s = self.rng.choice(self._keys), self.rng.choice(TIMEOUTS_S)
        chance = self.rng.random()
        if chance < 0.45:
            return key, Get(), b"", timeout_s
        if chance < 0.55:
            return key, Delete(), b"", timeout_s
        self._written += 1
        value = f"{self.who}-{self._written}".encode()
        if self.rng.random() < LONG_VALUE_CHANCE:
            value += b"." * self.rng.randrange(*LONG_VALUE_BYTES)
        return key, Put(short(value)), value, timeout_s

    def note(
        self, key: bytes, action: Put | Get | Delete, call: float, told: object, error: BaseException | None
    ) -> None:
        """Write down how it ended. Raises an error that should not have come."""
        end = time.monotonic()
        if error is None:
            result = short(told) if isinstance(told, bytes) else told
            self.operations.append(Operation(key, action, result, call, end, self.who))
            self.counts["not found" if isinstance(action, Get) and told is None else "acknowledged"] += 1
        elif isinstance(action, Get) and isinstance(error, (*REFUSALS, asyncio.CancelledError)):
            self.counts["failed"] += 1
        elif isinstance(error, REFUSALS):
            self.counts["refused"] += 1
        elif not isinstance(action, Get) and isinstance(error, (OutcomeUnknown, asyncio.CancelledError)):
            self.operations.append(Operation(key, action, UNKNOWN, call, FOREVER, self.who))
            self.counts["unknown"] += 1
        else:
            raise error


def short(value: bytes) -> str:
    """A value that tells long ones apart without keeping them."""
    if len(value) < 64:
        return value.decode()
    return f"{value[:16].decode()} {len(value)} bytes {hashlib.blake2b(value, digest_size=6).hexdigest()}"


class HotKeys:
    """`threads` threads that share Clients by three, and `tasks` asyncio tasks that share AsyncClients by three."""

    def __init__(self, addresses: Sequence[str], keys: Sequence[bytes], *, seed: int, threads: int, tasks: int) -> None:
        self._addresses = list(addresses)
        self._keys = list(keys)
        self._ending = threading.Event()
        self._diaries_sync = [Diary(f"t{number}", seed, keys) for number in range(threads)]
        self._diaries_async = [Diary(f"a{number}", seed, keys) for number in range(tasks)]
        self._last = Diary("last", seed, keys)
        self._clients: list[Client[bytes]] = [Client(self._addresses) for _ in range(0, threads, 3)]
        work: list[Callable[[], None]] = [
            lambda diary=diary, number=number: self._work(diary, self._clients[number // 3])  # type: ignore[misc]
            for number, diary in enumerate(self._diaries_sync)
        ]
        work.append(lambda: asyncio.run(self._work_async()))
        self._threads = [threading.Thread(target=self._guarded, args=(one,), daemon=True) for one in work]
        self.surprises: list[BaseException] = []

    @property
    def diaries(self) -> list[Diary]:
        return [*self._diaries_sync, *self._diaries_async]

    @property
    def operations(self) -> list[Operation]:
        return [operation for diary in [*self.diaries, self._last] for operation in diary.operations]

    @property
    def counts(self) -> Counter[str]:
        return sum((diary.counts for diary in self.diaries), Counter[str]())

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let calls end; then read every key, so that what was written last counts as well."""
        self._ending.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), "a call did not end within its timeout"
        for client in self._clients:
            client.close()
        with Client(self._addresses, timeout=PATIENCE_S) as db:
            for key in self._keys * 2:
                call = time.monotonic()
                self._last.note(key, Get(), call, db.get(key), None)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self.surprises.append(error)
            raise

    def _work(self, diary: Diary, db: Client[bytes]) -> None:
        while not self._ending.is_set():
            key, action, value, timeout_s = diary.plan()
            told: object = None
            error: BaseException | None = None
            call = time.monotonic()
            try:
                if isinstance(action, Get):
                    told = db.get(key, timeout=timeout_s)
                elif isinstance(action, Delete):
                    told = db.delete(key, timeout=timeout_s)
                else:
                    db.put(key, value, timeout=timeout_s)
            except Exception as caught:  # noqa: BLE001 - `note` raises what it did not expect
                error = caught
            diary.note(key, action, call, told, error)
            time.sleep(diary.rng.random() * PAUSE_MOST_S)

    async def _work_async(self) -> None:
        clients = [AsyncClient(self._addresses, limits=IMPATIENT) for _ in range(0, len(self._diaries_async), 3)]
        async with asyncio.TaskGroup() as tasks:
            for number, diary in enumerate(self._diaries_async):
                tasks.create_task(self._task(diary, clients[number // 3]))
        for client in clients:
            await client.close()

    async def _task(self, diary: Diary, db: AsyncClient[bytes]) -> None:
        while not self._ending.is_set():
            key, action, value, timeout_s = diary.plan()
            asked: Awaitable[object]
            if isinstance(action, Get):
                asked = db.get(key, timeout=timeout_s)
            elif isinstance(action, Delete):
                asked = db.delete(key, timeout=timeout_s)
            else:
                asked = db.put(key, value, timeout=timeout_s)
            cancel_after_s = diary.rng.random() * 0.02 if diary.rng.random() < CANCEL_CHANCE else None
            call = time.monotonic()
            told, error = await _told(asked, cancel_after_s)
            diary.note(key, action, call, told, error)
            await asyncio.sleep(diary.rng.random() * PAUSE_MOST_S)


async def _told(asked: Awaitable[object], cancel_after_s: float | None) -> tuple[object, BaseException | None]:
    """Result and error of a call that is perhaps cancelled."""
    task = asyncio.ensure_future(asked)
    if cancel_after_s is not None:
        asyncio.get_running_loop().call_later(cancel_after_s, task.cancel)
    await asyncio.wait([task])
    if task.cancelled():
        return None, asyncio.CancelledError()
    error = task.exception()
    return (None, error) if error is not None else (task.result(), None)
