"""A store whose syncs run in a thread: the owner is told in its own context, once, and never again after an error."""

from __future__ import annotations

import queue
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest

from shardkv.errors import StorageError
from shardkv_node.engine.columns import PUT
from shardkv_node.engine.log_format import GROUP_BYTES
from shardkv_node.engine.store import Store
from shardkv_node.engine.syncer import ThreadSyncer
from shardkv_node.engine.write import Write
from tests.node.engine.crash_vfs import CrashVfs, keep_nothing
from tests.node.engine.store_driver import STORE, TINY, open_store, scan

Posts = queue.SimpleQueue[Callable[[], None]]


def open_threaded(vfs: CrashVfs, durability: str) -> tuple[Store, Posts, int]:
    posts: Posts = queue.SimpleQueue()
    options = replace(TINY, durability=durability, sync_interval_ms=1, memtable_bytes_max=1 << 20)
    store = Store.open(STORE, options, vfs=vfs, post=posts.put)
    return store, posts, store.create_tablet(b"t")


def test_a_group_is_applied_after_its_sync_came_back() -> None:
    store, posts, tablet = open_threaded(CrashVfs(), "always")
    group = store.log_group([Write(tablet, [b"k"], PUT, [b"v"])])
    outcomes: list[StorageError | None] = []
    store.sync_group(group, outcomes.append)
    assert outcomes == [] and store.get(tablet, b"k") is None
    posts.get(timeout=10)()
    assert outcomes == [None] and not store.sync_due()
    store.apply_group(group)
    assert store.get(tablet, b"k") == b"v"
    store.close()


def test_a_failed_sync_poisons_the_store_and_the_group_is_not_applied() -> None:
    vfs = CrashVfs()
    store, posts, tablet = open_threaded(vfs, "always")
    group = store.log_group([Write(tablet, [b"k"], PUT, [b"v"])])
    vfs.fail_at(vfs.operations + 1)
    outcomes: list[StorageError | None] = []
    store.sync_group(group, outcomes.append)
    posts.get(timeout=10)()
    assert len(outcomes) == 1 and outcomes[0] is not None and "open it again" in str(outcomes[0])
    assert store.get(tablet, b"k") is None and store.write_refusal() is not None
    seen = vfs.operations
    store.close()
    assert vfs.operations == seen


def test_interval_mode_acknowledges_at_once_and_syncs_until_nothing_is_left() -> None:
    store, posts, tablet = open_threaded(CrashVfs(), "interval")
    for number in range(3):
        group = store.log_group([Write(tablet, [b"%d" % number], PUT, [b"v"])])
        outcomes: list[StorageError | None] = []
        store.sync_group(group, outcomes.append)
        assert outcomes == [None]
        store.apply_group(group)
    log = store._log
    while log.needs_sync:
        posts.get(timeout=10)()
    store.close()


def test_interval_mode_syncs_again_what_came_while_it_synced_and_one_at_a_time() -> None:
    vfs = CrashVfs()
    store, posts, tablet = open_threaded(vfs, "interval")

    def put(key: bytes) -> None:
        group = store.log_group([Write(tablet, [key], PUT, [b"v"])])
        store.sync_group(group, lambda error: None)
        store.apply_group(group)

    put(b"first")
    first_answer = posts.get(timeout=10)
    put(b"second")  # after the sync, before its answer was heard
    put(b"third")
    assert posts.empty()
    first_answer()
    assert store._log.needs_sync
    posts.get(timeout=10)()
    assert not store._log.needs_sync and posts.empty()
    store.close()


def test_a_segment_rolled_while_it_syncs_is_closed_afterwards() -> None:
    store, posts, tablet = open_threaded(CrashVfs(), "interval")
    group = store.log_group([Write(tablet, [b"k"], PUT, [b"v"])])
    store.sync_group(group, lambda error: None)
    store.apply_group(group)
    store.flush()
    posts.get(timeout=10)()
    assert store.get(tablet, b"k") == b"v" and store.write_refusal() is None
    store.close()
    with pytest.raises(StorageError):
        store.get(tablet, b"k")


def test_a_log_is_marked_once_it_is_quiet_and_not_between_two_puts() -> None:
    store, posts, tablet = open_threaded(CrashVfs(), "always")

    def put(key: bytes) -> None:
        group = store.log_group([Write(tablet, [key], PUT, [b"v"])])
        target = store.sync_target()
        target.sync()
        store.synced(target)
        store.apply_group(group)

    log = store._log
    put(b"a")
    first = log.offset
    put(b"b")
    size = log.offset - first
    posts.get(timeout=10)()
    assert log.offset == first + size, "not quiet: there was a put since the first sync"
    posts.get(timeout=10)()
    assert log.offset == first + size + GROUP_BYTES
    assert posts.empty()
    put(b"c")
    posts.get(timeout=10)()
    assert log.offset == first + 2 * (size + GROUP_BYTES)
    store.close()


def test_no_mark_is_written_over_a_group_that_is_not_synced_nor_after_a_poisoning() -> None:
    store, posts, tablet = open_threaded(CrashVfs(), "always")
    target = store.sync_target()
    target.sync()
    store.synced(target)
    group = store.log_group([Write(tablet, [b"k"], PUT, [b"v"])])
    posts.get(timeout=10)()
    assert store._log.offset == group.end_offset
    target = store.sync_target()
    target.sync()
    store.synced(target)
    store.apply_group(group)
    store.fail(OSError("a sync failed"))
    posts.get(timeout=10)()
    assert store._log.offset == group.end_offset
    store.close()


def test_a_hurried_sync_does_not_wait_and_the_one_after_it_does() -> None:
    calls: queue.SimpleQueue[str] = queue.SimpleQueue()
    syncer = ThreadSyncer(lambda call: call())
    syncer.submit(lambda: calls.put("first"), lambda _: None, delay_s=60)
    syncer.hurry()
    assert calls.get(timeout=10) == "first"
    syncer.submit(lambda: calls.put("second"), lambda _: None, delay_s=60)
    syncer.submit(lambda: calls.put("third"), lambda _: None)
    syncer.close()
    assert calls.empty()


@pytest.mark.parametrize("durability", ["always", "interval", "os"])
def test_a_sync_of_the_log_that_is_asked_for_comes_soon_beside_groups_and_freezes(durability: str) -> None:
    vfs, posts = CrashVfs(), queue.SimpleQueue[Callable[[], None]]()
    options = replace(TINY, durability=durability, sync_interval_ms=60_000, memtable_bytes_max=2000)
    store = Store.open(STORE, options, vfs=vfs, post=posts.put)
    tablet = store.create_tablet(b"t")
    outcomes: list[tuple[int, StorageError | None]] = []
    survivors: list[tuple[int, CrashVfs]] = []

    def told(number: int, error: StorageError | None) -> None:
        outcomes.append((number, error))
        if number % 10 == 5:
            survivors.append((number, vfs.crash(keep_nothing)))

    for number in range(30):
        group = store.log_group([Write(tablet, [b"%d" % number], PUT, [b"v" * 150])])
        ended: list[StorageError | None] = []
        store.sync_log(partial(told, number))
        store.sync_group(group, ended.append)
        store.sync_log(partial(told, number))
        while not ended or (number % 3 == 0 and len(outcomes) < 2 * number + 2):
            posts.get(timeout=10)()
        store.apply_group(group)
    while len(outcomes) < 60:
        posts.get(timeout=10)()
    assert sorted(outcomes) == [(number, None) for number in range(30) for _ in range(2)]
    for number, survivor in survivors:
        assert len(scan(open_store(survivor, options), tablet)) > number
    store.sync_log(lambda error: outcomes.append((99, error)))
    assert outcomes[-1] == (99, None)
    store.close()
    store.sync_log(lambda error: outcomes.append((100, error)))
    assert outcomes[-1][1] is not None
