"""What a path given to a tool is: a store, a node's data directory with a store in it, or one file of a store.

A file is known by what it holds (its magic), and by its name where the magic is damaged.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

from shardkv.errors import InvalidArgument, StorageError, StoreLocked
from shardkv_node.engine import filenames
from shardkv_node.engine.log_format import LOG_MAGIC, MANIFEST_MAGIC
from shardkv_node.engine.table_format import MAGIC as TABLE_MAGIC
from shardkv_node.engine.vfs import Vfs

NODE_STORE = "store"
"""Where a node keeps its store inside its data directory."""
NODE_FILE = "node.json"


class Kind(Enum):
    STORE = "store"
    SEGMENT = "log segment"
    TABLE = "table"
    MANIFEST = "manifest"
    CURRENT = "pointer"
    IDENTITY = "identity"


def find_store(path: str) -> str:
    """The store's own directory, for a path that is one or a node's. Raises `InvalidArgument`."""
    if _is_store(path):
        return path
    inside = os.path.join(path, NODE_STORE)
    if _is_store(inside):
        return inside
    nodes = []
    if os.path.isdir(path):
        nodes = [name for name in sorted(os.listdir(path)) if _is_store(os.path.join(path, name, NODE_STORE))]
    hint = f"Name one of its nodes: {', '.join(nodes)}." if nodes else "A store has IDENTITY, CURRENT, wal and tables."
    raise InvalidArgument(f"There is no store at {path}.", hint=hint)


def find_target(path: str, vfs: Vfs) -> tuple[Kind, str]:
    """What the path is, and the path of that. Raises `InvalidArgument`."""
    if os.path.isdir(path):
        return Kind.STORE, find_store(path)
    if not os.path.exists(path):
        raise InvalidArgument(f"There is no file or directory {path}.")
    kind = _kind_by_name(os.path.basename(path)) or _kind_by_magic(path, vfs)
    if kind is None:
        raise InvalidArgument(f"{path} is not a file of a store.")
    return kind, path


@contextmanager
def offline(vfs: Vfs, store: str) -> Iterator[None]:
    """Keep other processes out of the store meanwhile. Raises `StoreLocked` when one is in it.

    On a read-only disk there is nobody to keep out, and no lock is taken.
    """
    try:
        lock = vfs.lock(filenames.lock_path(store))
    except StoreLocked:
        raise
    except StorageError as error:
        if error.detail.get("errno") not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        yield
        return
    try:
        yield
    finally:
        lock.release()


def segment_numbers(vfs: Vfs, store: str) -> list[int]:
    """Numbers of all log segments in the store, ascending."""
    directory = filenames.wal_directory(store)
    names = vfs.list(directory) if vfs.exists(directory) else []
    return sorted(number for number in map(filenames.parse_segment_name, names) if number is not None)


def table_names(vfs: Vfs, store: str) -> list[str]:
    """Names of all table files in the store, ascending."""
    directory = filenames.table_directory(store)
    if not vfs.exists(directory):
        return []
    return [name for name in vfs.list(directory) if filenames.parse_table_name(name) is not None]


def _is_store(path: str) -> bool:
    if not os.path.isdir(path):
        return False
    names = os.listdir(path)
    marks = {filenames.IDENTITY, filenames.CURRENT, filenames.WAL_DIRECTORY, filenames.TABLE_DIRECTORY}
    return len(marks.intersection(names)) >= 2 or any(filenames.parse_manifest_name(name) is not None for name in names)


def _kind_by_name(name: str) -> Kind | None:
    if name == filenames.CURRENT:
        return Kind.CURRENT
    if name == filenames.IDENTITY:
        return Kind.IDENTITY
    if filenames.parse_manifest_name(name) is not None:
        return Kind.MANIFEST
    if filenames.parse_segment_name(name) is not None:
        return Kind.SEGMENT
    return Kind.TABLE if filenames.parse_table_name(name) is not None else None


def _kind_by_magic(path: str, vfs: Vfs) -> Kind | None:
    file = vfs.open_read(path)
    try:
        head, tail = file.pread(0, 8), file.pread(max(0, file.size() - 8), 8)
    finally:
        file.close()
    if head == LOG_MAGIC:
        return Kind.SEGMENT
    if head == MANIFEST_MAGIC:
        return Kind.MANIFEST
    return Kind.TABLE if tail == TABLE_MAGIC else None
