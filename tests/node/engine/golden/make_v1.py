"""Makes `v1`: a store of format version 1 with everything the format knows by now, and the rows it must give.

    python -m tests.node.engine.golden.make_v1 DIRECTORY

What is committed was made once. It is not made again when the code changes: that every later release reads it is the
point. A new format version gets a directory and a script of its own.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

from shardkv_node.engine.options import Options
from shardkv_node.engine.store import Store
from shardkv_node.engine.syncer import InlineSyncer
from tests.node.engine.store_driver import TINY, commit, scan

SMALL = replace(TINY, memtable_bytes_max=1 << 20, table_bytes_max=2048, l0_compaction_trigger=5, l0_stall_tables=9)


def make(directory: Path) -> None:
    """Write `store` and `rows.json` into the directory, the same bytes every time."""
    chance = random.Random(1)
    path = directory / "store"

    def opened(options: Options) -> Store:
        return Store.open(
            str(path),
            options,
            post=lambda call: call(),
            syncer=InlineSyncer(),
            now_ms=lambda: 1_700_000_000_000,
            random_bytes=chance.randbytes,
        )

    def fill(store: Store, tablet: int, count: int) -> None:
        for _ in range(count):
            keys = [b"key%03d" % chance.randrange(120) for _ in range(chance.choice((1, 1, 4)))]
            commit(store, tablet, [(key, None if chance.random() < 0.25 else value_of(chance)) for key in keys])

    store = opened(SMALL)
    first, second, dropped = (store.create_tablet(label) for label in (b"default", b"7", b"gone"))
    for tablet in (first, second, dropped):
        fill(store, tablet, 40)
    store.flush()
    store.request_compaction()  # level 1, zstd
    store.close()
    for compression in ("none", "lz4"):
        store = opened(replace(SMALL, upper_compression=compression))
        fill(store, first, 30)
        fill(store, second, 10)
        store.flush()  # level 0
        store.close()
    store = opened(SMALL)
    store.drop_tablet(dropped)
    fill(store, first, 10)
    store.close()  # a closed segment with rows that no table has, behind it the one of the next open
    store = opened(replace(SMALL, durability="os"))
    fill(store, second, 5)
    commit(store, first, [(b"\x00\xff", b"\x00" * 300), ("käse".encode(), b""), (b"k" * 300, b"long key")])
    rows = {tablet: {key: store.get_versioned(tablet, key) for key in scan(store, tablet)} for tablet in store.tablets}
    labels = {tablet: label.decode() for tablet, label in store.tablets.items()}
    store_id = store.store_id.hex()
    store.close()
    log = max((path / "wal").iterdir())
    log.write_bytes(log.read_bytes() + log.read_bytes()[56:80])  # a torn tail: the start of a group, in a wrong place
    (path / "LOCK").unlink()
    facts = {
        "store_id": store_id,
        "labels": labels,
        "rows": {
            tablet: {key.hex(): [found[0].hex(), found[1]] for key, found in held.items() if found is not None}
            for tablet, held in rows.items()
        },
    }
    (directory / "rows.json").write_text(json.dumps(facts, indent=0) + "\n")


def value_of(chance: random.Random) -> bytes:
    """Some compress, some do not, some are empty."""
    return chance.choice((b"", b"abc" * chance.randrange(20), chance.randbytes(20)))


if __name__ == "__main__":
    make(Path(sys.argv[1]))
