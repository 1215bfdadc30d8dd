"""An exported tablet: a directory with its table files and, written last, a manifest that says what they are.

    <directory>/EXPORT               the manifest, below
    <directory>/<n>-<job>.sst        tables, with the names and bytes they have in the store: see table_format.py

    EXPORT  = magic 8 bytes | version u32 | body_bytes u32 | check u32 | body           little-endian
    check   = crc32c of version, body_bytes and body
    body    = [store_id, tablet, label, last_seqno, tables, records_seqno, records]
                                                                      msgpack; store and tablet it was exported from
    tables  = [[level, meta]...]                                      level 0 oldest first, the others in key order
    meta    = TableMeta as in the store's manifest: file name, size, crc32c of the file, key and version range, counts,
              and the clip: of the file only rows with keys in [start, stop) belong to the tablet. A file with two
              clips stands there twice.
    records = as tables: those with the records of tokens, see dedupe.py; records_seqno: their last, 0: there are none

Worked example: tablet 5 of store 00..0f, label "7", 9 writes, no tables (hex):

    73 6b 76 65 78 70 0d 0a 01 00 00 00 1b 00 00 00 1a 5f b9 26
    97 c4 10 00 01 02 03 04 05 06 07 08 09 0a 0b 0c 0d 0e 0f 05 c4 01 37 09 90 00 90

Fields are added at the end with a default; another layout is another version. The magic ends in CR LF: a copy in text
mode breaks it. A directory without EXPORT is no export: its files may be incomplete.

What is exported are all writes up to `last_seqno` and none after: what was in tables at the moment of the pin.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress

import google_crc32c
import msgspec

from shardkv.errors import Corruption, InvalidArgument, StorageError, UnsupportedFormat
from shardkv_node.engine import filenames
from shardkv_node.engine.identity import make_store_directory
from shardkv_node.engine.table_meta import TableMeta
from shardkv_node.engine.vfs import Vfs

MAGIC = b"skvexp\r\n"
FORMAT_VERSION = 1
_HEAD = struct.Struct("<8sIII")
_CHECKED = struct.Struct("<II")


class ExportManifest(msgspec.Struct, array_like=True, frozen=True):
    """What EXPORT says."""

    store_id: bytes
    tablet: int
    label: bytes
    last_seqno: int
    tables: list[tuple[int, TableMeta]]
    records_seqno: int = 0
    records: list[tuple[int, TableMeta]] = []


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(ExportManifest).decode


class TabletExport:
    """A tablet pinned as it was, to be written out. Made by `Store.pin_export`; `close` it."""

    def __init__(self, vfs: Vfs, store: str, manifest: ExportManifest, release: Callable[[TabletExport], None]) -> None:
        self.manifest = manifest
        self._vfs = vfs
        self._store = store
        self._release = release
        self._closed = False

    def write(self, directory: str) -> None:
        """Make the export in this directory, which is made, or is empty; all of it is durable on return.

        Files are hard links where the file system allows it, else copies: it may take long, and may run in any thread.
        Raises `InvalidArgument` for a directory that holds anything, `StorageError`; then what was made is removed.
        """
        make_store_directory(self._vfs, directory)
        if self._vfs.list(directory):
            raise InvalidArgument(
                f"{directory} is not empty.", hint="Name a directory that is empty, or is not there yet."
            )
        placed: list[str] = []
        try:
            for name in sorted({meta.file_name for _, meta in (*self.manifest.tables, *self.manifest.records)}):
                target = os.path.join(directory, name)
                placed.append(target)
                place(self._vfs, filenames.table_path(self._store, name), target)
            self._vfs.sync_dir(directory)
            placed += [filenames.tmp_path(filenames.export_path(directory)), filenames.export_path(directory)]
            self._vfs.write_atomic(filenames.export_path(directory), encode_export(self.manifest))
        except BaseException:
            remove_all(self._vfs, placed)
            raise

    def close(self) -> None:
        """Let go of the files. Safe to call twice; by the owner of the store."""
        if not self._closed:
            self._closed = True
            self._release(self)


def place(vfs: Vfs, source: str, target: str) -> bool:
    """Have the file under a second name: True; or a copy of it, synced: False. A leftover at `target` is an error."""
    if vfs.link(source, target):
        return True
    vfs.copy(source, target)
    return False


def remove_all(vfs: Vfs, paths: Sequence[str]) -> None:
    """Remove those that are there, as far as the disk lets us; the last one first."""
    for path in reversed(paths):
        with suppress(StorageError):
            if vfs.exists(path):
                vfs.remove(path)


def encode_export(manifest: ExportManifest) -> bytes:
    body = _encode(manifest)
    checked = _CHECKED.pack(FORMAT_VERSION, len(body))
    check = google_crc32c.extend(google_crc32c.value(checked), body)
    return _HEAD.pack(MAGIC, FORMAT_VERSION, len(body), check) + body


def read_export(vfs: Vfs, directory: str) -> ExportManifest:
    """What the export in this directory is. Raises `Corruption`, `UnsupportedFormat`, `InvalidArgument` for none."""
    path = filenames.export_path(directory)
    if not vfs.exists(path):
        raise InvalidArgument(
            f"There is no complete export in {directory}: it has no {filenames.EXPORT}.",
            hint="Name the directory a tablet was exported to; an export that was interrupted is made again.",
        )
    data = vfs.read_all(path)
    if len(data) < _HEAD.size or data[:8] != MAGIC:
        raise Corruption("No export manifest", path=path, offset=0, expected=MAGIC.hex(), got=data[:8].hex())
    _, version, body_bytes, check = _HEAD.unpack_from(data)
    body = data[_HEAD.size :]
    if len(body) != body_bytes:
        raise Corruption("Wrong size of an export manifest", path=path, offset=8, expected=body_bytes, got=len(body))
    got = google_crc32c.extend(google_crc32c.value(data[8:16]), body)
    if check != got:
        raise Corruption(
            "Bad checksum of an export manifest", path=path, offset=8, expected=f"{check:08x}", got=f"{got:08x}"
        )
    if version != FORMAT_VERSION:
        raise UnsupportedFormat(
            f"The export {path} has format version {version}; this program knows version {FORMAT_VERSION}.",
            detail={"path": path, "found": version, "known": FORMAT_VERSION},
            hint="Import it with the shardkv that wrote it, or a newer one.",
        )
    try:
        return _decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Corruption(
            "An export manifest does not decode", path=path, offset=_HEAD.size, expected="its fields", got=error
        ) from error
