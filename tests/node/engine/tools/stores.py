"""A small store on a real disk with everything in it: levels, deletes, two tablets, and rows only in the log."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from shardkv_node.engine.options import Options
from shardkv_node.engine.store import Store
from shardkv_node.engine.syncer import InlineSyncer
from shardkv_node.engine.tools.damage import Damage
from tests.node.engine.store_driver import TINY, Rows, commit, scan

SMALL = replace(
    TINY, memtable_bytes_max=16 * 1024, table_bytes_max=8 * 1024, level1_bytes_max=16 * 1024, durability="os"
)


@dataclass
class Made:
    """Where it is and what it holds, by tablet."""

    path: Path
    rows: dict[int, Rows]

    def files(self, pattern: str) -> list[Path]:
        return sorted(self.path.glob(pattern))


def open_at(path: Path, options: Options = SMALL) -> Store:
    return Store.open(str(path), options, post=lambda call: call(), syncer=InlineSyncer())


def make_store(path: Path, options: Options = SMALL, *, label: bytes = b"default") -> Made:
    """Closed, with level 0 and deeper tables, tombstones and a log that holds rows no table has."""
    store = open_at(path, options)
    chance = random.Random(5)
    rows: dict[int, Rows] = {store.create_tablet(label): {}, store.create_tablet(b"7"): {}}
    for number in range(400):
        for tablet, model in rows.items():
            key = b"key%03d" % chance.randrange(300)
            value = None if chance.random() < 0.2 else b"%06d" % number * chance.randrange(1, 20)
            commit(store, tablet, [(key, value)])
            if value is None:
                model.pop(key, None)
            else:
                model[key] = value
        if number == 390:
            store.flush()
    store.close()
    return Made(path, rows)


def share_files(made: Made) -> Made:
    """The store with its first tablet split in two that share files, tablets 3 and 4; the other one imported once more,
    tablet 5; and for each of these a row in the log.
    """
    store = open_at(made.path)
    store.flush()
    rows = {number: dict(found) for number, found in made.rows.items()}
    left, right = store.split_tablet(1, b"key150", (b"left", b"right"))
    export = made.path.with_name("export")
    store.export_tablet(2, str(export))
    again = store.import_tablet(str(export), b"again")
    whole = rows.pop(1)
    rows[left] = {key: value for key, value in whole.items() if key < b"key150"}
    rows[right] = {key: value for key, value in whole.items() if key >= b"key150"}
    rows[again] = dict(rows[2])
    for tablet, key in ((left, b"key000"), (right, b"key299"), (again, b"key100")):
        commit(store, tablet, [(key, b"newest")])
        rows[tablet][key] = b"newest"
    metas = [meta for tablet in store._state.tablets.values() for level in tablet.levels for meta in level]
    assert len(metas) > len({meta.file_name for meta in metas})
    store.close()
    assert rows_of(made.path) == rows
    return Made(made.path, rows)


def rows_of(path: Path, options: Options = SMALL) -> dict[int, Rows]:
    """What a store holds, read through its front door."""
    store = open_at(path, options)
    try:
        return {tablet: scan(store, tablet) for tablet in store.tablets}
    finally:
        store.close()


def flip(path: Path, offset: int) -> None:
    """One bit of the byte at `offset` (from the end when negative)."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(bytes(data))


def image(directory: Path) -> dict[str, bytes]:
    """Every file and its bytes, but for the lock."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != "LOCK"
    }


def copy_of(made: Made, to: Path) -> Made:
    shutil.copytree(made.path, to)
    return Made(to, made.rows)


def killed_copy_of(made: Made, to: Path) -> Made:
    """As a kill of the process that has it open would leave it."""
    store = open_at(copy_of(made, to.with_name(f"{to.name}-open")).path)
    killed = copy_of(Made(Path(store.directory), made.rows), to)
    store.close()
    return killed


def places(problems: list[Damage]) -> list[tuple[str, int]]:
    return [(problem.path, problem.offset) for problem in problems]
