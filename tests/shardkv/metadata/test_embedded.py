"""The SQLite back end: transactions, revisions, what survives a reopen, and files that are not ours."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import pytest

from shardkv.errors import DiskFull, StorageError, StorePoisoned, UnsupportedFormat
from shardkv.metadata import embedded
from shardkv.metadata.embedded import FILE_NAME, EmbeddedStore
from shardkv.metadata.store import NO_LEASE, Changes
from shardkv.wire.messages import MetaCompare, MetaPut


def put(store: EmbeddedStore, key: str, value: bytes | None, *, known: int | None = None, leased: bool = False) -> bool:
    """One transaction, in a loop of its own: the embedded store never waits."""

    async def story() -> bool:
        lease = await store.grant(60) if leased else NO_LEASE
        compares = [] if known is None else [MetaCompare(key, known)]
        return (await store.txn(compares, [MetaPut(key, value)], lease=lease)).applied

    return asyncio.run(story())


def get(store: EmbeddedStore, key: str) -> bytes | None:
    entry = asyncio.run(store.get(key))
    return entry.value if entry else None


def follow(store: EmbeddedStore, since: int = 0) -> Changes:
    """What a follower is told first, and then right away."""
    told: list[Changes] = []

    async def story() -> None:
        following = asyncio.ensure_future(store.follow(since, told.append))
        await asyncio.sleep(0)
        following.cancel()

    asyncio.run(story())
    return Changes(told[-1].revision, [entry for changes in told for entry in changes.entries], whole=told[0].whole)


def test_an_empty_store_has_revision_zero(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path)
    assert store.revision == 0
    assert get(store, "a") is None


def test_deletes_are_told_even_to_who_follows_from_the_start(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path)
    put(store, "nodes/a", b"1")
    put(store, "nodes/b", b"1")
    put(store, "nodes/a", None)
    assert [e.key for e in asyncio.run(store.read("nodes/")).entries] == ["nodes/b"]
    assert follow(store).whole
    changes = follow(store, since=1)
    assert (changes.revision, changes.whole) == (3, False)
    assert [(e.key, e.value, e.revision) for e in changes.entries] == [("nodes/a", None, 3), ("nodes/b", b"1", 2)]


def test_a_reopened_store_goes_on_where_it_was(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path)
    put(store, "a", b"1")
    put(store, "a", None)
    asyncio.run(store.aclose())
    again = EmbeddedStore(tmp_path)
    assert again.revision == 2
    assert put(again, "a", b"2", known=0)
    assert again.revision == 3


def test_a_store_abandoned_without_close_keeps_what_it_answered(tmp_path: Path) -> None:
    abandoned = EmbeddedStore(tmp_path)
    put(abandoned, "a", b"1")
    again = EmbeddedStore(tmp_path)
    assert get(again, "a") == b"1"


def test_writes_are_synced_to_disk_before_they_are_answered(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path)
    full = 2
    assert store._db.execute("PRAGMA synchronous").fetchone() == (full,)


def test_a_newer_format_is_refused_with_both_versions(tmp_path: Path) -> None:
    asyncio.run(EmbeddedStore(tmp_path).aclose())
    with sqlite3.connect(tmp_path / FILE_NAME) as db:
        db.execute("PRAGMA user_version = 9")
    db.close()
    with pytest.raises(UnsupportedFormat, match=r"version 9; this shardkv knows version 1\."):
        EmbeddedStore(tmp_path)


def test_another_programs_sqlite_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / FILE_NAME) as db:
        db.execute("CREATE TABLE theirs (x)")
    db.close()
    before = (tmp_path / FILE_NAME).read_bytes()
    with pytest.raises(UnsupportedFormat, match="not a shardkv metadata store"):
        EmbeddedStore(tmp_path)
    assert (tmp_path / FILE_NAME).read_bytes() == before


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"this is no database" * 100)
    with pytest.raises(StorageError, match=FILE_NAME):
        EmbeddedStore(tmp_path)


def test_a_failed_write_poisons_the_store(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path)
    put(store, "a", b"1")
    store._db.execute("PRAGMA query_only = ON")
    with pytest.raises(StorePoisoned):
        put(store, "a", b"2")
    store._db.execute("PRAGMA query_only = OFF")
    with pytest.raises(StorePoisoned):
        put(store, "a", b"3")
    assert get(EmbeddedStore(tmp_path), "a") == b"1"


def test_keys_leased_by_a_process_that_died_go_when_the_next_one_follows(tmp_path: Path) -> None:
    dead = EmbeddedStore(tmp_path)
    put(dead, "leased", b"1", leased=True)
    put(dead, "leased-then-kept", b"1", leased=True)
    put(dead, "leased-then-kept", b"2")
    again = EmbeddedStore(tmp_path)
    assert get(again, "leased") == b"1"
    changes = follow(again)
    assert [(e.key, e.value) for e in changes.entries if e.revision > 3] == [("leased", None)]
    assert (get(again, "leased"), get(again, "leased-then-kept")) == (None, b"2")
    assert follow(EmbeddedStore(tmp_path)).revision == changes.revision


def test_a_full_disk_puts_off_the_end_of_a_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(EmbeddedStore(tmp_path), "leased", b"1", leased=True)
    store = EmbeddedStore(tmp_path)
    real, full = store._write, [True]

    def write(revision: int, puts: Sequence[MetaPut], *, leased: bool) -> None:
        if full[0]:
            raise DiskFull("The disk is full.")
        real(revision, puts, leased=leased)

    monkeypatch.setattr(store, "_write", write)
    monkeypatch.setattr(embedded, "_EXPIRY_RETRY_S", 0.01)

    async def story() -> None:
        gone = asyncio.Event()
        following = asyncio.ensure_future(store.follow(0, lambda changes: gone.set() if not changes.whole else None))
        await asyncio.sleep(0)
        assert await store.get("leased") is not None
        full[0] = False
        async with asyncio.timeout(5):
            await gone.wait()
        assert await store.get("leased") is None
        following.cancel()
        await store.aclose()

    asyncio.run(story())
