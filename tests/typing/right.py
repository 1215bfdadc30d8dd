"""A user's program that `mypy --strict` has nothing to say about: what each call returns is asserted. Never run."""

from __future__ import annotations

from typing import assert_type

from shardkv import Admin, AsyncClient, Client, Limits, Missing, PartialCount, PartialDict, ShardKVError, WriteBatch
from shardkv.admin import Job, Keyspace, Plan


def one_key(db: Client[bytes]) -> None:
    assert_type(db.put("k", "v"), int)
    assert_type(db.put(b"k", bytearray(b"v"), ttl=1.5, if_absent=True, timeout=1), int)
    assert_type(db.get("k"), bytes | None)
    assert_type(db.get("k", with_version=False), bytes | None)
    assert_type(db.get("k", with_version=True), tuple[bytes, int] | None)
    assert_type(db.delete("k", if_version=7), bool)
    assert_type(db.incr("n", -2, ttl=60), int)
    found = db.get("k", with_version=True)
    if found is not None:
        value, version = found
        db.put("k", value, if_version=version)


def many_keys(db: Client[bytes]) -> None:
    db.put_many({"a": "1", "b": b"2"}, ttl=60)
    db.put_many({b"a": "1"})
    db.batch_put(["a", b"b"], [b"1", "2"])
    assert_type(db.get_many(["a", "b"]), dict[str, bytes | None])
    assert_type(db.get_many({b"a", b"b"}), dict[bytes, bytes | None])
    assert_type(db.get_many(["a"], with_version=True), dict[str, tuple[bytes, int] | None])
    assert_type(db.get_many(["a"], on_shard_error="fail"), dict[str, bytes | None])
    some = db.get_many(["a"], on_shard_error="partial")
    assert_type(some, PartialDict[str, bytes | None])
    assert_type(some.missing, list[Missing])
    assert_type(some["a"], bytes | None)
    versioned = db.get_many([b"a"], with_version=True, on_shard_error="partial")
    assert_type(versioned, PartialDict[bytes, tuple[bytes, int] | None])
    assert_type(db.delete_many(key for key in ("a", b"b")), int)


def batches(db: Client[bytes]) -> None:
    batch = WriteBatch()
    batch.put("a", "1")
    batch.delete(b"b")
    assert_type(db.write(batch, if_versions={"a": 1}), int | None)
    with db.batch(if_versions={b"a": 0}, timeout=2) as collected:
        assert_type(collected, WriteBatch)
        collected.put("a", "2")


def ranges(db: Client[bytes]) -> None:
    for key, value in db.scan("a", "b", limit=10, reverse=True):
        assert_type(key, bytes)
        assert_type(value, bytes)
    keys = db.scan(prefix="a", keys_only=True)
    assert_type(next(keys), bytes)
    assert_type(keys.cursor, str | None)
    later = db.scan(cursor=keys.cursor, on_shard_error="partial")
    assert_type(list(later), list[tuple[bytes, bytes]])
    for missing in later.missing:
        assert_type(missing.shard, int)
        assert_type(missing.start, bytes)
        assert_type(missing.stop, bytes | None)
        assert_type(missing.tokens, tuple[int, int] | None)
        assert_type(missing.error, ShardKVError)
    assert_type([key for key, _ in db.get_range("a", "b")], list[bytes])
    assert_type(db.count("a", prefix="a"), int)
    count = db.count(on_shard_error="partial")
    assert_type(count, PartialCount)
    assert_type(count.missing, list[Missing])
    assert_type(count + 1, int)
    assert_type(db.delete_range(prefix="a", limit=5), int)


def text(db: Client[str]) -> None:
    assert_type(db.get("k"), str | None)
    assert_type(db.get("k", with_version=True), tuple[str, int] | None)
    assert_type(db.get_many([b"a"]), dict[bytes, str | None])
    assert_type(db.get_many(["a"], on_shard_error="partial"), PartialDict[str, str | None])
    assert_type(next(db.scan()), tuple[str, str])
    assert_type(next(db.scan(keys_only=True)), str)


def life() -> None:
    assert_type(Client(), Client[bytes])
    assert_type(Client(["a:1", "b:2"], timeout=1, connections_max=4, limits=Limits()), Client[bytes])
    assert_type(Client("a:1", direct=True), Client[bytes])
    assert_type(Client(decode_responses=True, direct=True), Client[str])
    assert_type(AsyncClient("a:1", direct=True), AsyncClient[bytes])
    assert_type(AsyncClient(decode_responses=True), AsyncClient[str])
    with Client(keyspace="default") as db:
        assert_type(db, Client[bytes])
        assert_type(db.ping(), float)
        assert_type(db.keyspace, str)
        db.status()["nodes"]


async def awaited(db: AsyncClient[bytes]) -> None:
    assert_type(await db.put("k", "v", if_version=0), int)
    assert_type(await db.get("k"), bytes | None)
    assert_type(await db.get("k", with_version=True), tuple[bytes, int] | None)
    assert_type(await db.delete("k"), bool)
    assert_type(await db.incr("n"), int)
    assert_type(await db.get_many(["a"]), dict[str, bytes | None])
    assert_type(await db.get_many([b"a"], with_version=True), dict[bytes, tuple[bytes, int] | None])
    assert_type(await db.get_many(["a"], on_shard_error="partial"), PartialDict[str, bytes | None])
    assert_type(await db.count(), int)
    assert_type(await db.count(on_shard_error="partial"), PartialCount)
    assert_type(await db.delete_range("a", "b"), int)
    async with db.batch() as batch:
        batch.put("a", "1")
    rows = db.scan("a", on_shard_error="partial")
    async for key, value in rows:
        assert_type((key, value), tuple[bytes, bytes])
    assert_type(rows.cursor, str | None)
    assert_type(rows.missing, list[Missing])
    assert_type([key async for key in db.scan(keys_only=True)], list[bytes])
    async with AsyncClient(decode_responses=True) as other:
        assert_type(await other.get("k"), str | None)
    await db.close()


def operators(admin: Admin) -> None:
    assert_type(admin.rebalance(dry_run=True), Plan)
    assert_type(admin.rebalance(moves_max=3), Job)
    assert_type(admin.add_node(host="10.0.0.4", rebalance=False).node, str)
    assert_type(admin.remove_node("node-1", accept_data_loss="node-1"), Job)
    assert_type(admin.split_shard(1, at=b"m").state == "done", bool)
    assert_type(admin.create_keyspace("people", partition="range", split_at=["m"]), Keyspace)
    assert_type([shard.bytes for shard in admin.shards()], list[int | None])
    assert_type([job.eta_s for job in admin.watch_job(1)], list[float | None])
    assert_type(admin.status().advice, list[str])
