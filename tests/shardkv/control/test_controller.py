"""What the controller makes of wishes, reports and time: jobs that end, limits that hold, decisions that stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import count, pairwise

import msgspec
import pytest

from shardkv.control import changes, jobs
from shardkv.control.controller import Controller
from shardkv.control.keyspaces import create_keyspace, drop_keyspace
from shardkv.errors import InvalidArgument
from shardkv.topology.documents import ControllerSettings, JobDocument, NodeDocument
from shardkv.topology.view import Topology
from shardkv.wire.messages import MetaTxn
from tests.shardkv.control.world import Book

Carry = Callable[[Topology, int], MetaTxn | None]


class Play:
    """A controller over a book, with nodes that carry out what is begun at once, or as `carry` says."""

    def __init__(self, book: Book, **settings: object) -> None:
        self.book = book
        book.put(**{"settings/controller": ControllerSettings(**settings)})  # type: ignore[arg-type]
        numbers = count(1)
        self.controller = Controller(lambda: f"{next(numbers):016x}")
        self.now_ms = 0
        self.silent: set[str] = set()
        self.sizes: dict[int, int] = {}
        self.middles: dict[int, int | bytes] = {}
        self.most_busy = 0
        self.carry: Carry = lambda topology, shard: changes.commit(topology, shard, _change(topology, shard))

    def tick(self, times: int = 1, *, step_ms: int = 1000) -> None:
        for _ in range(times):
            self.now_ms += step_ms
            self.hear()
            for txn in self.controller.tick(self.book.topology, self.now_ms, self.now_ms):
                self.book.apply(txn)
            self._note_busy()
            for number in [shard.id for shard in self.book.topology.shards.values() if shard.change]:
                if number in self.book.topology.shards and self.book.shard(number).change:
                    txn = self.carry(self.book.topology, number)
                    if txn is not None:
                        self.book.apply(txn)

    def hear(self) -> None:
        for name in self.book.topology.nodes:
            if name not in self.silent:
                report = self.book.report(name, sizes=self.sizes)
                shards = [msgspec.structs.replace(each, middle=self.middles.get(each.shard)) for each in report.shards]
                self.controller.hear(msgspec.structs.replace(report, shards=shards), self.now_ms)

    def _note_busy(self) -> None:
        busy = Counter[str]()
        for shard in self.book.topology.shards.values():
            if shard.change:
                busy.update({shard.node, shard.change.target} - {""})
        self.most_busy = max(self.most_busy, *busy.values(), 0)

    def ask(self, txn: MetaTxn) -> None:
        assert self.book.apply(txn)

    def job(self, number: int = 1) -> JobDocument:
        return self.book.topology.jobs[number]

    def counts(self) -> Counter[str]:
        return Counter(shard.node for shard in self.book.topology.shards.values())


def _change(topology: Topology, shard: int) -> str:
    change = topology.shards[shard].change
    return change.id if change else ""


def _nothing(topology: Topology, shard: int) -> None:
    return None


def _abort(topology: Topology, shard: int) -> MetaTxn | None:
    return changes.abort(topology, shard, _change(topology, shard), "The disk of n2 is full.")


def test_a_new_node_gets_its_share_and_no_node_has_too_much_to_do() -> None:
    play = Play(Book("n1", "n2", shards=24))
    play.ask(jobs.ask_add(play.book.topology, "n3", 0))
    play.tick(3)
    assert play.job().state == "planned" and play.job().problem == "Node n3 has not joined yet."
    play.book.put(**{"nodes/n3": NodeDocument("n3", "s", 1, "n3:1", 1)})
    play.tick(20)
    assert play.job().state == "done"
    assert play.counts() == {"n1": 8, "n2": 8, "n3": 8}
    assert play.most_busy <= 2
    assert len(play.job().done) == 8


def test_a_removed_node_is_drained_then_unwanted() -> None:
    play = Play(Book("n1", "n2", "n3", shards=12))
    play.ask(jobs.ask_remove(play.book.topology, "n1", 0))
    play.tick(12)
    assert play.job().state == "done", play.job()
    assert play.counts() == {"n2": 6, "n3": 6}
    assert play.book.topology.wanted["n1"].state == "removed"
    with pytest.raises(InvalidArgument, match="removed already"):
        jobs.ask_remove(play.book.topology, "n1", 0)


def test_a_node_that_is_away_with_the_only_copy_is_waited_for_unless_the_loss_is_accepted() -> None:
    play = Play(Book("n1", "n2", shards=4))
    play.tick()
    play.silent.add("n1")
    play.carry = _nothing
    play.ask(jobs.ask_remove(play.book.topology, "n1", 0))
    play.tick(40)
    assert play.job().state == "running" and "only copy of 2 shards" in play.job().problem
    play.ask(jobs.ask_remove(play.book.topology, "n1", 0, accept_data_loss="n1"))
    play.tick(3)
    assert play.counts() == {"n2": 4}
    lost = next(shard for shard in play.book.topology.shards.values() if shard.source == "n1")
    assert (lost.owned_since, lost.epoch, lost.last_change) == (3, 3, "")


def test_the_last_node_cannot_be_removed() -> None:
    with pytest.raises(InvalidArgument, match="is the last one"):
        jobs.ask_remove(Book("n1").topology, "n1", 0)


def test_what_fails_is_tried_again_after_growing_pauses_and_then_said() -> None:
    play = Play(Book("n1", "n2", shards=2), attempts_max=3, backoff_ms=4000)
    play.carry = _abort
    play.ask(jobs.ask_move(play.book.topology, 1, "n2", 0))
    begun = []
    for _ in range(60):
        epoch = play.book.shard(1).epoch
        play.tick()
        if play.book.shard(1).epoch > epoch:
            begun.append(play.now_ms)
    assert [later - earlier for earlier, later in pairwise(begun)] == [4000, 8000]
    assert play.job().state == "failed"
    assert play.job().problem == "Shard 1 was tried 3 times. The disk of n2 is full."


def test_a_cancelled_job_aborts_what_is_under_way_and_begins_nothing() -> None:
    play = Play(Book("n1", "n2", shards=2))
    play.carry = _nothing
    play.ask(jobs.ask_move(play.book.topology, 1, "n2", 0))
    stale = play.book.topology
    play.tick()
    assert play.book.shard(1).change is not None
    play.ask(jobs.cancel(play.book.topology, 1))
    play.tick(2)
    assert (play.job().state, play.book.shard(1).change, play.book.shard(1).epoch) == ("cancelled", None, 2)
    for txn in play.controller.tick(stale, play.now_ms, play.now_ms):
        assert not play.book.apply(txn), "what another controller planned before is too late"


def test_a_paused_job_says_so_to_its_changes_and_goes_on_when_resumed() -> None:
    play = Play(Book("n1", "n2", shards=2), stuck_ms=5000)
    play.carry = _nothing
    play.ask(jobs.ask_move(play.book.topology, 1, "n2", 0))
    play.tick()
    play.ask(jobs.pause(play.book.topology, 1))
    play.tick(20)
    change = play.book.shard(1).change
    assert change is not None and change.paused, "a paused change is not stuck"
    play.ask(jobs.set_rate(play.book.topology, 1, 5_000_000))
    play.ask(jobs.resume(play.book.topology, 1))
    play.tick()
    change = play.book.shard(1).change
    assert change is not None and (change.paused, change.rate_bytes_s) == (False, 5_000_000)
    play.carry = lambda topology, shard: changes.commit(topology, shard, _change(topology, shard))
    play.tick(2)
    assert (play.job().state, play.book.shard(1).node) == ("done", "n2")


@pytest.mark.parametrize("cause", ["stuck", "restarted", "away"])
def test_changes_that_cannot_end_well_are_aborted(cause: str) -> None:
    play = Play(Book("n1", "n2", shards=2), stuck_ms=30_000, away_ms=10_000)
    play.carry = _nothing
    play.ask(jobs.ask_move(play.book.topology, 1, "n2", 0))
    play.tick()
    if cause == "restarted":
        play.book.put(**{"nodes/n2": NodeDocument("n2", "s", 2, "n2:1", 1)})
    if cause == "away":
        play.silent.add("n2")
    play.tick(35 if cause == "stuck" else 12)
    words = {"stuck": "no progress", "restarted": "started again", "away": "not heard of"}[cause]
    assert words in play.book.shard(1).problem
    assert play.book.shard(1).epoch > 1


def test_a_split_and_a_merge_across_two_nodes() -> None:
    play = Play(Book("n1", "n2", shards=2))
    play.ask(jobs.ask_split(play.book.topology, 1, 0))
    play.tick(3)
    assert play.job(1).state == "done" and play.job(1).done == [3, 4]
    play.book.topology.keyspace("default").check()
    play.ask(jobs.ask_merge(play.book.topology, 4, 2, 0))
    play.tick(5)
    assert play.job(2).state == "done" and play.job(2).done == [5]
    play.book.topology.keyspace("default").check()
    assert play.book.shard(5).parents in ([], [4, 2], [4, 2, 1])
    play.tick(3)
    assert play.book.shard(5).parents == [], "nobody has a tablet of them any more"


def test_ids_are_given_once_also_after_their_shards_are_gone() -> None:
    play = Play(Book("n1", shards=2))
    seen = set(play.book.topology.shards)
    for number in range(4):
        shards = play.book.topology.keyspace("default").shards
        play.ask(jobs.ask_merge(play.book.topology, shards[0].id, shards[1].id, 0))
        play.tick(4)
        play.ask(jobs.ask_split(play.book.topology, max(play.book.topology.shards), 0))
        play.tick(4)
        fresh = set(play.book.topology.shards)
        assert not fresh & seen, number
        seen |= fresh


def test_large_shards_split_small_ones_merge_and_neither_undoes_the_other() -> None:
    settings = {"split_bytes": 1000, "merge_bytes": 900, "merge_quiet_ms": 10_000}
    play = Play(Book("n1", shards=1), **settings)
    play.sizes, play.middles = {1: 1000}, {1: 2**63}
    play.tick(3)
    assert len(play.book.topology.shards) == 2
    play.sizes = dict.fromkeys(play.book.topology.shards, 500)
    play.tick(60)
    assert len(play.book.topology.shards) == 2, "halves of what splits do not merge"
    play.sizes = dict.fromkeys(play.book.topology.shards, 120)
    play.tick(5)
    assert len(play.book.topology.shards) == 2, "not before they were quiet for long"
    play.tick(15)
    assert len(play.book.topology.shards) == 1
    play.tick(30)
    assert len(play.book.topology.shards) == 1


def test_nothing_splits_or_merges_by_itself_when_switched_off_or_where_no_token_halves() -> None:
    play = Play(Book("n1", shards=1), split_bytes=1000, auto_split=False)
    play.sizes, play.middles = {1: 5000}, {1: 2**63}
    play.tick(5)
    assert len(play.book.topology.shards) == 1
    play = Play(Book("n1", shards=1), split_bytes=1000)
    play.sizes, play.middles = {1: 5000}, {1: 0}
    play.tick(5)
    assert len(play.book.topology.shards) == 1


def test_what_lies_under_one_token_of_a_hash_keyspace_is_not_split_for_ever() -> None:
    play = Play(Book("n1", shards=1), split_bytes=1000, merge_bytes=0)
    for _ in range(60):
        topology = play.book.topology
        hot = min(topology.keyspace("default").shards, key=lambda shard: shard.start)
        play.sizes = {shard: 5000 if shard == hot.id else 0 for shard in topology.shards}
        play.tick()
    assert 2 <= len(play.book.topology.shards) <= 8
    evenly = Play(Book("n1", shards=1), split_bytes=1000, merge_bytes=0)
    for _ in range(60):
        shards = evenly.book.topology.keyspace("default").shards
        width = {shard.id: ((shard.stop or 2**64) - shard.start) for shard in shards}  # type: ignore[operator]
        evenly.sizes = {shard: 16_000 * each // 2**64 for shard, each in width.items()}
        evenly.tick()
    assert len(evenly.book.topology.shards) == 32


def test_a_keyspace_is_made_in_pieces_and_dropped_once_no_tablet_is_left() -> None:
    play = Play(Book("n1", "n2", shards=1))
    play.ask(create_keyspace(play.book.topology, "users", "range", shards=150))
    assert "users" not in play.book.topology.keyspaces
    late = play.controller.tick(play.book.topology, 0, 0)
    play.tick(4)
    view = play.book.topology.keyspace("users")
    view.check()
    assert len(view.shards) == 150
    assert not any(play.book.apply(txn) for txn in late), "a piece that comes late puts no shard"
    with pytest.raises(InvalidArgument, match="exists"):
        create_keyspace(play.book.topology, "users", "hash", shards=1)
    play.ask(drop_keyspace(play.book.topology, "users"))
    assert "users" not in play.book.topology.keyspaces
    play.silent.add("n2")
    play.tick(8)
    assert len(play.book.topology.shards) == 151, "n2 may have tablets still"
    play.silent.clear()
    play.hear = _reporting_no_tablets(play)  # type: ignore[method-assign]
    play.tick(8)
    assert set(play.book.topology.keyspace_documents) == {"default"}
    assert len(play.book.topology.shards) == 1


def _reporting_no_tablets(play: Play) -> Callable[[], None]:
    def hear() -> None:
        for name in play.book.topology.nodes:
            play.controller.hear(play.book.report(name, shards=[]), play.now_ms)

    return hear


def test_ended_jobs_are_forgotten_the_oldest_first() -> None:
    play = Play(Book("n1", "n2", shards=2), jobs_kept=2)
    for _ in range(5):
        play.ask(jobs.ask_rebalance(play.book.topology, 0))
    play.tick(5)
    assert sorted(play.book.topology.jobs) == [4, 5]
    assert {job.state for job in play.book.topology.jobs.values()} == {"done"}


def test_clocks_of_the_day_that_jump_only_delay() -> None:
    play = Play(Book("n1", "n2", shards=2), backoff_most_ms=3000)
    play.carry = _abort
    play.ask(jobs.ask_move(play.book.topology, 1, "n2", 0))
    play.now_ms = 10**9
    play.tick()
    play.hear()
    for wall_ms in (0, 0):
        for txn in play.controller.tick(play.book.topology, play.now_ms, wall_ms):
            play.book.apply(txn)
    assert play.book.shard(1).change is not None, "a time in the far future is no reason to wait"
