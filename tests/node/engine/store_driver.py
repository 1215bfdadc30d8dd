"""Drives a `Store` step by step, everything inline, and knows what it should hold after each write."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from shardkv.errors import StorageError
from shardkv_node.engine.columns import DELETE, PUT
from shardkv_node.engine.options import Options
from shardkv_node.engine.store import Store
from shardkv_node.engine.syncer import InlineSyncer
from shardkv_node.engine.vfs import Vfs
from shardkv_node.engine.write import Write
from tests.node.engine.crash_vfs import CrashVfs

STORE = "/data/store"

TINY = Options(
    workers=0,
    memtable_bytes_max=1500,
    block_bytes=128,
    table_bytes_max=1024,
    level1_bytes_max=2048,
    l0_compaction_trigger=2,
    compaction_bytes_max=2048,
    block_cache_bytes=16 * 1024,
    manifest_bytes_max=1500,
    disk_reserve_bytes=0,
    scrub_bytes_per_s=0,
)
"""Flushes, compactions in parts, and manifest rolls every few writes."""

Rows = dict[bytes, bytes]


def open_store(vfs: Vfs, options: Options = TINY) -> Store:
    return Store.open(STORE, options, vfs=vfs, post=lambda call: call(), syncer=InlineSyncer())


@dataclass
class Driver:
    """One tablet of a store beside a dict. `states[n]` is what the store holds after n writes."""

    store: Store
    tablet: int = 0
    states: list[Rows] = field(default_factory=lambda: [{}])
    acked: int = 0
    """How many writes were acknowledged."""

    def __post_init__(self) -> None:
        self.tablet = next(iter(self.store.tablets), 0) or self.store.create_tablet(b"t")

    def write(self, operations: list[tuple[bytes, bytes | None]]) -> None:
        """One batch; None deletes. Raises what the store raises."""
        after = dict(self.states[-1])
        for key, value in operations:
            if value is None:
                after.pop(key, None)
            else:
                after[key] = value
        self.states.append(after)
        commit(self.store, self.tablet, operations)
        self.acked = len(self.states) - 1


def commit(store: Store, tablet: int, operations: list[tuple[bytes, bytes | None]]) -> Write:
    """One write through all its stages."""
    write = Write(
        tablet,
        [key for key, _ in operations],
        bytes(DELETE if value is None else PUT for _, value in operations),
        [value or b"" for _, value in operations],
        want_existed=True,
    )
    return commit_write(store, write)


def commit_write(store: Store, write: Write) -> Write:
    """The write through all its stages; look at its `error` when it has conditions."""
    group = store.log_group([write])
    errors: list[Exception | None] = []
    store.sync_group(group, errors.append)
    if errors[0] is not None:
        raise errors[0]
    store.apply_group(group)
    return write


def scan(store: Store, tablet: int) -> Rows:
    """All rows, page by page, checked to ascend."""
    rows: Rows = {}
    start: bytes | None = b""
    while start is not None:
        page = store.scan_page([tablet], start, None, limit=7)
        for key, value in zip(page.keys, page.values, strict=True):
            assert not rows or key > next(reversed(rows))
            rows[key] = value
        start = page.frontier
    return rows


def random_operations(chance: random.Random) -> list[tuple[bytes, bytes | None]]:
    return [
        (b"k%02d" % chance.randrange(40), None if chance.random() < 0.3 else bytes([97 + i]) * chance.randrange(60))
        for i in range(chance.choice((1, 1, 2, 5)))
    ]


class HasStore(Protocol):
    """Any driver."""

    store: Store


D = TypeVar("D", bound=HasStore)


def run_failing(
    workload: Callable[[CrashVfs, Callable[[D], None]], object], n: int, code: int, *, sticky: bool
) -> tuple[CrashVfs, D | None]:
    """Run the workload with its n-th operation failing. Returns what is on disk, and the driver if one was made."""
    vfs = CrashVfs()
    vfs.fail_at(n, errno=code, sticky=sticky)
    made: list[D] = []
    try:
        workload(vfs, made.append)
    except StorageError:
        pass
    finally:
        for driver in made:
            with suppress(StorageError):
                driver.store.close()
    return vfs, made[0] if made else None
