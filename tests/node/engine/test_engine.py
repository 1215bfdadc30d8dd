"""The embedded engine as its users meet it: on a real disk, from many threads, across fork, kill and restart."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from shardkv import WriteBatch
from shardkv.errors import (
    ConfigError,
    InvalidArgument,
    InvalidKey,
    InvalidRange,
    KeyTooLarge,
    StorageError,
    StoreClosed,
    StoreLocked,
    ValueTooLarge,
)
from shardkv_node.engine import Engine
from shardkv_node.engine.arguments import prefix_end
from tests.node.engine.crash_vfs import CrashVfs


def test_put_get_delete_batch_and_scan_survive_a_restart(tmp_path: Path) -> None:
    with Engine.open(tmp_path / "data") as engine:
        engine.put("user:1", "Alice")
        engine.put(b"user:2", bytearray(b"Bob"))
        engine.put("empty", "")
        assert engine.delete("user:2") is True and engine.delete("user:2") is False
        batch = WriteBatch()
        batch.put("user:3", "Carol")
        batch.put("user:3", "Caroline")
        batch.delete("user:1")
        batch.put("user:4", "Dave")
        engine.write(batch)
        engine.write(WriteBatch())
        engine.put_many({"a": "1", "b": "2"})
    with Engine.open(str(tmp_path / "data")) as engine:
        assert engine.get("user:1") is None and engine.get("empty") == b""
        assert engine.get_many(["b", "nope", "a"]) == [b"2", None, b"1"]
        assert list(engine.scan(prefix="user:")) == [(b"user:3", b"Caroline"), (b"user:4", b"Dave")]
        assert list(engine.scan(prefix="user:", reverse=True, limit=1, keys_only=True)) == [b"user:4"]
        assert list(engine.scan("a", "b")) == [(b"a", b"1")]
        assert list(engine.scan("b", "user:4", limit=0)) == []
        assert engine.recovery.torn_tails == [] and not engine.recovery.created


def a_batch() -> WriteBatch:
    batch = WriteBatch()
    batch.put("a", "b")
    return batch


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda e: e.put("", "v"), InvalidKey, "empty"),
        (lambda e: e.get(""), InvalidKey, "empty"),
        (lambda e: e.put("k" * 65_537, "v"), KeyTooLarge, "65537 bytes long; the limit is 65536"),
        (lambda e: e.put("k", b"v" * (16 * 2**20 + 1)), ValueTooLarge, "limit is 16777216"),
        (lambda e: e.put(5, "v"), InvalidArgument, "key must be str or bytes, not int"),
        (lambda e: e.put("k", None), InvalidArgument, "value must be str or bytes, not NoneType"),
        (lambda e: e.put("\ud800", "v"), InvalidArgument, "not valid text"),
        (lambda e: e.put_many({"ok": "1", "": "2"}), InvalidKey, "empty"),
        (lambda e: e.write([("a", "b")]), InvalidArgument, "WriteBatch"),
        (lambda e: e.put_many([1]), InvalidArgument, "Pairs of key and value are expected, not 1"),
        (lambda e: e.put_many([("a",)]), InvalidArgument, "not \\('a',\\)"),
        (lambda e: e.put_many(None), InvalidArgument, "not NoneType"),
        (lambda e: e.get_many(None), InvalidArgument, "not NoneType"),
        (lambda e: e.write(a_batch(), if_versions=["a"]), InvalidArgument, "if_versions is a dict"),
        (lambda e: Engine.open(5), InvalidArgument, "not int"),
        (lambda e: Engine.open(""), InvalidArgument, "not empty"),
        (lambda e: Engine.open("a\0b"), InvalidArgument, "NUL"),
        (lambda e: Engine.open(__file__), StorageError, "test_engine.py"),
        (lambda e: e.scan("b", "a"), InvalidRange, "stops at b'a', before it starts at b'b'"),
        (lambda e: e.scan(limit=-1), InvalidArgument, "limit"),
    ],
)
def test_bad_input_is_one_clear_sentence_and_changes_nothing(tmp_path, call, error, words) -> None:  # type: ignore[no-untyped-def]
    with Engine.open(tmp_path, workers=0) as engine:
        engine.put("kept", "1")
        with pytest.raises(error, match=words):
            call(engine)
        assert list(engine.scan()) == [(b"kept", b"1")]
        engine.put("k" * 65_536, "longest")


def test_wrong_options_a_second_open_and_use_after_close_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="memtabel_bytes: there is no such option"):
        Engine.open(tmp_path, memtabel_bytes=1)
    with pytest.raises(ConfigError, match="durability"):
        Engine.open(tmp_path, durability="sometimes")
    with pytest.raises(ConfigError, match="filter_bits_per_key = 2147483648: must be at most 64"):
        Engine.open(tmp_path, filter_bits_per_key=1 << 31)
    with pytest.raises(ConfigError, match="block_bytes = 18446744073709551616: must be at most 67108864"):
        Engine.open(tmp_path, block_bytes=1 << 64)
    with pytest.raises(ConfigError, match="memtable_bytes_max = 9223372036854775808: must be at most"):
        Engine.open(tmp_path, memtable_bytes_max=1 << 63)
    engine = Engine.open(tmp_path)
    engine.put("k", "v")
    with pytest.raises(StoreLocked, match=f"in use by process {os.getpid()}"):
        Engine.open(tmp_path)
    pages = engine.scan()
    engine.close()
    engine.close()
    for call in (
        lambda: engine.get("k"),
        lambda: engine.put("k", "v"),
        engine.flush,
        engine.stats,
        lambda: next(pages),
    ):
        with pytest.raises(StoreClosed, match="is closed"):
            call()
    Engine.open(tmp_path).close()


def test_sixteen_threads_share_one_engine(tmp_path: Path) -> None:
    threads, rounds = 16, 60
    problems: list[str] = []
    with Engine.open(tmp_path, memtable_bytes_max=64 * 1024, l0_compaction_trigger=2) as engine:

        def work(number: int) -> None:
            for n in range(rounds):
                key = b"%02d:%03d" % (number, n)
                batch = WriteBatch()
                batch.put(key, b"v" * 100)
                batch.put(b"shared", b"%d" % number)
                engine.write(batch)
                if engine.get(key) != b"v" * 100:
                    problems.append(f"{key!r} was not there after its write")
                if n % 5 == 0 and not engine.delete(key):
                    problems.append(f"{key!r} was not there to delete")
                if n % 20 == 0:
                    mine = list(engine.scan(prefix=b"%02d:" % number, keys_only=True))
                    if len(mine) != n + 1 - (n // 5 + 1):
                        problems.append(f"thread {number} sees {len(mine)} of its keys in round {n}")

        running = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        for thread in running:
            thread.start()
        engine.flush()
        for thread in running:
            thread.join()
        assert problems == []
        keys = list(engine.scan(keys_only=True))
        stats = engine.stats()
    assert len(keys) == threads * (rounds - rounds // 5) + 1
    assert stats["writes"] == threads * (rounds + rounds // 5)
    with Engine.open(tmp_path) as engine:
        assert list(engine.scan(keys_only=True)) == keys


def test_writers_that_wait_are_told_when_the_engine_is_closed(tmp_path: Path) -> None:
    engine = Engine.open(tmp_path)
    ends: list[str] = []

    def work() -> None:
        number = 0
        try:
            while True:
                engine.put(b"%s%d" % (threading.current_thread().name.encode(), number), b"v")
                number += 1
        except StoreClosed:
            ends.append(f"{threading.current_thread().name} {number}")

    running = [threading.Thread(target=work, name=f"t{n}-") for n in range(8)]
    for thread in running:
        thread.start()
    while engine.stats()["writes"] < 50:
        pass
    engine.close()
    for thread in running:
        thread.join(10)
    assert len(ends) == 8
    with Engine.open(tmp_path) as engine:
        for end in ends:
            name, acked = end.split()
            assert len(list(engine.scan(prefix=name, keys_only=True))) == int(acked)


class GatedVfs(CrashVfs):
    """The first sync of the log after the gate was shut waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.open = threading.Event()
        self.open.set()
        self.waiting = threading.Event()

    def operate(self, what: str, path: str) -> None:
        if what == "sync" and ".wal" in path and not self.open.is_set() and not self.waiting.is_set():
            self.waiting.set()
            self.open.wait(20)
        super().operate(what, path)


def test_reads_go_on_during_a_sync_and_close_waits_for_it() -> None:
    vfs = GatedVfs()
    engine = Engine.open("/data/store", vfs=vfs, workers=0, disk_reserve_bytes=0)
    engine.put("before", "1")
    vfs.open.clear()
    writer = threading.Thread(target=engine.put, args=("during", "2"))
    writer.start()
    assert vfs.waiting.wait(10)
    assert engine.get("before") == b"1" and engine.get("during") is None
    closer = threading.Thread(target=engine.close)
    closer.start()
    closer.join(0.05)
    assert closer.is_alive() and writer.is_alive()
    vfs.open.set()
    closer.join(10)
    writer.join(10)
    assert not closer.is_alive()
    with Engine.open("/data/store", vfs=vfs.crash(), workers=0, disk_reserve_bytes=0) as engine:
        assert engine.get_many(["before", "during"]) == [b"1", b"2"]


def test_a_forked_child_is_refused_and_does_not_harm_the_parent(tmp_path: Path) -> None:
    engine = Engine.open(tmp_path, workers=0)
    engine.put("k", "v")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            engine.put("k", "from the child")
        except StoreClosed as error:
            code = 0 if "forked child" in str(error) else 2
        engine.close()
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with pytest.raises(StoreLocked):
        Engine.open(tmp_path)
    engine.put("k2", "v")
    engine.close()
    with Engine.open(tmp_path) as engine:
        assert list(engine.scan(keys_only=True)) == [b"k", b"k2"]


def test_data_ten_times_the_memtable_and_larger_than_the_cache_reads_back_after_restart(tmp_path: Path) -> None:
    chance = random.Random(5)
    options = {
        "memtable_bytes_max": 256 * 1024,
        "block_cache_bytes": 512 * 1024,
        "durability": "os",
        "disk_reserve_bytes": 0,
    }
    model: dict[bytes, bytes] = {}
    with Engine.open(tmp_path, l0_compaction_trigger=3, level1_bytes_max=512 * 1024, **options) as engine:
        for _ in range(100):
            items = {b"key%06d" % chance.randrange(60_000): chance.randbytes(100) for _ in range(300)}
            engine.put_many(items)
            model.update(items)
            gone = chance.choice(list(items))
            assert engine.delete(gone)
            del model[gone]
        assert engine.stats()["flushes"] >= 5
    with Engine.open(tmp_path, **options) as engine:
        expected = sorted(model.items())
        assert list(engine.scan()) == expected
        assert list(engine.scan(reverse=True)) == expected[::-1]
        sample = chance.sample(sorted(model), 500)
        assert engine.get_many(sample) == [model[key] for key in sample]
        engine.compact()
        stats = engine.stats()
        assert stats["level0_tables"] == 0 and stats["cache_bytes"] <= 512 * 1024
        assert (
            list(engine.scan(b"key02", b"key04", limit=1000))
            == [row for row in expected if b"key02" <= row[0] < b"key04"][:1000]
        )


def test_an_engine_in_interval_mode_syncs_without_further_writes(tmp_path: Path) -> None:
    with Engine.open(tmp_path, durability="interval", sync_interval_ms=5) as engine:
        engine.put("k", "v")
        log = engine._store._log
        done = threading.Event()
        while log.needs_sync and not done.wait(0.001):
            pass
        assert not log.needs_sync


@pytest.mark.parametrize(
    ("prefix", "end"), [(b"a", b"b"), (b"a\xff", b"b"), (b"\xff\xff", None), (b"", None), (b"ab\xfe", b"ab\xff")]
)
def test_a_prefix_ends_where_the_next_one_begins(prefix: bytes, end: bytes | None) -> None:
    assert prefix_end(prefix) == end


def test_an_open_that_failed_anywhere_lets_go_of_the_lock() -> None:
    def try_to_open(vfs: CrashVfs) -> bool:
        try:
            Engine.open("/data/store", vfs=vfs, workers=0, disk_reserve_bytes=0).close()
        except StorageError:
            return False
        return True

    whole = CrashVfs()
    engine = Engine.open("/data/store", vfs=whole, workers=0, disk_reserve_bytes=0)
    operations, failed = whole.operations, 0
    engine.close()
    for n in range(1, operations + 1):
        vfs = CrashVfs()
        vfs.fail_at(n)
        failed += not try_to_open(vfs)
        assert try_to_open(vfs), n  # StoreLocked is a StorageError
    assert failed > 40


@pytest.mark.parametrize("durability", ["always", "interval", "os"])
def test_a_closed_engine_holds_no_descriptor(tmp_path: Path, durability: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with Engine.open(tmp_path, durability=durability, sync_interval_ms=60_000, workers=0) as engine:
        engine.put("a", "1")
        engine.flush()  # in the interval mode the first segment still waits for its sync
        engine.put("b", "2")
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_a_read_beside_a_close_finds_is_not_found_after_it(tmp_path: Path) -> None:
    engine = Engine.open(tmp_path, workers=0)
    engine.put(b"k", b"v")
    engine.flush()
    check, stop = engine._check_usable, engine._store.stop_background
    begun, closing = threading.Event(), threading.Event()

    def check_and_stand() -> None:
        check()
        begun.set()
        assert closing.wait(10)

    def let_read_and_stop() -> None:
        closing.set()
        reader.join(10)
        stop()

    reader = threading.Thread(target=engine.get, args=(b"k",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_check_usable", check_and_stand)
        patch.setattr(engine._store, "stop_background", let_read_and_stop)
        reader.start()
        assert begun.wait(10)
        engine.close()
    with pytest.raises(StoreClosed):
        engine.get(b"k")


def test_a_forked_child_keeps_nobody_out(tmp_path: Path) -> None:
    reader, writer = os.pipe()

    def live_on(engine: Engine) -> int:
        child = os.fork()
        if not child:
            os.close(writer)
            os.read(reader, 1)  # until the test has ended
            os._exit(0)
        with pytest.raises(StoreLocked):
            Engine.open(tmp_path)  # it is still the parent's
        return child

    engine = Engine.open(tmp_path, workers=0)
    child = live_on(engine)
    engine.close()
    Engine.open(tmp_path, workers=0).close()
    os.close(writer)
    os.close(reader)
    assert os.waitpid(child, 0)[1] == 0


OWNER_WITH_A_CHILD = """
import os, sys
from shardkv_node.engine import Engine
engine = Engine.open(sys.argv[1], workers=0)
if os.fork():
    print("held", flush=True)
    os.kill(os.getpid(), 9)
sys.stdin.read()
"""


def test_a_forked_child_of_an_owner_that_was_killed_keeps_nobody_out(tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER_WITH_A_CHILD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert owner.stdin is not None and owner.stdout is not None
    assert owner.stdout.readline() == b"held\n" and owner.wait(20) < 0
    Engine.open(tmp_path, workers=0).close()
    owner.stdin.close()
    owner.stdout.close()


def test_a_flush_does_not_wait_for_a_sync_that_is_set_for_later(tmp_path: Path) -> None:
    with Engine.open(tmp_path, durability="interval", sync_interval_ms=60_000, workers=0) as engine:
        engine.put_many({f"{number:06}": "v" * 1000 for number in range(3000)})
        began = time.monotonic()
        engine.flush()
        assert time.monotonic() - began < 30
        assert engine.stats()["memtable_rows"] == 0
