"""The SQLite back end: transactions, revisions, what survives a reopen, and files that are not ours."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from shardkv.errors import StorageError, StorePoisoned, UnsupportedFormat
from shardkv.metadata.embedded import FILE_NAME, EmbeddedStore
from shardkv.wire.messages import MetaCompare, MetaPut


def put(store: EmbeddedStore, key: str, value: bytes | None, *, known: int | None = None) -> bool:
    compares = [] if known is None else [MetaCompare(key, known)]
    return store.txn(compares, [MetaPut(key, value)]).applied


def test_an_empty_store_has_revision_zero(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path)
    assert store.revision == 0
    assert store.get("a") is None
    assert store.read("").entries == []


def test_a_transaction_writes_all_its_keys_at_one_revision(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path)
    reply = store.txn([], [MetaPut("b", b"2"), MetaPut("a", b"1")])
    assert (reply.applied, reply.revision) == (True, 1)
    assert [(e.key, e.value, e.revision) for e in store.read("").entries] == [("a", b"1", 1), ("b", b"2", 1)]


def test_one_failed_compare_applies_nothing(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path)
    put(store, "a", b"1")
    compares = [MetaCompare("a", 1), MetaCompare("b", 7)]
    reply = store.txn(compares, [MetaPut("a", b"2"), MetaPut("b", b"2")])
    assert (reply.applied, reply.revision) == (False, 1)
    assert [(e.key, e.value) for e in store.read("").entries] == [("a", b"1")]


def test_revision_zero_means_the_key_must_not_exist(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path)
    assert put(store, "a", b"1", known=0)
    assert not put(store, "a", b"2", known=0)
    assert put(store, "a", None, known=1)
    assert not put(store, "a", b"3", known=2)
    assert put(store, "a", b"3", known=0)


def test_changes_since_tell_deletes_and_the_listing_hides_them(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path)
    put(store, "nodes/a", b"1")
    put(store, "nodes/b", b"1")
    put(store, "nodes/a", None)
    assert [e.key for e in store.read("nodes/").entries] == ["nodes/b"]
    changes = store.changes_since(1)
    assert changes.revision == 3
    assert [(e.key, e.value, e.revision) for e in changes.entries] == [("nodes/a", None, 3), ("nodes/b", b"1", 2)]


def test_a_prefix_ends_where_its_family_ends(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path)
    for key in ("nodes", "nodes/a", "nodes0", "nodes/\U0010fffe"):
        put(store, key, b"1")
    assert [e.key for e in store.read("nodes/").entries] == ["nodes/a", "nodes/\U0010fffe"]


def test_a_reopened_store_goes_on_where_it_was(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path)
    put(store, "a", b"1")
    put(store, "a", None)
    store.close()
    again = EmbeddedStore(tmp_path)
    assert again.revision == 2
    assert put(again, "a", b"2", known=0)
    assert again.revision == 3


def test_a_store_abandoned_without_close_keeps_what_it_answered(tmp_path: Path) -> None:
    abandoned = EmbeddedStore(tmp_path)
    put(abandoned, "a", b"1")
    again = EmbeddedStore(tmp_path)
    entry = again.get("a")
    assert entry is not None
    assert entry.value == b"1"


def test_writes_are_synced_to_disk_before_they_are_answered(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path)
    full = 2
    assert store._db.execute("PRAGMA synchronous").fetchone() == (full,)


def test_a_newer_format_is_refused_with_both_versions(tmp_path: Path) -> None:
    EmbeddedStore(tmp_path).close()
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
    assert EmbeddedStore(tmp_path).get("a").value == b"1"  # type: ignore[union-attr]
