"""The row cache: it answers what the tables would, at every turn of a key's life, inside the block cache's bound."""

from __future__ import annotations

import random

import pytest

from shardkv_node.engine import Engine
from shardkv_node.engine.block_cache import BlockCache
from shardkv_node.engine.row_cache import ROW_OVERHEAD_BYTES, SHARE, RowCaches
from tests.node.engine.crash_vfs import CrashVfs


def open_engine(vfs: CrashVfs, **options: int) -> Engine:
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


def test_random_writes_and_reads_under_a_small_cache_agree_with_a_dict() -> None:
    engine = open_engine(CrashVfs(), block_cache_bytes=40_000, memtable_bytes_max=20_000)
    rng = random.Random(5)
    model: dict[bytes, bytes] = {}
    keys = [b"%04d" % n for n in range(300)]
    for _ in range(4000):
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
        assert engine.stats()["cache_bytes"] <= 40_000
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


def test_rows_of_all_tablets_share_one_bound_and_give_all_of_it_back() -> None:
    blocks = BlockCache(SHARE * 2 * 10_000)
    caches = RowCaches(blocks)
    one, two = caches.new(), caches.new()
    for number in range(490):
        for cache in (one, two):
            cache.put(b"%04d" % number, bytes(96))
            assert 0 < blocks.charged_bytes <= blocks.bytes_max // SHARE
    assert len(one.young) > 1
    assert one.get(b"0489") == bytes(96)
    old = next(key for key in (b"%04d" % n for n in range(400, 500)) if key not in one.young and key in one._old)
    assert one.get(old) == bytes(96) and old in one.young
    one.put(b"large", bytes(10_000))
    assert one.get(b"large") is None
    caches.discard(one)
    two.clear()
    assert blocks.charged_bytes == 0
    assert one.get(b"0489") is None
    blocks.put(1, "block", ROW_OVERHEAD_BYTES)
    assert blocks.charged_bytes == ROW_OVERHEAD_BYTES
