"""What every back end of the metadata store promises, asked of each: embedded, and a real etcd."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from contextlib import suppress

import pytest

from shardkv.errors import InvalidArgument
from shardkv.metadata.store import Changes, MetaStore
from shardkv.metadata.view import StoreView
from shardkv.wire.messages import MetaCompare, MetaPut, MetaTxnReply
from tests.shardkv.metadata.conftest import Run


async def put(store: MetaStore, key: str, value: bytes | None, *, known: int | None = None) -> MetaTxnReply:
    compares = [] if known is None else [MetaCompare(key, known)]
    return await store.txn(compares, [MetaPut(key, value)])


async def content(store: MetaStore, prefix: str = "") -> dict[str, bytes | None]:
    return {entry.key: entry.value for entry in (await store.read(prefix)).entries}


class Followed:
    """A view that follows the store in the background, and what it was told."""

    def __init__(self, store: MetaStore, since: int = 0) -> None:
        self.view = StoreView()
        self.told: list[Changes] = []
        self._task = asyncio.ensure_future(store.follow(since, self._take))

    def _take(self, changes: Changes) -> None:
        self.told.append(changes)
        self.view.take(changes)

    async def until(self, holds: Callable[[StoreView], object]) -> None:
        while not holds(self.view):
            assert not self._task.done(), self._task
            await self.view.moved(0.05)

    async def stop(self) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task


class TestEveryBackEnd:
    def test_an_empty_store_has_nothing(self, run: Run) -> None:
        async def story(store: MetaStore) -> None:
            assert await store.get("a") is None
            assert await content(store) == {}

        run(story)

    def test_a_transaction_writes_all_its_keys_at_its_own_revision(self, run: Run) -> None:
        async def story(store: MetaStore) -> None:
            first = await put(store, "c", b"3")
            reply = await store.txn([], [MetaPut("b", b"2"), MetaPut("a", b"1")])
            assert (reply.applied, reply.revision > first.revision) == (True, True)
            entries = (await store.read("")).entries
            assert [(e.key, e.value, e.revision) for e in entries] == [
                ("a", b"1", reply.revision),
                ("b", b"2", reply.revision),
                ("c", b"3", first.revision),
            ]

        run(story)

    def test_one_failed_compare_applies_nothing(self, run: Run) -> None:
        async def story(store: MetaStore) -> None:
            known = (await put(store, "a", b"1")).revision
            compares = [MetaCompare("a", known), MetaCompare("b", known)]
            reply = await store.txn(compares, [MetaPut("a", b"2"), MetaPut("b", b"2")])
            assert (reply.applied, reply.revision) == (False, known)
            assert await content(store) == {"a": b"1"}

        run(story)

    def test_revision_zero_means_the_key_must_not_exist(self, run: Run) -> None:
        async def story(store: MetaStore) -> None:
            first = await put(store, "a", b"1", known=0)
            assert first.applied
            assert not (await put(store, "a", b"2", known=0)).applied
            gone = await put(store, "a", None, known=first.revision)
            assert gone.applied
            assert not (await put(store, "a", b"3", known=gone.revision)).applied
            assert (await put(store, "a", b"3", known=0)).applied

        run(story)

    def test_a_key_put_twice_in_one_transaction_is_refused(self, run: Run) -> None:
        async def story(store: MetaStore) -> None:
            with pytest.raises(InvalidArgument):
                await store.txn([], [MetaPut("a", b"1"), MetaPut("a", b"2")])
            assert await content(store) == {}

        run(story)

    def test_a_prefix_ends_where_its_family_ends(self, run: Run) -> None:
        async def story(store: MetaStore) -> None:
            for key in ("nodes", "nodes/a", "nodes0", "nodes/\U0010fffe"):
                await put(store, key, b"1")
            assert list(await content(store, "nodes/")) == ["nodes/a", "nodes/\U0010fffe"]

        run(story)

    def test_thousands_of_keys_go_in_one_transaction_and_are_read_as_of_one_revision(self, run: Run) -> None:
        async def story(store: MetaStore) -> None:
            many = {f"shards/{number:05}": b"%d" % number * 20 for number in range(6_000)}
            reply = await store.txn([MetaCompare("keyspace", 0)], [MetaPut(k, v) for k, v in many.items()])
            assert reply.applied
            assert await content(store, "shards/") == many
            reply = await store.txn([MetaCompare("shards/00000", 0)], [MetaPut(k, None) for k in many])
            assert not reply.applied
            assert len(await content(store)) == 6_000

        run(story)

    def test_of_transactions_at_once_on_one_revision_one_wins(self, run: Run) -> None:
        async def story(store: MetaStore) -> None:
            known = (await put(store, "a", b"0")).revision
            replies = await asyncio.gather(*(put(store, "a", b"%d" % n, known=known) for n in range(20)))
            assert [reply.applied for reply in replies].count(True) == 1

        run(story)

    def test_a_follower_is_told_of_every_change_and_every_delete(self, run: Run) -> None:
        async def story(store: MetaStore) -> None:
            await put(store, "before", b"1")
            followed = Followed(store)
            await followed.until(lambda view: view.get("before"))
            await store.txn([], [MetaPut("a", b"1"), MetaPut("b", b"1")])
            gone = await put(store, "a", None)
            await followed.until(lambda view: view.revision >= gone.revision)
            assert {entry.key for entry in followed.view.entries()} == {"before", "b"}
            deletes = [e.key for changes in followed.told for e in changes.entries if e.value is None]
            assert deletes == ["a"]
            await followed.stop()

        run(story)

    def test_one_transaction_is_told_in_one_go(self, run: Run) -> None:
        async def story(store: MetaStore) -> None:
            followed = Followed(store)
            await followed.until(lambda view: view.revision >= 0)
            for number in range(30):
                await store.txn([], [MetaPut("left", b"%d" % number), MetaPut("right", b"%d" % number)])
            await followed.until(lambda view: (view.get("left") or MetaPut("", b"")).value == b"29")
            for changes in followed.told[1:]:
                values = {entry.key: entry.value for entry in changes.entries}
                assert values.get("left") == values.get("right")
            await followed.stop()

        run(story)

    def test_who_follows_again_is_told_what_was_missed(self, run: Run) -> None:
        async def story(store: MetaStore) -> None:
            await put(store, "kept", b"1")
            seen = (await put(store, "gone", b"1")).revision
            await put(store, "gone", None)
            newest = (await put(store, "new", b"1")).revision
            followed = Followed(store, since=seen)
            await followed.until(lambda view: view.revision >= newest)
            told = {entry.key: entry.value for changes in followed.told for entry in changes.entries}
            assert told == {"gone": None, "new": b"1"}
            await followed.stop()

        run(story)

    def test_a_key_attached_to_a_lease_vanishes_when_it_is_not_kept_alive(self, run: Run) -> None:
        async def story(store: MetaStore) -> None:
            followed = Followed(store)
            lease = await store.grant(2)
            assert (await store.txn([], [MetaPut("leased", b"1")], lease=lease)).applied
            await put(store, "lasting", b"1")
            await followed.until(lambda view: view.get("leased") and view.get("lasting"))
            await followed.until(lambda view: view.get("leased") is None)
            assert await content(store) == {"lasting": b"1"}
            assert await store.keep_alive(lease) == 0
            await followed.stop()

        run(story)

    def test_a_lease_that_is_kept_alive_lasts(self, run: Run) -> None:
        async def story(store: MetaStore) -> None:
            loop = asyncio.get_running_loop()
            lease = await store.grant(2)
            await store.txn([], [MetaPut("leased", b"1")], lease=lease)
            end = loop.time() + 4
            while loop.time() < end:
                assert await store.keep_alive(lease) >= 2
                await asyncio.sleep(0.3)
            assert await content(store) == {"leased": b"1"}

        run(story)

    def test_a_revoked_lease_takes_its_keys_along_at_once_and_can_get_no_more(self, run: Run) -> None:
        async def story(store: MetaStore) -> None:
            lease = await store.grant(60)
            await store.txn([], [MetaPut("leased", b"1"), MetaPut("also", b"1")], lease=lease)
            await store.revoke(lease)
            assert await content(store) == {}
            assert not (await store.txn([], [MetaPut("late", b"1")], lease=lease)).applied
            assert await content(store) == {}
            await store.revoke(lease)

        run(story)

    def test_a_key_put_anew_without_the_lease_outlives_it(self, run: Run) -> None:
        async def story(store: MetaStore) -> None:
            lease = await store.grant(60)
            await store.txn([], [MetaPut("a", b"1")], lease=lease)
            await put(store, "a", b"2")
            await store.revoke(lease)
            assert await content(store) == {"a": b"2"}

        run(story)

    def test_views_of_random_histories_end_up_as_the_store(self, run: Run) -> None:
        async def story(store: MetaStore) -> None:
            early = Followed(store)
            numbers = itertools.cycle([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5])
            for step in range(60):
                key = f"k{next(numbers)}"
                reply = await put(store, key, None if step % 3 == 0 else b"%d" % step)
            late = Followed(store)
            last = (await put(store, "last", b"1")).revision
            for followed in (early, late):
                await followed.until(lambda view: view.revision >= last)
                assert {e.key: e.value for e in followed.view.entries()} == await content(store)
                await followed.stop()
            assert reply.revision < last

        run(story)
