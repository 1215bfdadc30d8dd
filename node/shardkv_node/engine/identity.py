"""The identity of a store: a random id that its log, manifest and owner's records all carry.

    IDENTITY = "shardkv-store <format> <store id in 32 hex digits> <crc32c of what is before it in 8>\\n"

Invariant: IDENTITY is the last file a new store gets, so a directory that has it was complete once: if its
manifest is gone, data was lost, and the directory must not pass for a new one. Data without IDENTITY is damage.
"""

from __future__ import annotations

import os

import google_crc32c

from shardkv.errors import Corruption, UnsupportedFormat
from shardkv_node.engine import filenames
from shardkv_node.engine.manifest import ManifestState, ManifestWriter, manifest_numbers
from shardkv_node.engine.vfs import Vfs

STORE_FORMAT = 1
STORE_ID_BYTES = 16


def make_store_directory(vfs: Vfs, directory: str) -> None:
    """Make the directory and what is missing above it, each name durable: a store must not vanish with its parent."""
    missing = []
    path = directory
    while path and not vfs.exists(path):
        missing.append(path)
        path = os.path.dirname(path)
    vfs.make_dirs(directory)
    for path in reversed(missing):
        vfs.sync_dir(os.path.dirname(path) or ".")


def make_directories(vfs: Vfs, directory: str) -> None:
    """The directories inside the store's, durable."""
    vfs.make_dirs(filenames.wal_directory(directory))
    vfs.make_dirs(filenames.table_directory(directory))
    vfs.sync_dir(directory)


def read_identity(vfs: Vfs, directory: str) -> bytes | None:
    """The store id, or None for a directory that never held a complete store.

    Raises `Corruption`, `UnsupportedFormat`.
    """
    path = filenames.identity_path(directory)
    if not vfs.exists(path):
        _refuse_orphaned_data(vfs, directory, path)
        return None
    text = vfs.read_all(path)
    words = text.split()
    if len(words) != 4 or words[0] != b"shardkv-store" or not words[1].isdigit():
        raise Corruption("Damaged identity", path=path, offset=0, expected="an identity line", got=text[:80])
    checked = b" ".join(words[:3])
    if text != checked + b" %08x\n" % google_crc32c.value(checked):
        raise Corruption("Damaged identity", path=path, offset=0, expected="a matching checksum", got=text[:80])
    if int(words[1]) != STORE_FORMAT:
        raise UnsupportedFormat(
            f"The store at {directory} has format {int(words[1])}; this program knows format {STORE_FORMAT}.",
            detail={"path": path, "found": int(words[1]), "known": STORE_FORMAT},
            hint="Open it with the shardkv release that wrote it, or a newer one.",
        )
    return bytes.fromhex(words[2].decode("ascii"))


def create_store(vfs: Vfs, directory: str, store_id: bytes) -> None:
    """Make an empty store; leftovers of an interrupted creation are replaced."""
    ManifestWriter.start(vfs, directory, 1, ManifestState(store_id=store_id), 0).close()
    vfs.write_atomic(filenames.identity_path(directory), identity_text(store_id))


def identity_text(store_id: bytes) -> bytes:
    checked = b"shardkv-store %d %s" % (STORE_FORMAT, store_id.hex().encode("ascii"))
    return checked + b" %08x\n" % google_crc32c.value(checked)


def _refuse_orphaned_data(vfs: Vfs, directory: str, path: str) -> None:
    segments = [name for name in vfs.list(filenames.wal_directory(directory)) if not filenames.is_tmp(name)]
    tables = [name for name in vfs.list(filenames.table_directory(directory)) if not filenames.is_tmp(name)]
    found = [*segments, *tables]
    if found or len(manifest_numbers(vfs, directory)) > 1:
        got = f"none, beside {len(segments)} log segments and {len(tables)} tables"
        raise Corruption("No identity in a directory with data", path=path, offset=0, expected="an identity", got=got)
