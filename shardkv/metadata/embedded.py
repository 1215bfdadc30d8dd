"""The metadata store of one machine: a SQLite file, one row for each key.

    entries(key TEXT PRIMARY KEY, value BLOB or NULL when deleted, revision INTEGER)
    leased(key TEXT PRIMARY KEY)     keys attached to a lease of the process that has the store open
    application_id = 0x73686B76 ("shkv")   user_version = format version, 1

Invariant: an answered transaction is on disk (write-ahead log, synchronous=FULL), and those who follow were told.
Any failure while writing but a full disk poisons the store: the process must exit, and the next open decides what was
kept. Leases are those of this process: one that kept the store before took its leases along, and their keys go as
soon as there is a follower.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from shardkv.errors import DiskFull, InvalidArgument, StorageError, StorePoisoned, UnsupportedFormat
from shardkv.metadata.store import NO_LEASE, Changes, OnChanges
from shardkv.wire.messages import MetaCompare, MetaEntries, MetaEntry, MetaPut, MetaTxnReply

log = logging.getLogger(__name__)

FILE_NAME = "meta.sqlite3"
FORMAT_VERSION = 1
_APPLICATION_ID = 0x73686B76
_LAST_CHARACTER = "\U0010ffff"
_EXPIRY_RETRY_S = 1.0

_CREATE = f"""
BEGIN;
CREATE TABLE entries (key TEXT PRIMARY KEY, value BLOB, revision INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX entries_by_revision ON entries (revision);
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {FORMAT_VERSION};
COMMIT;
"""
_CREATE_LEASED = "CREATE TABLE IF NOT EXISTS leased (key TEXT PRIMARY KEY) WITHOUT ROWID"


@dataclass(slots=True)
class _Lease:
    ttl_s: float
    ends: asyncio.TimerHandle | None = None
    keys: set[str] = field(default_factory=set)


class EmbeddedStore:
    """A MetaStore in `directory`/meta.sqlite3, used by one event loop."""

    label = "embedded"

    def __init__(self, directory: Path) -> None:
        """Open or create it. Raises UnsupportedFormat, StorageError."""
        self.path = directory / FILE_NAME
        self._poison: StorageError | None = None
        self._followers: list[OnChanges] = []
        self._leases: dict[int, _Lease] = {}
        self._lease_ids = itertools.count(1)
        with _as_storage_errors(self.path, "opened"):
            self._db = sqlite3.connect(self.path, isolation_level=None)
            try:
                self._prepare()
            except BaseException:
                self._db.close()
                raise
            self.revision = self._newest_revision()
            self._left_behind = {key for (key,) in self._db.execute("SELECT key FROM leased")}
            self._retry: asyncio.TimerHandle | None = None

    # Reading

    async def get(self, key: str) -> MetaEntry | None:
        return self._get(key)

    async def read(self, prefix: str) -> MetaEntries:
        rows = self._rows("key >= ? AND key < ? AND value IS NOT NULL", prefix, prefix + _LAST_CHARACTER)
        return MetaEntries(self.revision, rows)

    async def follow(self, since: int, on_changes: OnChanges) -> None:
        whole = since == 0 or since > self.revision
        rows = self._rows("revision > ?", 0 if whole else since)
        on_changes(Changes(self.revision, rows, whole=whole))
        self._followers.append(on_changes)
        try:
            self._expire_left_behind()
            await asyncio.Event().wait()
        finally:
            self._followers.remove(on_changes)

    # Writing

    async def txn(
        self, compares: Sequence[MetaCompare], puts: Sequence[MetaPut], *, lease: int = NO_LEASE
    ) -> MetaTxnReply:
        if self._poison is not None:
            raise self._poison
        if len({put.key for put in puts}) != len(puts):
            raise InvalidArgument("A transaction puts one key twice.")
        holds = all(map(self._holds, compares)) and (lease == NO_LEASE or lease in self._leases)
        if holds and puts:
            self._apply(puts, lease)
        return MetaTxnReply(applied=holds, revision=self.revision)

    def _apply(self, puts: Sequence[MetaPut], lease: int = NO_LEASE) -> None:
        """Write `puts` at the next revision and tell. Raises DiskFull, StorePoisoned."""
        revision = self.revision + 1
        try:
            with _as_storage_errors(self.path, "written"):
                self._write(revision, puts, leased=lease != NO_LEASE)
        except DiskFull:
            raise
        except StorageError as error:
            self._poison = StorePoisoned(
                f"The metadata store takes no more changes: {error.message}",
                hint="Restarting the process decides what was kept.",
            )
            raise self._poison from error
        self.revision = revision
        self._attach({put.key for put in puts if put.value is not None}, {put.key for put in puts}, lease)
        entries = [MetaEntry(put.key, put.value, revision) for put in puts]
        for follower in list(self._followers):
            follower(Changes(revision, entries))

    async def aclose(self) -> None:
        for lease in self._leases.values():
            if lease.ends is not None:
                lease.ends.cancel()
        if self._retry is not None:
            self._retry.cancel()
        self._leases.clear()
        self._db.close()

    # Leases

    async def grant(self, ttl_s: float) -> int:
        lease = next(self._lease_ids)
        self._leases[lease] = _Lease(ttl_s)
        self._begin(lease)
        return lease

    async def keep_alive(self, lease: int) -> float:
        if lease not in self._leases:
            return 0.0
        self._begin(lease)
        return self._leases[lease].ttl_s

    async def revoke(self, lease: int) -> None:
        self._end(lease)

    def _begin(self, lease: int) -> None:
        held = self._leases[lease]
        if held.ends is not None:
            held.ends.cancel()
        held.ends = asyncio.get_running_loop().call_later(held.ttl_s, self._end, lease)

    def _end(self, lease: int) -> None:
        held = self._leases.pop(lease, None)
        if held is not None and held.ends is not None:
            held.ends.cancel()
            self._expire(held.keys)

    def _expire_left_behind(self) -> None:
        keys, self._left_behind = self._left_behind, set()
        self._expire(keys)

    def _expire(self, keys: Iterable[str]) -> None:
        """Delete the keys of a lease that ended; again and again while the disk is full."""
        gone = [MetaPut(key, None) for key in sorted(keys) if self._get(key) is not None]
        if not gone or self._poison is not None:
            return
        try:
            self._apply(gone)
        except DiskFull as error:
            log.warning("lease_outlived reason=%r", error.message)
            self._left_behind.update(keys)
            self._retry = asyncio.get_running_loop().call_later(_EXPIRY_RETRY_S, self._expire_left_behind)
        except StorePoisoned as error:
            log.error("lease_outlived reason=%r", error.message)

    def _attach(self, put: set[str], touched: set[str], lease: int) -> None:
        """What was put belongs to `lease` from now on, and to no other."""
        for held in self._leases.values():
            held.keys -= touched
        self._left_behind -= touched
        if lease != NO_LEASE:
            self._leases[lease].keys |= put

    # The file

    def _prepare(self) -> None:
        execute = self._db.execute
        application = execute("PRAGMA application_id").fetchone()[0]
        version = execute("PRAGMA user_version").fetchone()[0]
        tables = execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if tables == 0 and application == 0 and version == 0:
            self._db.executescript(_CREATE)
            _sync_directory(self.path.parent)
        elif application != _APPLICATION_ID:
            raise UnsupportedFormat(
                f"{self.path} is a SQLite file, but not a shardkv metadata store.",
                hint="Check the data directory.",
            )
        elif version != FORMAT_VERSION:
            raise UnsupportedFormat(
                f"{self.path} has format version {version}; this shardkv knows version {FORMAT_VERSION}.",
                hint="Start it with the version of shardkv that wrote it, or a newer one.",
            )
        execute("PRAGMA journal_mode = WAL")
        execute("PRAGMA synchronous = FULL")
        execute(_CREATE_LEASED)

    def _get(self, key: str) -> MetaEntry | None:
        rows = self._rows("key = ? AND value IS NOT NULL", key)
        return rows[0] if rows else None

    def _newest_revision(self) -> int:
        newest: int | None = self._db.execute("SELECT max(revision) FROM entries").fetchone()[0]
        return newest or 0

    def _rows(self, where: str, *values: str | int) -> list[MetaEntry]:
        query = f"SELECT key, value, revision FROM entries WHERE {where} ORDER BY key"
        with _as_storage_errors(self.path, "read"):
            return [MetaEntry(key, value, revision) for key, value, revision in self._db.execute(query, values)]

    def _holds(self, compare: MetaCompare) -> bool:
        entry = self._get(compare.key)
        return compare.revision == (entry.revision if entry else 0)

    def _write(self, revision: int, puts: Sequence[MetaPut], *, leased: bool) -> None:
        execute: Callable[..., object] = self._db.execute
        execute("BEGIN IMMEDIATE")
        try:
            self._db.executemany(
                "INSERT INTO entries (key, value, revision) VALUES (?, ?, ?) "
                "ON CONFLICT (key) DO UPDATE SET value = excluded.value, revision = excluded.revision",
                [(put.key, put.value, revision) for put in puts],
            )
            self._db.executemany("DELETE FROM leased WHERE key = ?", [(put.key,) for put in puts])
            if leased:
                kept = [(put.key,) for put in puts if put.value is not None]
                self._db.executemany("INSERT INTO leased (key) VALUES (?)", kept)
            execute("COMMIT")
        except sqlite3.Error:
            if self._db.in_transaction:
                execute("ROLLBACK")
            raise


@contextmanager
def _as_storage_errors(path: Path, done: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        reason = str(error).rstrip(".")
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
            raise DiskFull(f"{path} could not be {done}: the disk is full.", hint="Free some space.") from error
        raise StorageError(f"{path} could not be {done}: {reason}.") from error


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
