"""Every name in a store's directory is made and parsed here, and nowhere else.

    IDENTITY                     who this store is: format version and store id
    LOCK                         held by the process that has the store open
    CURRENT                      the name of the manifest in force
    MANIFEST-<n>                 the list of tables, tablets and watermarks
    wal/<n>.wal                  log segments
    tables/<n>-<job>.sst         tables: a number, and the random id of the job that wrote it
    EXPORT                       in the directory of an exported tablet, beside its tables: what they are
    *.tmp                        a file being made; swept when the store is opened

Numbers are decimal, padded to six digits so that names sort, and grow past six digits without harm.
A job id is 8 lower-case hex digits: a job that is run again writes other names, so it never meets its own leftovers.
Parsing returns None for a name that is not of that kind: the caller leaves files it does not know alone.
"""

from __future__ import annotations

import os
import re

IDENTITY = "IDENTITY"
LOCK = "LOCK"
CURRENT = "CURRENT"
EXPORT = "EXPORT"
WAL_DIRECTORY = "wal"
TABLE_DIRECTORY = "tables"
TMP_SUFFIX = ".tmp"

_MANIFEST = re.compile(r"MANIFEST-(\d{6,19})\Z", re.ASCII)
_SEGMENT = re.compile(r"(\d{6,19})\.wal\Z", re.ASCII)
_TABLE = re.compile(r"(\d{6,19})-([0-9a-f]{8})\.sst\Z", re.ASCII)


def identity_path(store: str) -> str:
    return os.path.join(store, IDENTITY)


def lock_path(store: str) -> str:
    return os.path.join(store, LOCK)


def current_path(store: str) -> str:
    return os.path.join(store, CURRENT)


def wal_directory(store: str) -> str:
    return os.path.join(store, WAL_DIRECTORY)


def table_directory(store: str) -> str:
    return os.path.join(store, TABLE_DIRECTORY)


def manifest_name(number: int) -> str:
    return f"MANIFEST-{number:06d}"


def manifest_path(store: str, number: int) -> str:
    return os.path.join(store, manifest_name(number))


def parse_manifest_name(name: str) -> int | None:
    match = _MANIFEST.match(name)
    return int(match[1]) if match else None


def segment_name(number: int) -> str:
    return f"{number:06d}.wal"


def segment_path(store: str, number: int) -> str:
    return os.path.join(store, WAL_DIRECTORY, segment_name(number))


def parse_segment_name(name: str) -> int | None:
    match = _SEGMENT.match(name)
    return int(match[1]) if match else None


def table_name(number: int, job_id: str) -> str:
    """Requires: `job_id` is 8 lower-case hex digits."""
    return f"{number:06d}-{job_id}.sst"


def table_path(store: str, name: str) -> str:
    """Where the table with this name (`TableMeta.file_name`) lies."""
    return os.path.join(store, TABLE_DIRECTORY, name)


def parse_table_name(name: str) -> tuple[int, str] | None:
    """(number, job id), or None."""
    match = _TABLE.match(name)
    return (int(match[1]), match[2]) if match else None


def export_path(directory: str) -> str:
    return os.path.join(directory, EXPORT)


def tmp_path(path: str) -> str:
    return path + TMP_SUFFIX


def is_tmp(name: str) -> bool:
    return name.endswith(TMP_SUFFIX)
