"""Chores: files go and memory is freed in a thread, in short steps, and nothing is left when the store is closed."""

from __future__ import annotations

import threading
from pathlib import Path

from shardkv_node.engine import Engine
from shardkv_node.engine.chores import InlineChores, ThreadChores


def test_chores_are_done_in_order_step_by_step() -> None:
    chores = ThreadChores()
    gate = threading.Event()
    done: list[tuple[str, int, int]] = []

    def chore(name: str, steps: int) -> None:
        left = [steps]

        def step() -> bool:
            gate.wait()
            left[0] -= 1
            done.append((name, left[0], threading.get_ident()))
            return left[0] > 0

        chores.submit(step)

    chore("first", 2)
    chore("second", 1)
    assert done == [], "the caller does not wait"
    gate.set()
    chores.close()
    assert [entry[:2] for entry in done] == [("first", 1), ("first", 0), ("second", 0)]
    assert threading.get_ident() not in {entry[2] for entry in done}
    chore("late", 1)
    assert done[-1] == ("late", 0, threading.get_ident())


def test_inline_chores_are_done_at_once() -> None:
    left = [3]

    def step() -> bool:
        left[0] -= 1
        return left[0] > 0

    InlineChores().submit(step)
    assert left == [0]


def test_files_that_were_replaced_are_gone_when_the_store_is_closed(tmp_path: Path) -> None:
    with Engine.open(tmp_path, durability="os", disk_reserve_bytes=0, memtable_bytes_max=64 * 1024) as engine:
        for number in range(2000):
            engine.put(b"%06d" % number, b"v" * 100)
        engine.compact()
        tables = sum(engine.stats().get(f"level{level}_tables", 0) for level in range(7))
    assert len(list(tmp_path.rglob("*.sst"))) == tables
    assert len(list(tmp_path.rglob("*.wal"))) <= 2
