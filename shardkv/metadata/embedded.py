"""The metadata store of one machine: a SQLite file, one row for each key.

    entries(key TEXT PRIMARY KEY, value BLOB or NULL when deleted, revision INTEGER)
    application_id = 0x73686B76 ("shkv")   user_version = format version, 1

Invariant: an answered transaction is on disk (write-ahead log, synchronous=FULL). Any failure while writing but
a full disk poisons the store: the process must exit, and the next open decides what was kept.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from shardkv.errors import DiskFull, StorageError, StorePoisoned, UnsupportedFormat
from shardkv.wire.messages import MetaCompare, MetaEntries, MetaEntry, MetaPut, MetaTxnReply

FILE_NAME = "meta.sqlite3"
FORMAT_VERSION = 1
_APPLICATION_ID = 0x73686B76
_LAST_CHARACTER = "\U0010ffff"

_CREATE = f"""
BEGIN;
CREATE TABLE entries (key TEXT PRIMARY KEY, value BLOB, revision INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX entries_by_revision ON entries (revision);
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {FORMAT_VERSION};
COMMIT;
"""


class EmbeddedStore:
    """A MetaStore in `directory`/meta.sqlite3, used by one thread."""

    def __init__(self, directory: Path) -> None:
        """Open or create it. Raises UnsupportedFormat, StorageError."""
        self.path = directory / FILE_NAME
        self._poison: StorageError | None = None
        with _as_storage_errors(self.path, "opened"):
            self._db = sqlite3.connect(self.path, isolation_level=None)
            try:
                self._prepare()
            except BaseException:
                self._db.close()
                raise
            self.revision = self._newest_revision()

    def get(self, key: str) -> MetaEntry | None:
        rows = self._rows("key = ? AND value IS NOT NULL", key)
        return rows[0] if rows else None

    def read(self, prefix: str) -> MetaEntries:
        rows = self._rows("key >= ? AND key < ? AND value IS NOT NULL", prefix, prefix + _LAST_CHARACTER)
        return MetaEntries(self.revision, rows)

    def changes_since(self, revision: int) -> MetaEntries:
        return MetaEntries(self.revision, self._rows("revision > ?", revision))

    def txn(self, compares: Sequence[MetaCompare], puts: Sequence[MetaPut]) -> MetaTxnReply:
        if self._poison is not None:
            raise self._poison
        holds = all(self._holds(compare) for compare in compares)
        if not holds or not puts:
            return MetaTxnReply(applied=holds, revision=self.revision)
        revision = self.revision + 1
        try:
            with _as_storage_errors(self.path, "written"):
                self._write(revision, puts)
        except DiskFull:
            raise
        except StorageError as error:
            self._poison = StorePoisoned(
                f"The metadata store takes no more changes: {error.message}",
                hint="Restarting the process decides what was kept.",
            )
            raise self._poison from error
        self.revision = revision
        return MetaTxnReply(applied=True, revision=revision)

    def close(self) -> None:
        self._db.close()

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

    def _newest_revision(self) -> int:
        newest: int | None = self._db.execute("SELECT max(revision) FROM entries").fetchone()[0]
        return newest or 0

    def _rows(self, where: str, *values: str | int) -> list[MetaEntry]:
        query = f"SELECT key, value, revision FROM entries WHERE {where} ORDER BY key"
        with _as_storage_errors(self.path, "read"):
            return [MetaEntry(key, value, revision) for key, value, revision in self._db.execute(query, values)]

    def _holds(self, compare: MetaCompare) -> bool:
        entry = self.get(compare.key)
        return compare.revision == (entry.revision if entry else 0)

    def _write(self, revision: int, puts: Sequence[MetaPut]) -> None:
        execute: Callable[..., object] = self._db.execute
        execute("BEGIN IMMEDIATE")
        try:
            self._db.executemany(
                "INSERT INTO entries (key, value, revision) VALUES (?, ?, ?) "
                "ON CONFLICT (key) DO UPDATE SET value = excluded.value, revision = excluded.revision",
                [(put.key, put.value, revision) for put in puts],
            )
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
