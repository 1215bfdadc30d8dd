"""A user's program with a mistake on every line that ends in `# wrong`, and no other. Never run."""

from __future__ import annotations

from shardkv import Admin, AsyncClient, Client, WriteBatch


def mistakes(db: Client[bytes], text: Client[str], batch: WriteBatch) -> None:
    db.put("k", 5)  # wrong
    db.put("k", "v", ttl="60")  # wrong
    db.get("k") + b"!"  # wrong
    db.get("k", with_version=True)[0]  # wrong
    db.get_many(["a"])[b"a"]  # wrong
    db.get_many(["a"]).missing  # wrong
    db.get_many(["a"], on_shard_error="ignore")  # wrong
    db.count().missing  # wrong
    db.incr("n", "1")  # wrong
    db.put_many(["a", "b"])  # wrong
    db.scan(limit="10")  # wrong
    next(db.scan(keys_only=True)).decode()[0].cursor  # wrong
    batch.put("a", None)  # wrong
    number: int = text.get("k")  # wrong
    Client(addresses=7400)  # wrong
    Client(connections="4")  # wrong
    print(number)


async def more(db: AsyncClient[bytes]) -> None:
    rows = await db.scan()  # wrong
    value: bytes | None = db.get("k")  # wrong
    print(rows, value)


def operators(admin: Admin) -> None:
    admin.create_keyspace("people", partition="list")  # wrong
    admin.rebalance(dry_run=True).state  # wrong
    admin.move_shard("1", "node-2")  # wrong
