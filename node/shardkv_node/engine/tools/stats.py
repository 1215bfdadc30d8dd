"""`store_stats`: sizes and counts of a store, from its manifest and the headers of its log; no table is read."""

from __future__ import annotations

from typing import Any

from shardkv_node.engine import filenames
from shardkv_node.engine.entries import WriteEntry
from shardkv_node.engine.identity import read_identity
from shardkv_node.engine.log_reader import ENTRY_DECODER
from shardkv_node.engine.manifest import TabletState, read_current, read_manifest
from shardkv_node.engine.tools.damage import text_of
from shardkv_node.engine.tools.places import segment_numbers
from shardkv_node.engine.tools.walk_log import LogWalk, WalkedGroup
from shardkv_node.engine.vfs import Vfs


def store_stats(vfs: Vfs, store: str) -> dict[str, Any]:
    """Plain facts, for people and as JSON.

    `rows` counts table rows, deletes included: a key that stands in several tables counts in each. `log.operations`
    are those not in tables yet. A table that several tablets share counts in each of them, and once in the bytes of
    all. Raises `Corruption`, `UnsupportedFormat`, `StorageError`.
    """
    store_id = read_identity(vfs, store) or b""
    number = read_current(vfs, store)
    state, _ = read_manifest(vfs, store, number, store_id)
    tablets = [_tablet_facts(tablet, found) for tablet, found in state.tablets.items()]
    return {
        "store": store,
        "store_id": store_id.hex(),
        "opened": state.term,
        "bytes": sum(
            {m.file_name: m.size for t in state.tablets.values() for level in t.levels for m in level}.values()
        ),
        "rows": sum(tablet["rows"] for tablet in tablets),
        "tombstones": sum(tablet["tombstones"] for tablet in tablets),
        "manifest_bytes": vfs.size(filenames.manifest_path(store, number)),
        "log": _log_facts(vfs, store, state.first_segment, {n: t.flushed_seqno for n, t in state.tablets.items()}),
        "tablets": tablets,
    }


def _tablet_facts(number: int, tablet: TabletState) -> dict[str, Any]:
    levels = [
        {
            "level": level,
            "tables": len(metas),
            "bytes": sum(meta.size for meta in metas),
            "raw_bytes": sum(meta.raw_bytes for meta in metas),
            "rows": sum(meta.count for meta in metas),
            "tombstones": sum(meta.tombstones for meta in metas),
            "expiring": sum(meta.expiring for meta in metas),
        }
        for level, metas in enumerate(tablet.levels)
        if metas
    ]
    totals = {name: sum(level[name] for level in levels) for name in ("tables", "bytes", "raw_bytes", "rows")}
    totals["tombstones"] = sum(level["tombstones"] for level in levels)
    named = {"tablet": number, "label": text_of(tablet.label), "records_of": tablet.records_of}
    return {**named, **totals, "levels": levels}


def _log_facts(vfs: Vfs, store: str, first: int, flushed: dict[int, int]) -> dict[str, int]:
    numbers = [number for number in segment_numbers(vfs, store) if number >= first]
    size = writes = operations = deep = 0
    for number in numbers:
        walk = LogWalk(vfs, filenames.segment_path(store, number), decoder=ENTRY_DECODER)
        size += walk.size
        for step in walk.steps():
            for entry in step.entries if isinstance(step, WalkedGroup) else ():
                if isinstance(entry, WriteEntry) and entry.seqno > flushed.get(entry.tablet, entry.seqno):
                    writes += 1
                    operations += len(entry.keys)
        deep += 1
    return {"segments": deep, "bytes": size, "writes": writes, "operations": operations}
