"""Many threads, one engine: who waits is woken, a flush gets its turn, an interrupted writer leaves nobody behind."""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

from shardkv.errors import StoreClosed
from shardkv_node.engine import Engine
from shardkv_node.engine.columns import PUT
from shardkv_node.engine.group_commit import GroupCommit
from shardkv_node.engine.write import Write
from tests.node.engine.crash_vfs import CrashVfs
from tests.node.engine.store_driver import open_store
from tests.node.engine.test_engine import GatedVfs


def gated_engine() -> tuple[GatedVfs, Engine]:
    vfs = GatedVfs()
    engine = Engine.open("/data/store", vfs=vfs, workers=0, disk_reserve_bytes=0)
    vfs.open.clear()
    return vfs, engine


def queued(engine: Engine, count: int) -> None:
    """Wait until so many writes are queued behind the one that syncs."""
    while len(engine._commits._queue) < count:
        pass


class Interrupted(Exception):
    """What the test throws into a waiting thread, as Ctrl-C would."""


def test_an_interrupted_waiter_hands_the_lead_to_the_next() -> None:
    vfs, engine = gated_engine()
    seen: list[str] = []

    def put(key: str) -> None:
        try:
            engine.put(key, "v")
            seen.append(key)
        except Interrupted:
            seen.append(f"{key} interrupted")

    threads = {key: threading.Thread(target=put, args=(key,)) for key in ("first", "heir", "next")}
    threads["first"].start()
    assert vfs.waiting.wait(10)
    for count, key in enumerate(("heir", "next"), 1):
        threads[key].start()
        queued(engine, count)
    ident = ctypes.c_ulong(threads["heir"].ident or 0)
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(Interrupted)) == 1
    vfs.open.set()
    for thread in threads.values():
        thread.join(10)
    assert sorted(seen) == ["first", "heir interrupted", "next"]
    assert engine.get("next") == b"v"
    engine.put("after", "v")
    engine.close()


class SteppedVfs(CrashVfs):
    """Once `stepping`, each sync of the log waits for a `go`."""

    def __init__(self) -> None:
        super().__init__()
        self.stepping = False
        self.arrived = threading.Semaphore(0)
        self.go = threading.Semaphore(0)

    def operate(self, what: str, path: str) -> None:
        if self.stepping and what == "sync" and ".wal" in path:
            self.arrived.release()
            assert self.go.acquire(timeout=20)
        super().operate(what, path)


@pytest.fixture
def sigint_interrupts() -> Iterator[None]:
    """Also where the test run was started with SIGINT ignored, as a shell does in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("sigint_interrupts")
@pytest.mark.parametrize("interrupted", ["none", "before its gate opens", "as its gate opens"])
def test_a_waiter_wakes_the_next_of_its_group_even_when_it_is_interrupted(interrupted: str) -> None:
    vfs = SteppedVfs()
    engine = Engine.open("/data/store", vfs=vfs, workers=0, disk_reserve_bytes=0)
    vfs.stepping = True
    ended: list[str] = []

    def put(key: str) -> None:
        engine.put(key, "v")
        ended.append(key)

    def rest() -> None:
        """Runs beside the main thread, whose put is the third of the second group."""
        for count, thread in enumerate(threads[3:], 3):
            queued(engine, count)
            thread.start()
        queued(engine, 5)
        vfs.go.release()
        assert vfs.arrived.acquire(timeout=20)
        main = threading.main_thread().ident or 0
        if interrupted == "before its gate opens":
            signal.pthread_kill(main, signal.SIGINT)
            assert left.wait(20)
        elif interrupted == "as its gate opens":
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(main), ctypes.py_object(Interrupted))
        vfs.stepping = False
        vfs.go.release()

    left = threading.Event()
    threads = [threading.Thread(target=put, args=(f"k{n}",)) for n in range(5)]
    threads[0].start()
    assert vfs.arrived.acquire(timeout=20)
    for count, thread in enumerate(threads[1:3], 1):
        thread.start()
        queued(engine, count)
    helper = threading.Thread(target=rest)
    helper.start()
    try:
        engine.put("main", "v")
        assert interrupted == "none"
    except (KeyboardInterrupt, Interrupted):
        assert interrupted != "none"
    left.set()
    for thread in (*threads, helper):
        thread.join(20)
        assert not thread.is_alive()
    assert sorted(ended) == [f"k{n}" for n in range(5)]
    assert engine.get("main") == b"v"
    engine.close()


class HoldingMutex:
    """A mutex. The thread `late` stands still after it let go of it for the first time, until `go`."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.late: threading.Thread | None = None
        self.stands, self.go = threading.Event(), threading.Event()
        self.acquire, self.release = self.lock.acquire, self.lock.release

    def __enter__(self) -> None:
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()
        if threading.current_thread() is self.late:
            self.stands.set()
            assert self.go.wait(10)


def test_a_waiter_that_sees_its_write_applied_before_it_is_woken_still_wakes_the_next() -> None:
    mutex = HoldingMutex()
    store = open_store(CrashVfs())
    tablet = store.create_tablet(b"t")
    lock = cast(threading.RLock, mutex)
    commits = GroupCommit(store, tablet, lock, threading.Condition(lock))

    def put(key: bytes, done: Callable[[Write], None] | None = None) -> threading.Thread:
        write = Write(tablet, [key], PUT, [b"v"], done=done)
        thread = threading.Thread(target=commits.submit, args=(write,), daemon=True)
        mutex.late = mutex.late or (thread if key == b"late" else None)
        count = len(commits._queue)
        thread.start()
        while len(commits._queue) == count:
            pass
        return thread

    def let_go(_: Write) -> None:  # all writes of the group are applied, and nobody is woken yet
        mutex.go.set()
        late.join(0.2)

    with mutex.lock:
        commits._pauses += 1  # so that all three come into one group, which `first` leads
    first, late = put(b"first"), put(b"late")
    assert mutex.stands.wait(10)
    behind = put(b"behind", let_go)
    with mutex.lock:
        commits._pauses -= 1
        commits._pass_on()
    for thread in (first, late, behind):
        thread.join(10)
        assert not thread.is_alive()


def test_a_flush_waits_for_the_group_under_way_and_writers_go_on_after_it() -> None:
    vfs, engine = gated_engine()
    writers = [threading.Thread(target=engine.put, args=(f"k{n}", "v")) for n in range(4)]
    writers[0].start()
    assert vfs.waiting.wait(10)
    flusher = threading.Thread(target=engine.flush)
    flusher.start()
    for writer in writers[1:]:
        writer.start()
    queued(engine, 3)
    flusher.join(0.05)
    assert flusher.is_alive()
    vfs.open.set()
    for thread in (*writers, flusher):
        thread.join(10)
        assert not thread.is_alive()
    assert engine.stats()["flushes"] == 1
    assert list(engine.scan(keys_only=True)) == [b"k0", b"k1", b"k2", b"k3"]
    engine.close()


def test_writers_behind_a_close_are_all_refused() -> None:
    vfs, engine = gated_engine()
    refused: list[str] = []

    def put(key: str) -> None:
        try:
            engine.put(key, "v")
        except StoreClosed:
            refused.append(key)

    writers = [threading.Thread(target=put, args=(f"k{n}",)) for n in range(4)]
    writers[0].start()
    assert vfs.waiting.wait(10)
    for writer in writers[1:]:
        writer.start()
    queued(engine, 3)
    closer = threading.Thread(target=engine.close)
    closer.start()
    closer.join(0.05)
    vfs.open.set()
    for thread in (*writers, closer):
        thread.join(10)
        assert not thread.is_alive()
    assert sorted(refused) == ["k1", "k2", "k3"]


@pytest.mark.parametrize("durability", ["always", "os"])
def test_flushes_and_compactions_get_through_among_busy_writers(tmp_path: Path, durability: str) -> None:
    engine = Engine.open(tmp_path, durability=durability, workers=0)
    over = threading.Event()
    counts = [0] * 8

    def work(number: int) -> None:
        while not over.is_set():
            engine.put(b"%d-%06d" % (number, counts[number]), b"v" * 50)
            counts[number] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        engine.flush()
    engine.compact()
    over.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert sum(1 for _ in engine.scan(keys_only=True)) == sum(counts)
    engine.close()
