"""Plain puts that go through the store together do what the same puts do one by one."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from shardkv.errors import ShardUnavailable
from shardkv_node.engine import memtable as memtable_module
from shardkv_node.engine.columns import DELETE, PUT
from shardkv_node.engine.puts import Puts
from shardkv_node.engine.store import Store
from shardkv_node.engine.write import Group, Write
from tests.node.engine.crash_vfs import CrashVfs, keep_everything
from tests.node.engine.store_driver import TINY, commit, open_store, scan

ROOMY = replace(TINY, memtable_bytes_max=1 << 20)

Put = tuple[int, list[bytes], list[bytes]]
"""A request: tablet, keys, values."""


class Told:
    """Puts, and what is told of them: all together, or one by one."""

    def __init__(self, asked: list[Put]) -> None:
        self.together: list[Puts] = []
        self.alone: list[Write] = []
        numbers, keys, values = [one[0] for one in asked], [one[1] for one in asked], [one[2] for one in asked]
        self.puts = Puts(numbers, keys, values, apart=lambda: singles(asked, self), done=self.together.append)


def singles(asked: list[Put], told: Told | None = None) -> list[Write]:
    done = None if told is None else told.alone.append
    return [Write(tablet, keys, PUT, values, done=done) for tablet, keys, values in asked]


def put(tablet: int, key: bytes, value: bytes) -> Put:
    return tablet, [key], [value]


def through(store: Store, writes: list[Write | Puts]) -> Group:
    group = store.log_group(writes)
    store.sync_group(group, lambda error: None)
    store.apply_group(group)
    return group


def random_puts(chance: random.Random, tablets: int) -> list[Put]:
    asked = []
    for _ in range(20):
        count = chance.choice((1, 1, 1, 2, 5))
        keys = [b"k%02d" % chance.randrange(40) for _ in range(count)]
        asked.append((chance.randint(1, tablets), keys, [b"v" * chance.randrange(50) for _ in keys]))
    return asked


def state(store: Store, tablets: int) -> list[object]:
    return [
        [(key, store.get_versioned(number, key)) for key in scan(store, number)] for number in range(1, tablets + 1)
    ]


@pytest.mark.parametrize("part_rows", [7, 160_000])
@pytest.mark.parametrize("options", [TINY, ROOMY])
@pytest.mark.parametrize("tablets", [1, 5])
def test_together_and_alone_leave_the_same_behind(
    options: object, tablets: int, part_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memtable_module, "PART_ROWS", part_rows)
    chance = random.Random(7)
    disks = CrashVfs(), CrashVfs()
    together, alone = (open_store(vfs, options) for vfs in disks)  # type: ignore[arg-type]
    for number in range(1, tablets + 1):
        assert together.create_tablet(b"%d" % number) == alone.create_tablet(b"%d" % number) == number
    for step in range(40):
        asked = random_puts(chance, tablets)
        told = Told(asked)
        through(together, [told.puts])
        writes = singles(asked)
        through(alone, [*writes])
        assert told.together == [told.puts] and not told.alone
        assert told.puts.versions == [write.version for write in writes]
        if step % 10 == 0:
            assert state(together, tablets) == state(alone, tablets)
        for store in (together, alone):
            commit(store, 1, [(b"k07", None)])
            store.get(1, asked[0][1][0])
    assert state(together, tablets) == state(alone, tablets)
    assert together.stats()["writes"] == alone.stats()["writes"]
    opened = open_store(disks[0].crash(keep_everything), options)  # type: ignore[arg-type]
    assert state(opened, tablets) == state(alone, tablets)


def test_the_memory_they_take_is_counted() -> None:
    store, other = open_store(CrashVfs(), ROOMY), open_store(CrashVfs(), ROOMY)
    asked = [put(1, b"%d" % number, b"v" * 100) for number in range(50)] + [(1, [b"a", b"b"], [b"v", b"w"])]
    for one in (store, other):
        one.create_tablet(b"t")
    for _ in range(3):
        through(store, [Told(asked).puts])
        through(other, [*singles(asked)])
    assert store.stats()["memory_bytes"] == other.stats()["memory_bytes"]


def test_a_snapshot_keeps_what_was_there_before_them() -> None:
    store = open_store(CrashVfs(), ROOMY)
    tablet = store.create_tablet(b"t")
    through(store, [Told([put(tablet, b"a", b"1")]).puts])
    snapshot = store.snapshot([tablet])
    through(store, [Told([put(tablet, b"a", b"2"), put(tablet, b"b", b"2")]).puts])
    assert [snapshot.get(tablet, key) for key in (b"a", b"b")] == [b"1", None]
    assert [store.get(tablet, key) for key in (b"a", b"b")] == [b"2", b"2"]
    snapshot.close()


def test_a_row_read_from_a_table_and_put_again_reads_as_put() -> None:
    store = open_store(CrashVfs(), ROOMY)
    tablet = store.create_tablet(b"t")
    through(store, [Told([put(tablet, b"a", b"1")]).puts])
    store.flush()
    assert [store.get(tablet, b"a") for _ in range(3)] == [b"1"] * 3
    through(store, [Told([put(tablet, b"a", b"2"), put(tablet, b"b", b"2")]).puts])
    assert store.get(tablet, b"a") == b"2"


def test_only_the_puts_of_a_tablet_that_takes_none_are_refused() -> None:
    store = open_store(CrashVfs(), ROOMY)
    fenced, open_one = store.create_tablet(b"1"), store.create_tablet(b"2")
    store.fence_tablet(fenced)
    told = Told([put(fenced, b"a", b"1"), put(open_one, b"a", b"1"), put(99, b"a", b"1"), put(open_one, b"b", b"1")])
    through(store, [told.puts])
    assert not told.together
    assert [write.applied for write in told.alone] == [False, True, False, True]
    assert isinstance(told.alone[0].error, ShardUnavailable) and told.alone[2].error is not None
    assert scan(store, open_one) == {b"a": b"1", b"b": b"1"}


def test_a_write_that_is_judged_sees_the_puts_before_it_in_its_group() -> None:
    store = open_store(CrashVfs(), ROOMY)
    tablet = store.create_tablet(b"t")
    told = Told([put(tablet, b"a", b"1"), put(tablet, b"b", b"1")])
    delete = Write(tablet, [b"a", b"c"], DELETE, [b"", b""], want_existed=True)
    late = Told([put(tablet, b"a", b"2"), put(tablet, b"c", b"2")])
    absent = Write(tablet, [b"c"], PUT, [b"3"], conditions=[(b"c", 0)])
    through(store, [told.puts, delete, late.puts, absent])
    assert delete.existed == [True, False] and absent.error is not None
    assert [write.applied for write in (*told.alone, *late.alone)] == [True] * 4
    assert scan(store, tablet) == {b"a": b"2", b"b": b"1", b"c": b"2"}
