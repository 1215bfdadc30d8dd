"""One controller at a time: who leads, when another takes over, and what a leader of the past can still do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from shardkv.errors import MetadataUnavailable, OutcomeUnknown
from shardkv.metadata.leading import LEADER_KEY, Leading, Term
from shardkv.metadata.store import MetaStore
from shardkv.metadata.view import StoreView
from shardkv.wire.messages import MetaPut
from tests.shardkv.metadata.conftest import Run

LEASE_S = 2.0


class Candidate:
    """Stands for leader, with a view of its own. `term` is what it is told; None while it is not led to lead."""

    def __init__(self, store: MetaStore, name: str) -> None:
        self.store = store
        self.name = name
        self.term: Term | None = None
        self.ended = asyncio.Event()
        self.view = StoreView()
        self.leading = Leading(store, self.view, name.encode(), lease_s=LEASE_S)
        self._following = asyncio.ensure_future(store.follow(0, self.view.take))
        self.running = asyncio.ensure_future(self.leading.run(self._lead))

    async def _lead(self, term: Term) -> None:
        self.term = term
        try:
            await asyncio.Event().wait()
        finally:
            self.term = None
            self.ended.set()

    async def stop(self) -> None:
        for task in (self.running, self._following):
            task.cancel()
        await asyncio.gather(self.running, self._following, return_exceptions=True)


@asynccontextmanager
async def candidates(store: MetaStore, count: int) -> AsyncIterator[list[Candidate]]:
    standing = [Candidate(store, f"meta-{number}") for number in range(count)]
    try:
        yield standing
    finally:
        for candidate in standing:
            await candidate.stop()


async def leader_of(standing: list[Candidate]) -> Candidate:
    """The one that leads, once one does."""
    while not (leading := [candidate for candidate in standing if candidate.term is not None]):
        await asyncio.sleep(0.01)
    (leader,) = leading
    return leader


def test_of_several_one_leads_and_when_it_stops_another_does_at_once(run: Run) -> None:
    async def story(store: MetaStore) -> None:
        loop = asyncio.get_running_loop()
        async with candidates(store, 3) as standing:
            left = standing
            while left:
                leader = await leader_of(left)
                entry = await store.get(LEADER_KEY)
                assert entry is not None
                assert entry.value == leader.name.encode()
                left = [candidate for candidate in left if candidate is not leader]
                stopped = loop.time()
                await leader.stop()
                if left:
                    await leader_of(left)
                    assert loop.time() - stopped < LEASE_S / 2

    run(story)


def test_a_leader_that_died_is_followed_within_its_lease(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(store: MetaStore) -> None:
        loop = asyncio.get_running_loop()

        async def no_farewell(lease: int) -> None:
            """The process is gone: nothing is revoked."""

        async with candidates(store, 3) as standing:
            leader = await leader_of(standing)
            monkeypatch.setattr(leader.leading, "_end", no_farewell)
            died = loop.time()
            await leader.stop()
            await leader_of([candidate for candidate in standing if candidate is not leader])
            assert loop.time() - died < LEASE_S + 2

    run(story)


def test_a_leader_that_cannot_keep_its_lease_stops_in_time(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(store: MetaStore) -> None:
        loop = asyncio.get_running_loop()

        async def cut_off(*_: object, **__: object) -> float:
            raise MetadataUnavailable("The link is cut.")

        async with candidates(store, 1) as (leader,):
            term = (await leader_of([leader])).term
            assert term is not None
            assert term.held
            began = loop.time()
            with monkeypatch.context() as patch:
                patch.setattr(store, "keep_alive", cut_off)
                patch.setattr(store, "grant", cut_off)
                await leader.ended.wait()
                assert not term.held
                assert loop.time() - began < LEASE_S + 0.5
            again = (await leader_of([leader])).term
            assert again is not None
            assert again.compare.revision > term.compare.revision

    run(story)


def test_what_a_leader_of_the_past_still_sends_is_refused(run: Run) -> None:
    async def story(store: MetaStore) -> None:
        async with candidates(store, 2) as standing:
            leader = await leader_of(standing)
            term = leader.term
            assert term is not None
            assert (await store.txn([term.compare], [MetaPut("a", b"in time")])).applied
            await leader.stop()
            term.until = float("inf")
            assert not (await store.txn([term.compare], [MetaPut("a", b"too late")])).applied
            await leader_of([candidate for candidate in standing if candidate is not leader])
            assert not (await store.txn([term.compare], [MetaPut("a", b"far too late")])).applied
            entry = await store.get("a")
            assert entry is not None
            assert entry.value == b"in time"

    run(story)


def test_an_attempt_to_lead_that_went_wrong_leaves_no_key_behind(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(store: MetaStore) -> None:
        loop = asyncio.get_running_loop()
        began, real = loop.time(), store.txn
        lost: list[int] = []

        async def txn(compares: object, puts: object, *, lease: int = 0) -> object:
            reply = await real(compares, puts, lease=lease)  # type: ignore[arg-type]
            if not lost:
                lost.append(lease)
                raise OutcomeUnknown("The answer was lost.")
            return reply

        monkeypatch.setattr(store, "txn", txn)
        async with candidates(store, 1) as (candidate,):
            term = (await leader_of([candidate])).term
            assert term is not None
            assert term.lease != lost[0]
            assert loop.time() - began < LEASE_S / 2
            assert await store.keep_alive(lost[0]) == 0

    run(story)
