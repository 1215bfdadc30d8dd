"""Versions that can be read, and writes that are made only when a key still has the version one knows."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from shardkv import WriteBatch
from shardkv.errors import ConditionFailed, InvalidArgument, StorePoisoned
from shardkv_node.engine import Engine
from shardkv_node.engine.columns import DELETE, PUT
from shardkv_node.engine.store import Store
from shardkv_node.engine.write import Write
from tests.node.engine.crash_vfs import CrashVfs
from tests.node.engine.store_driver import commit, open_store


def test_a_version_is_read_and_compared_and_survives_flush_and_restart(tmp_path: Path) -> None:
    with Engine.open(tmp_path, workers=0) as engine:
        first = engine.put("k", "1", if_absent=True)
        assert engine.get_versioned("k") == (b"1", first) and engine.get_versioned("nothing") is None
        with pytest.raises(ConditionFailed, match=rf"b'k' has version {first}; the write asked that it does not exist"):
            engine.put("k", "2", if_absent=True)
        second = engine.put("k", "2", if_version=first)
        assert second > first
        with pytest.raises(ConditionFailed) as caught:
            engine.put("k", "3", if_version=first)
        assert caught.value.detail == {"key": b"k", "expected": first, "found": second} and not caught.value.retriable
        engine.flush()
        assert engine.get_versioned("k") == (b"2", second)
    with Engine.open(tmp_path, workers=0) as engine:
        with pytest.raises(ConditionFailed):
            engine.delete("k", if_version=first)
        assert engine.delete("k", if_version=second) is True
        with pytest.raises(ConditionFailed, match="does not exist; the write asked that it has version"):
            engine.put("k", "4", if_version=second)
        assert engine.put("k", "4", if_version=0) > second
        assert list(engine.scan()) == [(b"k", b"4")]


def test_a_batch_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    with Engine.open(tmp_path, workers=0) as engine:
        seen = engine.put("guard", "1")
        batch = WriteBatch()
        batch.put("a", "1")
        batch.put("b", "2")
        with pytest.raises(ConditionFailed):
            engine.write(batch, if_versions={"guard": seen, "a": 77})
        assert engine.get_many(["a", "b"]) == [None, None]
        version = engine.write(batch, if_versions={"guard": seen, "a": 0})
        assert engine.get_versioned("a") == (b"1", version) and engine.get_versioned("b") == (b"2", version)
        engine.delete("guard")
        with pytest.raises(ConditionFailed):
            engine.write(batch, if_versions={"guard": seen})


@pytest.mark.parametrize(
    "call",
    [
        lambda e: e.put("k", "v", if_absent=True, if_version=3),
        lambda e: e.put("k", "v", if_version=-1),
        lambda e: e.put("k", "v", if_version="1"),
        lambda e: e.delete("k", if_version=True),
    ],
)
def test_conditions_that_make_no_sense_are_refused(tmp_path: Path, call) -> None:  # type: ignore[no-untyped-def]
    with Engine.open(tmp_path, workers=0) as engine:
        with pytest.raises(InvalidArgument):
            call(engine)
        assert list(engine.scan()) == []


def test_counting_by_compare_and_set_loses_no_step(tmp_path: Path) -> None:
    threads, steps = 8, 25
    with Engine.open(tmp_path, durability="os") as engine:
        engine.put("n", "0")

        def count() -> None:
            for _ in range(steps):
                while True:
                    found = engine.get_versioned("n")
                    assert found is not None
                    try:
                        engine.put("n", b"%d" % (int(found[0]) + 1), if_version=found[1])
                        break
                    except ConditionFailed:
                        continue

        running = [threading.Thread(target=count) for _ in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        assert engine.get("n") == b"%d" % (threads * steps)


def one_group(store: Store, writes: list[Write]) -> list[Exception | None]:
    group = store.log_group(writes)
    assert all(write.error is None and not write.applied for write in writes)
    store.sync_group(group, lambda error: store.apply_group(group))
    return [write.error for write in writes]


def test_conditions_see_what_stands_earlier_in_the_group_and_refusals_wait_for_it() -> None:
    store = open_store(CrashVfs())
    tablet = store.create_tablet(b"t")
    version = commit(store, tablet, [(b"a", b"1")]).version
    told: list[Write] = []

    def put(key: bytes, expected: int) -> Write:
        return Write(tablet, [key], PUT, [b"v"], conditions=[(key, expected)], done=told.append)

    writes = [
        put(b"a", version),
        put(b"a", version),
        put(b"a", version + 1),
        put(b"new", 0),
        put(b"new", 0),
        Write(tablet, [b"a", b"new"], DELETE, [b"", b""], want_existed=True, done=told.append),
        put(b"a", 0),
    ]
    errors = one_group(store, writes)
    assert told == writes
    assert [error is None for error in errors] == [True, False, True, True, False, True, True]
    assert writes[5].existed == [True, True]
    assert [write.version - version for write in writes if write.applied] == [1, 2, 3, 4, 5]
    assert store.get(tablet, b"a") == b"v" and store.get(tablet, b"new") is None
    store.close()


def test_a_refusal_is_not_told_when_what_it_rests_on_may_be_lost() -> None:
    vfs = CrashVfs()
    store = open_store(vfs)
    tablet = store.create_tablet(b"t")
    writes = [
        Write(tablet, [b"a"], PUT, [b"v"]),
        Write(tablet, [b"a"], PUT, [b"w"], conditions=[(b"a", 0)]),
    ]
    group = store.log_group(writes)
    outcome: list[Exception | None] = []
    vfs.fail_at(vfs.operations + 1)  # the sync
    store.sync_group(group, outcome.append)
    assert isinstance(outcome[0], StorePoisoned)
    assert writes[1].error is None and not writes[1].applied
