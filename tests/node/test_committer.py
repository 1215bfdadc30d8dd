"""Group commit: what is acknowledged when, what one failed sync means for everyone, and what waiting may cost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from shardkv.errors import DeadlineExceeded, Overloaded, StorageError, StorePoisoned
from shardkv.limits import DEFAULT_LIMITS, Limits
from shardkv_node import committer as committer_module
from shardkv_node.committer import Committer
from shardkv_node.engine.options import Options
from shardkv_node.engine.puts import Puts
from shardkv_node.engine.store import Store
from shardkv_node.engine.syncer import Done, attempt
from shardkv_node.engine.write import Write
from tests.node.engine.crash_vfs import CrashVfs


class HeldSyncer:
    """Syncs when the test says so."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Callable[[], None], Done]] = []

    def submit(self, sync: Callable[[], None], done: Done, *, delay_s: float = 0.0) -> None:
        self.waiting.append((sync, done))

    def hurry(self) -> None: ...

    def close(self) -> None: ...

    def finish(self) -> None:
        sync, done = self.waiting.pop(0)
        done(attempt(sync))

    def fail(self) -> None:
        _, done = self.waiting.pop(0)
        done(StorageError("The disk is gone."))


@dataclass
class World:
    store: Store
    syncer: HeldSyncer
    committer: Committer
    tablet: int
    fatal: list[StorageError]
    ended: list[Write] = field(default_factory=list)

    def put(self, key: bytes, value: bytes = b"v", *, deadline: float | None = None) -> Write:
        write = Write(self.tablet, [key], 1, [value], done=self.ended.append)
        self.committer.submit(write, deadline)
        return write

    def put_together(self, *keys: bytes, deadlines: Sequence[float | None] | None = None) -> None:
        """Puts of these keys in one go; in `ended` each is a write of its own, however it ended."""

        def apart() -> list[Write]:
            return [Write(self.tablet, [key], 1, [b"v"], done=self.ended.append) for key in keys]

        def done(puts: Puts) -> None:
            self.ended += [replace(write, applied=True) for write in puts.apart()]

        puts = Puts([self.tablet] * len(keys), [[key] for key in keys], [[b"v"]] * len(keys), apart=apart, done=done)
        self.committer.submit_puts(puts, deadlines or [None] * len(keys))

    def fates(self) -> list[tuple[bytes, bool | type[Exception]]]:
        """Each write that ended: its key, and whether it was applied or what it failed with."""
        return [(write.keys[0], type(write.error) if write.error else write.applied) for write in self.ended]


def run(
    story: Callable[[World], Coroutine[Any, Any, None]], durability: Any = "always", limits: Limits = DEFAULT_LIMITS
) -> None:
    async def main() -> None:
        syncer, fatal = HeldSyncer(), list[StorageError]()
        options = Options(durability=durability, workers=0, disk_reserve_bytes=0)
        store = Store.open("/store", options, post=lambda work: work(), vfs=CrashVfs(), syncer=syncer)
        committer = Committer(store, on_fatal=fatal.append, limits=limits)
        await story(World(store, syncer, committer, store.create_tablet(b"1"), fatal))

    asyncio.run(main())


async def turn() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


def test_a_write_is_neither_seen_nor_acknowledged_before_its_sync() -> None:
    async def story(w: World) -> None:
        write = w.put(b"k")
        await turn()
        assert len(w.syncer.waiting) == 1
        assert not w.ended
        assert w.store.get(w.tablet, b"k") is None
        w.syncer.finish()
        assert w.ended == [write]
        assert (write.applied, write.error) == (True, None)
        assert w.store.get(w.tablet, b"k") == b"v"

    run(story)


def test_an_acknowledged_write_survives_the_power() -> None:
    async def main() -> None:
        vfs, syncer = CrashVfs(), HeldSyncer()
        options = Options(workers=0, disk_reserve_bytes=0)
        store = Store.open("/store", options, post=lambda work: work(), vfs=vfs, syncer=syncer)
        w = World(store, syncer, Committer(store, on_fatal=print), store.create_tablet(b"1"), [])
        w.put(b"k")
        await turn()
        syncer.finish()
        assert w.ended
        after = Store.open("/store", options, post=lambda work: work(), vfs=vfs.crash(), syncer=HeldSyncer())
        assert after.get(w.tablet, b"k") == b"v"

    asyncio.run(main())


def test_what_arrives_during_a_sync_forms_the_next_group_in_order() -> None:
    async def story(w: World) -> None:
        w.put(b"k", b"1")
        await turn()
        w.put(b"k", b"2")
        w.put(b"k", b"3")
        await turn()
        assert len(w.syncer.waiting) == 1, "one group at a time"
        w.syncer.finish()
        assert w.store.get(w.tablet, b"k") == b"1"
        await turn()
        w.syncer.finish()
        assert w.store.get(w.tablet, b"k") == b"3"
        assert w.committer.groups == 2
        assert w.committer.idle

    run(story)


def test_a_failed_sync_is_fatal_and_acknowledges_nothing() -> None:
    async def story(w: World) -> None:
        first = w.put(b"k")
        await turn()
        second = w.put(b"later")
        w.syncer.fail()
        await turn()
        assert isinstance(first.error, StorePoisoned)
        assert not first.applied
        assert isinstance(w.fatal[0], StorePoisoned)
        assert not second.applied
        assert w.store.get(w.tablet, b"k") is None
        assert not w.syncer.waiting, "no sync is tried again"

    run(story)


def test_a_store_poisoned_behind_our_back_is_fatal_at_the_next_write() -> None:
    async def story(w: World) -> None:
        w.put(b"k")
        await turn()
        assert w.ended[0].applied
        w.syncer.fail()
        with pytest.raises(StorePoisoned):
            w.put(b"k", b"2")
        assert isinstance(w.fatal[0], StorePoisoned)

    run(story, "interval")


def test_a_group_that_cannot_be_applied_is_fatal() -> None:
    async def story(w: World) -> None:
        w.put(b"k")
        await turn()
        w.store.apply_group = lambda group: 1 / 0  # type: ignore[method-assign, assignment, return-value]
        w.syncer.finish()
        assert "could not be applied" in w.fatal[0].message

    run(story)


def test_a_write_whose_time_is_over_in_the_queue_is_not_applied() -> None:
    async def story(w: World) -> None:
        w.put(b"first")
        await turn()
        late = w.put(b"late", deadline=asyncio.get_running_loop().time() + 0.01)
        await asyncio.sleep(0.03)
        w.syncer.finish()
        await turn()
        assert isinstance(late.error, DeadlineExceeded)
        assert not w.syncer.waiting
        assert w.store.get(w.tablet, b"late") is None

    run(story)


def test_waiting_writes_are_bounded_however_small_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(committer_module, "QUEUED_BYTES_MAX", 100_000)

    async def story(w: World) -> None:
        w.put(b"first")
        await turn()
        with pytest.raises(Overloaded):
            for _ in range(1000):
                w.put(b"k")
        w.syncer.finish()
        await turn()
        w.put(b"room again")

    run(story)


def test_room_in_the_queue_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(committer_module, "QUEUED_BYTES_MAX", 5_000)

    async def story(w: World) -> None:
        for _ in range(20):
            w.put(b"a")
            w.put(b"b")
            await turn()
            w.syncer.finish()
        assert len(w.ended) == 40

    run(story)


def test_a_group_is_closed_at_its_size() -> None:
    async def story(w: World) -> None:
        w.put(b"first")
        await turn()
        for number in range(3):
            w.put(b"%d" % number, bytes(5 << 20))
        w.syncer.finish()
        await turn()
        w.syncer.finish()
        assert len(w.ended) == 3, "two of five MiB fill a group"
        await turn()
        w.syncer.finish()
        assert len(w.ended) == 4

    run(story)


def test_writes_wait_while_the_store_is_stalled(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(w: World) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Store, "stalled", property(lambda _: True))
            w.put(b"k")
            await turn()
            assert not w.syncer.waiting
        assert w.store.on_progress is not None
        w.store.on_progress()
        await turn()
        w.syncer.finish()
        assert w.ended[0].applied

    run(story)


def test_puts_together_are_neither_seen_nor_acknowledged_before_their_sync() -> None:
    async def story(w: World) -> None:
        w.put_together(b"a", b"b")
        await turn()
        assert len(w.syncer.waiting) == 1
        assert not w.ended
        assert w.store.get(w.tablet, b"a") is None
        w.syncer.finish()
        assert w.fates() == [(b"a", True), (b"b", True)]
        assert (w.committer.groups, w.committer.writes, w.committer.idle) == (1, 2, True)

    run(story)


def test_a_failed_sync_fails_each_of_the_puts_together() -> None:
    async def story(w: World) -> None:
        w.put_together(b"a", b"b")
        await turn()
        w.put_together(b"c", b"d")
        w.syncer.fail()
        await turn()
        assert w.fates()[:2] == [(b"a", StorePoisoned), (b"b", StorePoisoned)]
        assert isinstance(w.fatal[0], StorePoisoned)
        assert w.store.get(w.tablet, b"a") is None
        assert not w.syncer.waiting

    run(story)


def test_of_puts_together_only_those_whose_time_is_over_are_not_applied() -> None:
    async def story(w: World) -> None:
        w.put(b"first")
        await turn()
        soon = asyncio.get_running_loop().time() + 0.01
        w.put_together(b"a", b"late", b"c", deadlines=[None, soon, soon + 1000])
        await asyncio.sleep(0.03)
        w.syncer.finish()
        await turn()
        w.syncer.finish()
        assert sorted(w.fates()[1:]) == [(b"a", True), (b"c", True), (b"late", DeadlineExceeded)]
        assert w.store.get(w.tablet, b"late") is None
        assert w.committer.idle

    run(story)


def test_each_of_the_puts_together_counts_for_one_write_in_a_group() -> None:
    async def story(w: World) -> None:
        w.put(b"first")
        await turn()
        w.put_together(b"a", b"b", b"c")
        w.put_together(b"d", b"e", b"f")
        w.syncer.finish()
        await turn()
        w.syncer.finish()
        assert [key for key, _ in w.fates()] == [b"first", b"a", b"b", b"c", b"d"], "half of the eight in flight"
        await turn()
        w.syncer.finish()
        assert w.fates()[1:] == [(key, True) for key in (b"a", b"b", b"c", b"d", b"e", b"f")]
        assert w.committer.idle

    run(story, limits=Limits(requests_in_flight_max=8))


def test_of_puts_together_the_latest_are_refused_when_the_queue_stands() -> None:
    async def story(w: World) -> None:
        w.put(b"first")
        await turn()
        w.put_together(b"a", b"b", b"c")
        while not w.ended:
            await asyncio.sleep(0.01)
        assert w.fates() == [(b"c", Overloaded)], "a quarter of the eight in flight may wait"
        w.syncer.finish()
        await turn()
        w.syncer.finish()
        assert w.fates()[2:] == [(b"a", True), (b"b", True)]
        assert w.committer.idle

    run(story, limits=Limits(requests_in_flight_max=8))


def test_a_barrier_comes_when_all_before_it_have_ended_and_nothing_behind_it_has() -> None:
    async def story(world: World) -> None:
        reached: list[list[bytes]] = []

        def note() -> None:
            reached.append([write.keys[0] for write in world.ended])

        world.committer.barrier(note)
        assert reached == [[]], "nothing is before it"
        world.put(b"a")
        await turn()
        world.put(b"b")
        world.put_together(b"c", b"d")
        world.committer.barrier(note)
        world.put(b"e")
        world.syncer.finish()
        await turn()
        assert reached == [[]]
        world.syncer.finish()
        await turn()
        assert reached == [[], [b"a", b"b", b"c", b"d"]]
        world.syncer.finish()
        await turn()
        assert [write.keys[0] for write in world.ended] == [b"a", b"b", b"c", b"d", b"e"]

    run(story)


def test_a_barrier_stays_where_it_is_when_the_latest_writes_are_refused() -> None:
    async def story(world: World) -> None:
        reached: list[int] = []
        world.put(b"first")
        await turn()
        for number in range(20):
            world.put(b"%d" % number)
        world.committer.barrier(lambda: reached.append(len(world.ended)))
        await asyncio.sleep(2 * committer_module.STANDING_S)
        assert not reached
        assert any(isinstance(write.error, Overloaded) for write in world.ended)
        for _ in range(2):
            world.syncer.finish()
            await turn()
        assert reached == [21]

    run(story, limits=replace(DEFAULT_LIMITS, requests_in_flight_max=32))
