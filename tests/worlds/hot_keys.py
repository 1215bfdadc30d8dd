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
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from shardkv import AsyncClient, Client
from shardkv.errors import ConditionFailed, DeadlineExceeded, OutcomeUnknown, UnavailableError
from shardkv.limits import Limits
from tests.worlds.linearizability import FOREVER, UNKNOWN, Delete, DeleteIf, Get, Operation, Put, PutIf

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


Action = Put | Get | Delete | PutIf | DeleteIf


@dataclass(frozen=True, slots=True)
class Step:
    """What to do next. `value`: to be put; `if_version`: the condition of a conditional write, 0: absent."""

    key: bytes
    action: Action
    timeout_s: float
    value: bytes = b""
    if_version: int | None = None


@dataclass(frozen=True, slots=True)
class Version:
    """That `key` held `value` as version `number` at some time between `call` and `end`."""

    key: bytes
    value: str
    number: int
    call: float
    end: float


class Diary:
    """What one client did and was told."""

    def __init__(self, who: str, seed: int, keys: Sequence[bytes]) -> None:
        self.who = who
        self.rng = random.Random(f"{seed} {who}")
        self.operations: list[Operation] = []
        self.versions: list[Version] = []
        self.counts: Counter[str] = Counter()
        self._keys = keys
        self._written = 0
        self._latest: dict[bytes, Version] = {}
        """What this client saw last of each key."""

    def plan(self) -> Step:
        key, timeout_s = self.rng.choice(self._keys), self.rng.choice(TIMEOUTS_S)
        chance, seen = self.rng.random(), self._latest.get(key)
        if chance < 0.45:
            return Step(key, Get(), timeout_s)
        if chance < 0.52:
            return Step(key, Delete(), timeout_s)
        if chance < 0.55 and seen is not None:
            return Step(key, DeleteIf(seen.value), timeout_s, if_version=seen.number)
        self._written += 1
        value = f"{self.who}-{self._written}".encode()
        if self.rng.random() < LONG_VALUE_CHANCE:
            value += b"." * self.rng.randrange(*LONG_VALUE_BYTES)
        if chance < 0.7:
            action = PutIf(short(value), seen.value if seen is not None else None)
            return Step(key, action, timeout_s, value, seen.number if seen is not None else 0)
        return Step(key, Put(short(value)), timeout_s, value)

    def note(self, step: Step, call: float, told: object, error: BaseException | None) -> None:
        """Write down how it ended. Raises an error that should not have come."""
        end = time.monotonic()
        write = not isinstance(step.action, Get)
        if error is None:
            self._note_answer(step, call, end, told)
        elif isinstance(error, ConditionFailed) and step.if_version is not None:
            assert error.detail["found"] != step.if_version, error
            self.operations.append(Operation(step.key, step.action, False, call, end, self.who))
            self.counts["compared"] += 1
        elif isinstance(error, REFUSALS) or (not write and isinstance(error, asyncio.CancelledError)):
            self.counts["refused" if write else "failed"] += 1
        elif write and isinstance(error, (OutcomeUnknown, asyncio.CancelledError)):
            self.operations.append(Operation(step.key, step.action, UNKNOWN, call, FOREVER, self.who))
            self.counts["unknown"] += 1
        else:
            raise error

    def _note_answer(self, step: Step, call: float, end: float, told: object) -> None:
        """`told`: (value, version) or None for a read, the version for a put, whether it existed for a delete."""
        result: object = told
        if isinstance(step.action, Put | PutIf):
            assert isinstance(told, int)
            result = True
            self._saw(Version(step.key, short(step.value), told, call, end))
        elif isinstance(told, tuple):
            result = short(told[0])
            self._saw(Version(step.key, short(told[0]), told[1], call, end))
        else:
            self._latest.pop(step.key, None)
        self.operations.append(Operation(step.key, step.action, result, call, end, self.who))
        self.counts["not found" if told is None else "acknowledged"] += 1

    def _saw(self, version: Version) -> None:
        self.versions.append(version)
        self._latest[version.key] = version


def check_versions(versions: Iterable[Version]) -> None:
    """A value has one version and a version one value; and what was seen later never has a lower one."""
    by_key: dict[bytes, list[Version]] = defaultdict(list)
    for version in versions:
        by_key[version.key].append(version)
    for found in by_key.values():
        number_of = {version.value: version.number for version in found}
        for version in found:
            assert number_of[version.value] == version.number, f"a value has two versions: {version}"
        assert len(set(number_of.values())) == len(number_of), f"two values have one version: {number_of}"
        times = [(version.call, 0, version) for version in found] + [(version.end, 1, version) for version in found]
        newest = 0
        for _, has_ended, version in sorted(times, key=lambda time: time[:2]):
            if has_ended:
                newest = max(newest, version.number)
            assert newest <= version.number or has_ended, f"{newest} had been seen before this was asked for: {version}"


def short(value: bytes) -> str:
    """A value that tells long ones apart without keeping them."""
    if len(value) < 64:
        return value.decode()
    return f"{value[:16].decode()} {len(value)} bytes {hashlib.blake2b(value, digest_size=6).hexdigest()}"


class HotKeys:
    """`threads` threads that share Clients by three, and `tasks` asyncio tasks that share AsyncClients by three.

    Every other client sends no write again, and so has more outcomes that stay unknown.
    """

    def __init__(self, addresses: Sequence[str], keys: Sequence[bytes], *, seed: int, threads: int, tasks: int) -> None:
        self._addresses = list(addresses)
        self._keys = list(keys)
        self._ending = threading.Event()
        self._diaries_sync = [Diary(f"t{number}", seed, keys) for number in range(threads)]
        self._diaries_async = [Diary(f"a{number}", seed, keys) for number in range(tasks)]
        self._last = Diary("last", seed, keys)
        self._clients: list[Client[bytes]] = [
            Client(self._addresses, retry_writes=number % 2 == 0, direct=_is_direct(number))
            for number in range(0, threads, 3)
        ]
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
    def versions(self) -> list[Version]:
        return [version for diary in [*self.diaries, self._last] for version in diary.versions]

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
                step, call = Step(key, Get(), PATIENCE_S), time.monotonic()
                self._last.note(step, call, _ask(db, step), None)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self.surprises.append(error)
            raise

    def _work(self, diary: Diary, db: Client[bytes]) -> None:
        while not self._ending.is_set():
            step = diary.plan()
            told: object = None
            error: BaseException | None = None
            call = time.monotonic()
            try:
                told = _ask(db, step)
            except Exception as caught:  # noqa: BLE001 - `note` raises what it did not expect
                error = caught
            diary.note(step, call, told, error)
            time.sleep(diary.rng.random() * PAUSE_MOST_S)

    async def _work_async(self) -> None:
        clients = [
            AsyncClient(self._addresses, limits=IMPATIENT, retry_writes=number % 2 == 0, direct=_is_direct(number))
            for number in range(0, len(self._diaries_async), 3)
        ]
        async with asyncio.TaskGroup() as tasks:
            for number, diary in enumerate(self._diaries_async):
                tasks.create_task(self._task(diary, clients[number // 3]))
        for client in clients:
            await client.close()

    async def _task(self, diary: Diary, db: AsyncClient[bytes]) -> None:
        while not self._ending.is_set():
            step = diary.plan()
            cancel_after_s = diary.rng.random() * 0.02 if diary.rng.random() < CANCEL_CHANCE else None
            call = time.monotonic()
            told, error = await _told(_ask(db, step), cancel_after_s)
            diary.note(step, call, told, error)
            await asyncio.sleep(diary.rng.random() * PAUSE_MOST_S)


def _is_direct(number: int) -> bool:
    """Half of the clients ask nodes by themselves: what they are told must agree with what goes through routers."""
    return number // 6 % 2 == 1


def _ask(db: Client[bytes] | AsyncClient[bytes], step: Step) -> Any:
    """What the client returns: an answer, or something to await."""
    match step.action:
        case Get():
            return db.get(step.key, with_version=True, timeout=step.timeout_s)
        case Delete() | DeleteIf():
            return db.delete(step.key, if_version=step.if_version, timeout=step.timeout_s)
    if step.if_version == 0:
        return db.put(step.key, step.value, if_absent=True, timeout=step.timeout_s)
    return db.put(step.key, step.value, if_version=step.if_version, timeout=step.timeout_s)


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
