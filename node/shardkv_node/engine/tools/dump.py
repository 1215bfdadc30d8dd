"""`dump`: what a file or a store holds, as a sequence of plain dicts, one for each thing, in file order.

Each dict has a "what" first. Bytes are text with what cannot be printed as \\xNN, long ones shortened. The caller stops
reading when it has seen enough: nothing is read ahead.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from shardkv_node.engine import filenames
from shardkv_node.engine.columns import DELETE, SEQNO_BITS, SEQNO_MAX, Columns
from shardkv_node.engine.entries import WriteEntry
from shardkv_node.engine.log_format import MANIFEST_MAGIC
from shardkv_node.engine.log_reader import ENTRY_DECODER, FileHeader, TornTail
from shardkv_node.engine.manifest import TablesEdit, read_current
from shardkv_node.engine.table_meta import TableMeta
from shardkv_node.engine.tools.damage import Damage, text_of
from shardkv_node.engine.tools.places import Kind, segment_numbers
from shardkv_node.engine.tools.walk_log import EDIT_DECODER, LogWalk
from shardkv_node.engine.tools.walk_table import TableWalk, WalkedBlock
from shardkv_node.engine.vfs import Vfs

Item = dict[str, Any]
KEYS_SHOWN = 8


def dump(vfs: Vfs, kind: Kind, path: str) -> Iterator[Item]:
    """What is there. Damage is an item too. Raises `UnsupportedFormat`, `StorageError`."""
    if kind is Kind.STORE:
        yield from _dump_store(vfs, path)
    elif kind is Kind.SEGMENT:
        yield from _dump_log(LogWalk(vfs, path, decoder=ENTRY_DECODER), _entry_item)
    elif kind is Kind.MANIFEST:
        yield from _dump_log(LogWalk(vfs, path, decoder=EDIT_DECODER, magic=MANIFEST_MAGIC), _edit_item)
    elif kind is Kind.TABLE:
        yield from _dump_table(vfs, path)
    else:
        yield {"what": kind.value, "path": path, "text": text_of(vfs.read_all(path), 200)}


def _dump_store(vfs: Vfs, store: str) -> Iterator[Item]:
    """The small files and the manifest in force, then one item for each segment and table header."""
    for path in (filenames.identity_path(store), filenames.current_path(store)):
        if vfs.exists(path):
            kind = Kind.IDENTITY if path.endswith(filenames.IDENTITY) else Kind.CURRENT
            yield from dump(vfs, kind, path)
    manifest = filenames.manifest_path(store, read_current(vfs, store))
    yield {"what": "file", "kind": Kind.MANIFEST.value, "path": manifest}
    yield from dump(vfs, Kind.MANIFEST, manifest)
    for number in segment_numbers(vfs, store):
        walk = LogWalk(vfs, filenames.segment_path(store, number), decoder=ENTRY_DECODER)
        walk.close()
        yield {
            "what": "file",
            "kind": Kind.SEGMENT.value,
            "path": walk.path,
            "bytes": walk.size,
            **_header(walk.header),
        }


def _dump_log(walk: LogWalk[Any], describe: Callable[[Any], Item]) -> Iterator[Item]:
    yield {"what": "header", "path": walk.path, "bytes": walk.size, **_header(walk.header)}
    for step in walk.steps():
        if isinstance(step, Damage | TornTail):
            yield _trouble(step)
            continue
        yield {
            "what": "group" if step.entries else "sync mark",
            "offset": step.offset,
            "bytes": step.end - step.offset,
            "time_ms": step.hlc >> 16,
            "synced_offset": step.synced_offset,
        }
        for entry in step.entries:
            yield describe(entry)


def _header(header: FileHeader | None) -> Item:
    if header is None:
        return {"header": "damaged"}
    return {
        "store_id": header.store_id.hex(),
        "number": header.number,
        "previous_number": header.previous_number,
        "previous_end": header.previous_end,
    }


def _trouble(step: Damage | TornTail) -> Item:
    what = "damage" if isinstance(step, Damage) else "torn tail"
    return {"what": what, "path": step.path, "offset": step.offset, "bytes": step.bytes, "problem": step.problem}


def _entry_item(entry: Any) -> Item:
    if not isinstance(entry, WriteEntry):
        return _struct_item(entry, "Entry")
    deletes = entry.kinds.count(DELETE) if isinstance(entry.kinds, bytes) else len(entry.keys) * (entry.kinds == DELETE)
    return {
        "what": "write",
        "tablet": entry.tablet,
        "term": entry.term,
        "seqno": entry.seqno,
        "operations": len(entry.keys),
        "deletes": deletes,
        "value_bytes": sum(map(len, entry.values)),
        "keys": [text_of(key) for key in entry.keys[:KEYS_SHOWN]],
    }


def _edit_item(edit: Any) -> Item:
    if not isinstance(edit, TablesEdit):
        return _struct_item(edit, "Edit")
    added = [{"level": level, **_meta_item(meta)} for level, meta in edit.added]
    return {"what": "tables", "tablet": edit.tablet, "added": added, "removed": edit.removed}


def _meta_item(meta: TableMeta) -> Item:
    return {name: _plain(value) for name, value in msgspec.structs.asdict(meta).items()}


def _struct_item(entry: msgspec.Struct, suffix: str) -> Item:
    what = type(entry).__name__.removesuffix(suffix).lower()
    return {"what": what, **{name: _plain(value) for name, value in msgspec.structs.asdict(entry).items()}}


def _plain(value: object) -> object:
    if isinstance(value, bytes):
        return value.hex() if len(value) == 16 else text_of(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, msgspec.Struct):
        return {name: _plain(item) for name, item in msgspec.structs.asdict(value).items()}
    return value


def _dump_table(vfs: Vfs, path: str) -> Iterator[Item]:
    walk = TableWalk(vfs, path)
    try:
        yield {"what": "table", "path": path, "bytes": walk.size, "name": os.path.basename(path)}
        if walk.footer is not None:
            yield {"what": "footer", **msgspec.structs.asdict(walk.footer)}
        if walk.properties is not None:
            yield _struct_item(walk.properties, "")
        for offset, size, body in walk.partitions():
            if isinstance(body, Damage):
                continue  # told again, with its place among the blocks, below
            yield {
                "what": "partition",
                "offset": offset,
                "bytes": size,
                "blocks": len(body.offsets),
                "filter_bytes": len(body.filter),
                "last_key": text_of(body.last_keys[-1]) if body.last_keys else "",
            }
        for step in walk.steps():
            if isinstance(step, Damage):
                yield _trouble(step)
            else:
                yield from _block_items(step)
    finally:
        walk.close()


def _block_items(block: WalkedBlock) -> Iterator[Item]:
    columns = block.columns
    yield {
        "what": "block",
        "offset": block.offset,
        "bytes": block.size,
        "rows": len(columns),
        "first_key": text_of(columns.keys[0]),
        "last_key": text_of(columns.keys[-1]),
    }
    for row in range(len(columns)):
        yield _row_item(columns, row)


def _row_item(columns: Columns, row: int) -> Item:
    version = columns.version(row)
    found: Item = {"what": "row", "key": text_of(columns.keys[row]), "term": version >> SEQNO_BITS}
    found["seqno"] = version & SEQNO_MAX
    if columns.kind(row) == DELETE:
        found["deleted"] = True
        return found
    if columns.expiry(row):
        found["expiry_ms"] = columns.expiry(row)
    return {**found, "value": text_of(columns.values[row])}
