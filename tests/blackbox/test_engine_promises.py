"""What the docstrings of `Engine` promise, tried from outside: against a dict, under threads, and past a fork."""

import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from shardkv import ConditionFailed, ShardKVError, StoreClosed, WriteBatch
from shardkv_node.engine import Engine

ACCOUNTS = [b"account:%02d" % number for number in range(20)]
TINY: dict[str, Any] = {
    "memtable_bytes_max": 16_384,
    "table_bytes_max": 16_384,
    "level1_bytes_max": 65_536,
    "l0_compaction_trigger": 2,
    "block_bytes": 512,
    "block_cache_bytes": 0,
    "durability": "os",
}


def random_key(chance: random.Random) -> bytes:
    """Mostly one of a few hundred names; else zero bytes, 0xff and other keys at the edges of every order."""
    shape = chance.randrange(5)
    if shape < 3:
        return b"key:%03d" % chance.randrange(300)
    if shape == 3:
        return bytes([chance.choice([0, 255])]) * chance.randrange(1, 4)
    return b"key:%03d" % chance.randrange(300) + b"\0"


@pytest.mark.parametrize("options", [{"workers": 0}, {"workers": 1, "filter_bits_per_key": 0}], ids=str)
def test_the_engine_is_an_ordered_dict_through_flushes_compactions_and_restarts(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    chance = random.Random(7)
    model: dict[bytes, bytes] = {}
    engine = Engine.open(tmp_path / "store", **TINY, **options)
    for step in range(1, 2_001):
        key = random_key(chance)
        match chance.randrange(10):
            case 0 | 1 | 2 | 3 | 4:
                model[key] = chance.randbytes(chance.randrange(60))
                engine.put(key, model[key])
            case 5 | 6:
                assert engine.delete(key) == (model.pop(key, None) is not None)
            case 7:
                batch = WriteBatch()
                for _ in range(20):
                    key = random_key(chance)
                    model[key] = b"batch %d" % step
                    batch.put(key, model[key])
                engine.write(batch)
            case _:
                assert engine.get(key) == model.get(key)
        if step % 500 == 0:
            low, high = sorted([random_key(chance), random_key(chance)])
            inside = sorted((key, value) for key, value in model.items() if low <= key < high)
            assert list(engine.scan(low, high)) == inside
            assert list(engine.scan(low, high, reverse=True, limit=5)) == inside[::-1][:5]
            assert engine.count(low, high) == len(inside)
            assert list(engine.scan()) == sorted(model.items())
        if step % 1_000 == 0:
            engine.compact()
            engine.close()
            engine = Engine.open(tmp_path / "store", **TINY, **options)
    with engine:
        assert list(engine.scan()) == sorted(model.items())


def test_snapshots_show_one_moment_while_threads_move_money(tmp_path: Path) -> None:
    def move_money(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(150):
            source, target = chance.sample(ACCOUNTS, 2)
            (taken, taken_version), (given, given_version) = read(source), read(target)
            batch = WriteBatch()
            batch.put(source, b"%d" % (taken - 1) + b" " * 200)
            batch.put(target, b"%d" % (given + 1) + b" " * 200)
            try:
                engine.write(batch, if_versions={source: taken_version, target: given_version})
            except ConditionFailed:
                continue

    def read(account: bytes) -> tuple[int, int]:
        found = engine.get_versioned(account)
        assert found is not None
        return int(found[0]), found[1]

    def look() -> None:
        while not all(mover.done() for mover in movers):
            with engine.snapshot() as moment:
                there = list(moment.scan(prefix="account:"))
                assert there == list(moment.scan(prefix="account:", reverse=True))[::-1]
                assert sum(int(value) for _, value in there) == 100 * len(ACCOUNTS)
            values = [value for value in engine.get_many(ACCOUNTS) if value is not None]
            assert sum(map(int, values)) == 100 * len(ACCOUNTS)
            engine.flush()

    with Engine.open(tmp_path / "store", **TINY) as engine:
        engine.put_many([(account, b"100") for account in ACCOUNTS])
        with ThreadPoolExecutor(6) as pool:
            movers = [pool.submit(move_money, seed) for seed in range(6)]
            look()
        for mover in movers:
            mover.result()


def test_close_ends_the_work_of_other_threads_and_keeps_what_was_acknowledged(tmp_path: Path) -> None:
    engine = Engine.open(tmp_path / "store", **TINY)
    acknowledged = [0] * 4
    ends: list[str] = []
    some = threading.Barrier(6)

    def write(number: int) -> None:
        try:
            for count in range(1_000_000):
                engine.put(b"%d:%d" % (number, count), b"x" * 200)
                acknowledged[number] = count + 1
                if count == 50:
                    some.wait()
        except ShardKVError as error:
            ends.append(type(error).__name__)

    def scan() -> None:
        some.wait()
        try:
            while True:
                list(engine.scan())
        except ShardKVError as error:
            ends.append(type(error).__name__)

    threads = [threading.Thread(target=write, args=[number]) for number in range(4)]
    threads.append(threading.Thread(target=scan))
    for thread in threads:
        thread.start()
    some.wait()
    engine.close()
    for thread in threads:
        thread.join()
    assert ends == [StoreClosed.__name__] * 5
    with Engine.open(tmp_path / "store", **TINY) as again:
        for number, count in enumerate(acknowledged):
            assert None not in again.get_many([b"%d:%d" % (number, one) for one in range(count)])


def test_a_forked_child_is_refused_and_leaves_the_store_of_its_parent_alone(tmp_path: Path) -> None:
    with Engine.open(tmp_path / "store", **TINY) as engine:
        engine.put("key", "parent")
        child = os.fork()
        if child == 0:
            try:
                engine.put("key", "child")
            except StoreClosed:
                engine.close()
                os._exit(0)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        engine.put("other", "x" * 40_000)
        engine.flush()
        assert engine.get("key") == b"parent"
    with Engine.open(tmp_path / "store", **TINY) as again:
        assert list(again.scan(keys_only=True)) == [b"key", b"other"]
