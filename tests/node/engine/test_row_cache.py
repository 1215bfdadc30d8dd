"""The row cache: it answers what the tables would, at every turn of a key's life, inside the block cache's bound."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from shardkv.errors import StoreClosed
from shardkv.write_batch import WriteBatch
from shardkv_node.engine import Engine
from shardkv_node.engine.block_cache import BlockCache
from shardkv_node.engine.row_cache import ROW_OVERHEAD_BYTES, SHARE, RowCaches
from tests.node.engine.crash_vfs import CrashVfs


def open_engine(vfs: CrashVfs, **options: int | str) -> Engine:
    return Engine.open("/data/store", vfs=vfs, workers=0, disk_reserve_bytes=0, **options)


@pytest.mark.parametrize("many", [False, True])
def test_a_cached_row_never_outlives_what_a_flush_or_compaction_put_in_its_place(many: bool) -> None:
    engine = open_engine(CrashVfs())

    def read(key: str) -> bytes | None:
        return engine.get_many(["none", key])[1] if many else engine.get(key)

    engine.put_many({"a": "1", "b": "1", "gone": "1"})
    engine.flush()
    for _ in range(2):
        assert (read("a"), read("b"), read("gone")) == (b"1", b"1", b"1")
    engine.put("a", "2")
    engine.delete("gone")
    assert (read("a"), read("b"), read("gone")) == (b"2", b"1", None)
    engine.flush()
    for _ in range(2):
        assert (read("a"), read("b"), read("gone")) == (b"2", b"1", None)
    engine.compact()
    for _ in range(2):
        assert (read("a"), read("b"), read("gone")) == (b"2", b"1", None)
    engine.close()


@pytest.mark.parametrize("durability", ["always", "os"])
def test_random_writes_and_reads_under_a_small_cache_agree_with_a_dict(durability: str) -> None:
    engine = open_engine(CrashVfs(), block_cache_bytes=40_000, memtable_bytes_max=20_000, durability=durability)
    rng = random.Random(5)
    model: dict[bytes, bytes] = {}
    keys = [b"%04d" % n for n in range(300)]
    for turn in range(4000):
        key = rng.choice(keys)
        if rng.random() < 0.3:
            model[key] = rng.randbytes(rng.randrange(60))
            engine.put(key, model[key])
        elif rng.random() < 0.05:
            model.pop(key, None)
            engine.delete(key)
        else:
            wanted = [key, *rng.choices(keys, k=3)]
            assert engine.get_many(wanted) == list(map(model.get, wanted))
            assert engine.get(key) == model.get(key)
        if turn % 20 == 0:  # not more often: it ends quick puts
            assert engine.stats()["cache_bytes"] <= 40_000
    assert engine.stats()["flushes"] > 5
    engine.close()


def test_random_writes_scans_and_reads_agree_with_a_dict_whatever_a_scan_kept() -> None:
    """Over several tables, so that scans keep merged rows and gets find theirs in them."""
    engine = open_engine(CrashVfs(), block_cache_bytes=200_000, memtable_bytes_max=20_000, block_bytes=128)
    rng = random.Random(6)
    model: dict[bytes, bytes] = {}
    keys = [b"%04d" % n for n in range(600)]
    for turn in range(3000):
        key = rng.choice(keys)
        kind = rng.random()
        if kind < 0.3:
            model[key] = rng.randbytes(rng.randrange(60))
            engine.put(key, model[key])
        elif kind < 0.4:
            model.pop(key, None)
            engine.delete(key)
        elif kind < 0.6:
            rows = engine.scan(key, limit=30, reverse=turn % 2 == 1) if turn % 3 else engine.scan(key)
            wanted = sorted(other for other in model if other >= key)
            wanted = wanted[::-1][:30] if turn % 3 and turn % 2 else wanted[:30] if turn % 3 else wanted
            assert list(rows) == [(other, model[other]) for other in wanted]
        else:
            assert engine.get(key) == model.get(key)
        assert engine.stats()["cache_bytes"] <= 200_000
    assert engine.stats()["flushes"] > 5
    engine.close()


def test_a_snapshot_and_the_engine_do_not_share_rows() -> None:
    engine = open_engine(CrashVfs())
    engine.put_many({"a": "1", "b": "1"})
    engine.flush()
    assert [engine.get("a") for _ in range(3)] == [b"1"] * 3
    with engine.snapshot() as before:
        engine.put("a", "2")
        engine.flush()
        engine.compact()
        for _ in range(3):
            assert (engine.get("a"), before.get("a")) == (b"2", b"1")
            assert (engine.get_many(["a", "b"]), before.get_many(["a", "b"])) == ([b"2", b"1"], [b"1", b"1"])
    engine.close()


def test_an_expiring_row_is_not_held() -> None:
    engine = open_engine(CrashVfs())
    engine.put("short", "v", ttl_ms=40)
    engine.flush()
    while engine.get("short") is not None:
        pass
    assert engine.get("short") is None
    engine.close()


def test_writes_of_all_kinds_are_seen_at_once_where_a_row_was_held() -> None:
    engine = open_engine(CrashVfs())
    keys = [b"%d" % n for n in range(8)]
    engine.put_many(dict.fromkeys(keys, b"old"))
    engine.flush()
    for _ in range(2):
        assert engine.get_many(keys) == list(map(engine.get, keys)) == [b"old"] * 8
    engine.put(keys[0], b"new")
    engine.delete(keys[1])
    engine.put_many({keys[2]: b"new", b"other": b"new"})
    engine.put_many({keys[3]: b"new"}, ttl_ms=1)
    engine.delete_range(keys[4], keys[6])
    batch = WriteBatch()
    batch.put(keys[6], b"one")
    batch.put(keys[6], b"two")
    engine.write(batch)
    while engine.get(keys[3]) is not None:
        pass
    expected = [b"new", None, b"new", None, None, None, b"two", b"old"]
    for _ in range(2):
        assert engine.get_many(keys) == list(map(engine.get, keys)) == expected
        engine.flush()
    engine.close()


def test_a_held_row_may_be_asked_for_as_any_text_and_by_nobody_once_the_engine_is_closed() -> None:
    engine = open_engine(CrashVfs())
    engine.put("key", "value")
    engine.flush()
    for _ in range(2):
        for key in ("key", b"key", bytearray(b"key"), memoryview(b"key"), memoryview(bytearray(b"key"))):
            assert engine.get(key) == b"value"
    engine.close()
    with pytest.raises(StoreClosed):
        engine.get("key")
    with pytest.raises(StoreClosed):
        engine.get_many(["key"])


def test_a_forked_child_is_refused_a_held_row(tmp_path: Path) -> None:
    with Engine.open(tmp_path, workers=0) as engine:
        engine.put("key", "value")
        engine.flush()
        assert [engine.get("key") for _ in range(3)] == [b"value"] * 3
        child = os.fork()
        if child == 0:
            try:
                engine.get("key")
            except StoreClosed as error:
                os._exit(0 if "forked child" in str(error) else 2)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert engine.get("key") == b"value"


def test_rows_of_all_tablets_share_one_bound_the_first_to_come_go_first_and_give_all_of_it_back() -> None:
    row = 4 + 96 + ROW_OVERHEAD_BYTES
    blocks = BlockCache(SHARE * 20 * row)
    caches = RowCaches(blocks)
    one, two, three = caches.new(), caches.new(), caches.new()
    for number in range(100):
        for cache in (one, two):
            cache.hold(b"%04d" % number, bytes(96))
            assert 0 < blocks.charged_bytes <= blocks.bytes_max // SHARE
    assert list(one.values) == list(two.values) == [b"%04d" % number for number in range(90, 100)]
    for number in range(100):
        three.hold(b"%04d" % number, bytes(96))
    assert not one.values and not two.values and len(three.values) == 20
    one.hold(b"large", bytes(20 * row))
    assert not one.values
    one.hold(b"0000", bytes(96))
    one.forget([b"0000", b"0000", b"none"])
    assert blocks.charged_bytes == 19 * row
    three.clear()
    assert blocks.charged_bytes == 0
    two.hold(b"0000", bytes(96))
    assert blocks.charged_bytes == row
