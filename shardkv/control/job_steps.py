"""The next step of one job: what arrived is noted, what was overtaken is skipped, what is due is begun.

Invariant: a step is one transaction that compares the job's document, so steps of two controllers never mix, and a
job that was cancelled meanwhile begins nothing. What happened is read off the shards, not remembered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from shardkv.control.changes import abandon, begin_merge, begin_move, begin_split, check_neighbours, check_split_at
from shardkv.control.draft import Draft
from shardkv.control.jobs import ENDED
from shardkv.control.keyspaces import wish_for
from shardkv.control.planner import plan_drain, plan_rebalance
from shardkv.control.situation import Situation
from shardkv.errors import InvalidArgument
from shardkv.topology.documents import (
    HASH_TOKENS,
    JOBS,
    WANTED,
    Attempt,
    JobDocument,
    PlannedMove,
    ShardDocument,
    TopologyBound,
    WantedDocument,
)
from shardkv.wire.messages import MetaTxn

BEGINS_MAX = 20
"""In one transaction."""
LIST_MAX = 1_000
"""Finished moves a job lists; what is older is only counted out of its plan."""


class JobRun:
    """One job in one tick."""

    def __init__(self, situation: Situation, job: JobDocument, wall_ms: int, new_change_id: Callable[[], str]) -> None:
        self._situation = situation
        self._topology = situation.topology
        self._settings = situation.settings
        self._before = self._job = job
        self._wall_ms = wall_ms
        self._new_change_id = new_change_id
        self._draft = Draft(situation.topology)
        self._begun = 0

    def txn(self) -> MetaTxn | None:
        """What is to be done for it now; None: nothing."""
        if self._job.state in ENDED or self._job.state == "paused":
            return None
        if self._job.state == "cancelling":
            self._end_cancelled()
        else:
            self._steps()[self._job.kind]()
        if self._job == self._before and not self._draft:
            return None
        self._draft.put(f"{JOBS}{self._job.id}", self._job)
        return self._draft.txn()

    def _steps(self) -> dict[str, Callable[[], None]]:
        return {
            "add": self._add,
            "remove": self._remove,
            "rebalance": self._rebalance,
            "move": self._move,
            "split": self._split,
            "merge": self._merge,
        }

    # The job's document

    def _set(self, **fields: Any) -> None:
        self._job = msgspec.structs.replace(self._job, **fields)

    def _end(self, state: str, problem: str = "") -> None:
        self._set(state=state, problem=problem, ended_ms=self._wall_ms, attempts={})

    def _wait(self, problem: str) -> None:
        """Say what the job waits for, while nothing else is to be said."""
        self._set(problem=problem)

    def _start(self, moves: list[PlannedMove]) -> None:
        self._set(state="running", moves=moves, started_ms=self._wall_ms)

    def _end_cancelled(self) -> None:
        """Once its changes are over: they are being aborted."""
        if not self._changing():
            self._end("cancelled", self._job.problem)

    def _changing(self) -> list[ShardDocument]:
        return [each for each in self._topology.shards.values() if each.change and each.change.job == self._job.id]

    # Kinds of jobs

    def _add(self) -> None:
        node = self._job.asked["node"]
        if self._job.state == "planned":
            if not self._situation.takes_shards(node) and node in self._topology.nodes:
                self._end("failed", f"Node {node} is {wish_for(self._topology, node)}: it takes no shards.")
            elif not self._situation.is_up(node):
                self._wait(f"Node {node} has not joined yet.")
            elif not self._needs_reports():
                self._start(self._plan(only_to=node))
        if self._job.state == "running":
            self._run_moves()

    def _rebalance(self) -> None:
        if self._job.state == "planned" and not self._needs_reports():
            self._start(self._plan(moves_max=self._job.asked.get("moves_max")))
        if self._job.state == "running":
            self._run_moves()

    def _plan(self, *, only_to: str | None = None, moves_max: int | None = None) -> list[PlannedMove]:
        return plan_rebalance(
            self._situation.loads(),
            self._situation.takers(),
            slack=self._settings.balance_slack,
            moves_max=moves_max,
            only_to=only_to,
            leave_out=self._situation.taken,
        ).moves

    def _needs_reports(self) -> bool:
        """A plan made without knowing what shards weigh would be a bad one."""
        owners = {shard.node for shard in self._topology.shards.values()}
        silent = sorted(
            name for name in owners if not self._situation.is_up(name) and not self._situation.is_away(name)
        )
        if silent:
            self._wait(f"Waiting for what {', '.join(silent)} report of their shards.")
        return bool(silent)

    def _move(self) -> None:
        if self._job.state == "planned":
            shard = self._topology.shards.get(self._job.asked["shard"])
            if shard is None:
                self._end("failed", f"There is no shard {self._job.asked['shard']} any more.")
                return
            planned = PlannedMove(shard.id, shard.node, self._job.asked["node"], self._situation.bytes_of(shard.id))
            self._start([planned])
        self._run_moves(alone=True)

    def _remove(self) -> None:
        node = self._job.asked["node"]
        if self._job.state == "planned":
            self._start([])
        owned = [shard for shard in self._topology.shards.values() if shard.node == node]
        coming = [each for each in self._topology.shards.values() if each.change and each.change.target == node]
        self._note_moves(owned)
        if not owned and not coming:
            self._stop_node(node)
            return
        away = self._situation.is_away(node) or node not in self._topology.nodes
        if away and self._job.asked.get("accept_data_loss") == node:
            self._abandon([shard for shard in owned if shard.id not in self._situation.taken])
        elif away:
            self._wait(
                f"Node {node} is not running and has the only copy of {len(owned)} shards. Start it again, "
                f"or remove it and accept the loss of what it has."
            )
        else:
            self._drain(node, owned)

    def _note_moves(self, owned: list[ShardDocument]) -> None:
        """What is not on the node any more has arrived somewhere; its plan for the others stays."""
        still = {shard.id for shard in owned}
        arrived = [
            move.shard for move in self._job.moves if move.shard not in still and move.shard not in self._job.done
        ]
        if arrived:
            attempts = {shard: each for shard, each in self._job.attempts.items() if shard in still}
            self._set(done=[*self._job.done, *arrived][-LIST_MAX:], attempts=attempts)

    def _drain(self, node: str, owned: list[ShardDocument]) -> None:
        """Plan for shards that have no way to go, and begin what is due."""
        takers = [name for name in self._situation.takers() if name != node]
        if not takers:
            self._wait("There is no other node that takes shards now.")
            return
        on_the_way = [shard.id for shard in owned if shard.id in self._situation.taken]
        going = {move.shard: move for move in self._job.moves if move.target in takers}
        planned = [*on_the_way, *(shard.id for shard in owned if shard.id in going)]
        plan = plan_drain(self._situation.loads(), node, takers, leave_out=planned)
        here = {shard.id for shard in owned}
        if plan.moves:
            fresh = {move.shard for move in plan.moves}
            kept = [move for move in self._job.moves if move.shard not in fresh]
            self._set(moves=[*kept, *plan.moves][-LIST_MAX:])
        for move in self._job.moves:
            shard = self._topology.shards.get(move.shard)
            if move.shard in here and shard is not None:
                self._begin_move(shard, move.target)

    def _stop_node(self, node: str) -> None:
        """Nothing is there and nothing can come: new moves to it compare the wish that this transaction replaces."""
        wanted = self._topology.wanted.get(node) or WantedDocument(node)
        if wanted.state == "active":
            self._end("failed", f"Node {node} was wanted again.")
            return
        self._draft.put(f"{WANTED}{node}", msgspec.structs.replace(wanted, state="removed"))
        self._end("done")

    def _abandon(self, lost: list[ShardDocument]) -> None:
        takers = self._situation.takers()
        if not takers:
            self._wait("There is no other node that takes shards now.")
            return
        lost = lost[:BEGINS_MAX]
        for number, shard in enumerate(lost):
            abandon(self._draft, shard, takers[number % len(takers)])
        self._situation.take(lost)
        self._set(skipped=[*self._job.skipped, *(shard.id for shard in lost)][-LIST_MAX:])

    def _split(self) -> None:
        number = self._job.asked["shard"]
        if self._job.state == "planned":
            self._start([])
        shard = self._topology.shards.get(number)
        if shard is None:
            children = [each.id for each in self._topology.shards.values() if number in each.parents[:1]]
            if len(children) < 2 and not self._was_begun(number):
                self._end("failed", f"There is no shard {number} any more.")
            else:
                self._set(done=children)
                self._end("done")
            return
        at = self._split_token(shard)
        if at is not None and self._may_begin(shard) and self._situation.may_change(shard.node) and self._takes_ids():
            rate = self._situation.rate_of(self._job)
            begin_split(self._draft, shard, at, job=self._job.id, change=self._new_change_id(), rate_bytes_s=rate)
            self._note_begun([shard], shard.node)

    def _split_token(self, shard: ShardDocument) -> TopologyBound | None:
        """Where to cut; None: not known yet, or (the job ends) nowhere."""
        report = self._situation.report_of(shard.id)
        at: TopologyBound | None = self._job.asked.get("at")
        if at is None and report is not None:
            at = report.middle
        if at is None and isinstance(shard.start, int):
            stop = shard.stop if isinstance(shard.stop, int) else HASH_TOKENS
            at = shard.start + (stop - shard.start) // 2
        if at is None:
            self._wait(f"Waiting for node {shard.node} to tell a key that halves shard {shard.id}.")
            return None
        try:
            check_split_at(shard, at)
        except InvalidArgument as error:
            if shard.change is None:
                self._end("failed", error.message)
            return None
        return at

    def _merge(self) -> None:
        asked = (self._job.asked["left"], self._job.asked["right"])
        if self._job.state == "planned":
            self._start([])
        left, right = (self._topology.shards.get(number) for number in asked)
        if left is None or right is None:
            made = [each.id for each in self._topology.shards.values() if list(asked) == each.parents[:2]]
            if not made and not (left is None and right is None and self._was_begun(asked[0])):
                self._end("failed", f"Shards {asked[0]} and {asked[1]} are not both there any more.")
            else:
                self._set(done=made)
                self._end("done")
        elif left.change is None and right.change is None:
            self._bring_together(left, right)

    def _bring_together(self, left: ShardDocument, right: ShardDocument) -> None:
        try:
            check_neighbours(left, right)
        except InvalidArgument as error:
            self._end("failed", error.message)
            return
        if left.node == right.node:
            ready = self._may_begin(left) and right.id not in self._situation.taken
            if ready and self._situation.may_change(left.node) and self._takes_ids():
                rate, change = self._situation.rate_of(self._job), self._new_change_id()
                begin_merge(self._draft, left, right, job=self._job.id, change=change, rate_bytes_s=rate)
                self._note_begun([left, right], left.node)
            return
        smaller, other = sorted((left, right), key=lambda each: (self._situation.bytes_of(each.id), each.id))
        if not self._situation.takes_shards(other.node):
            smaller, other = other, smaller
        if not self._situation.takes_shards(other.node):
            self._wait(f"Nodes {left.node} and {right.node} both take no shards now.")
            return
        self._begin_move(smaller, other.node)

    # Moves

    def _run_moves(self, *, alone: bool = False) -> None:
        """Go through the plan. `alone`: the job is this one move, and fails when it cannot be made."""
        finished, skipped = {*self._job.done}, {*self._job.skipped}
        for move in self._job.moves:
            if move.shard in finished or move.shard in skipped or self._job.state != "running":
                continue
            shard = self._topology.shards.get(move.shard)
            if shard is not None and shard.node == move.target:
                finished.add(move.shard)
            elif shard is None or shard.node != move.source or not self._situation.takes_shards(move.target):
                if shard is None or shard.change is None or shard.change.job != self._job.id:
                    skipped.add(move.shard)
            else:
                self._begin_move(shard, move.target)
        if self._job.state != "running":
            return
        if finished != {*self._job.done} or skipped != {*self._job.skipped}:
            attempts = {s: each for s, each in self._job.attempts.items() if s not in finished | skipped}
            self._set(done=_in_order(self._job, finished), skipped=_in_order(self._job, skipped), attempts=attempts)
        if len(finished) + len(skipped) == len(self._job.moves):
            if alone and skipped:
                self._end("failed", f"Shard {self._job.moves[0].shard} was split, merged, dropped or moved meanwhile.")
            else:
                self._end("done")

    def _begin_move(self, shard: ShardDocument, target: str) -> None:
        if not self._may_begin(shard):
            return
        if not self._situation.may_change(shard.node, target):
            self._say_who_is_away(shard.node, target)
            return
        rate, change = self._situation.rate_of(self._job), self._new_change_id()
        begin_move(self._draft, shard, target, job=self._job.id, change=change, rate_bytes_s=rate)
        self._note_begun([shard], shard.node, target)

    def _say_who_is_away(self, *nodes: str) -> None:
        away = [name for name in nodes if self._situation.is_away(name)]
        if away:
            self._wait(f"Waiting for node {away[0]}, which is not running.")

    # Beginning

    def _may_begin(self, shard: ShardDocument) -> bool:
        """Whether a change of this shard is due. Ends the job when it was tried too often."""
        if self._job.state in ENDED or self._begun >= BEGINS_MAX:
            return False
        if shard.id in self._situation.taken or shard.dropped:
            return False
        attempt = self._job.attempts.get(shard.id)
        if attempt is None:
            return True
        if self._wall_ms < attempt.next_ms <= self._wall_ms + self._settings.backoff_most_ms:
            return False
        if attempt.count >= self._settings.attempts_max:
            reason = shard.problem or "It is not known why."
            self._draft = Draft(self._topology)
            self._end("failed", f"Shard {shard.id} was tried {attempt.count} times. {reason}")
            return False
        return True

    def _takes_ids(self) -> bool:
        """Whether this job may take new shard ids in this tick."""
        if self._situation.ids_taken:
            return False
        self._situation.ids_taken = True
        return True

    def _note_begun(self, shards: list[ShardDocument], *nodes: str) -> None:
        self._begun += 1
        self._situation.take(shards, *nodes)
        number = shards[0].id
        count = self._job.attempts[number].count + 1 if number in self._job.attempts else 1
        pause_ms = min(self._settings.backoff_ms << min(count - 1, 20), self._settings.backoff_most_ms)
        attempts = self._job.attempts | {number: Attempt(count, self._wall_ms + pause_ms)}
        self._set(attempts=attempts, problem="")

    def _was_begun(self, shard: int) -> bool:
        return shard in self._job.attempts


def _in_order(job: JobDocument, shards: set[int]) -> list[int]:
    return [move.shard for move in job.moves if move.shard in shards]
