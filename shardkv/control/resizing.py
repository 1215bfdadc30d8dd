"""Splitting and merging by itself: shards that are too large or too busy, neighbours that are small and quiet.

A shard that was split is never merged again for the reason it was split: what merges must be, together, a fraction
of what splits, in bytes and in load, for a long time, and a keyspace keeps at least the shards it was made with.
Decisions become jobs like those a person asks for. One at a time: ids and reports settle in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from shardkv.control.draft import Draft
from shardkv.control.jobs import ENDED, new_job
from shardkv.control.reports import ShardReport
from shardkv.control.situation import Situation
from shardkv.topology.documents import HASH_TOKENS, ControllerSettings, ShardDocument
from shardkv.topology.view import KeyspaceView
from shardkv.wire.messages import MetaTxn

JOBS_MAX = 2
"""Of this kind at once."""
DENSE = 20
"""A shard with so many times the bytes, or load, that its share of the tokens would have is not cut in the middle."""
RETRY_MS = 600_000
"""A shard whose split or merge failed is left alone for so long."""


@dataclass(slots=True)
class Resizing:
    _quiet_since: dict[tuple[int, int], int] = field(default_factory=dict)
    """By pair of neighbours: since when they could be merged."""

    def txn(self, situation: Situation, wall_ms: int) -> MetaTxn | None:
        """The transaction that asks for the next split or merge, if one is due."""
        quiet = self._note_quiet(situation)
        jobs = situation.topology.jobs.values()
        if sum(1 for job in jobs if "by" in job.asked and job.state not in ENDED) >= JOBS_MAX:
            return None
        busy = _spoken_for(situation, wall_ms)
        draft = Draft(situation.topology)
        for shard, by in _too_large(situation):
            if shard.id not in busy:
                new_job(draft, "split", {"shard": shard.id, "by": by}, wall_ms)
                return draft.txn()
        for left, right in quiet:
            if left not in busy and right not in busy:
                new_job(draft, "merge", {"left": left, "right": right, "by": "size"}, wall_ms)
                return draft.txn()
        return None

    def _note_quiet(self, situation: Situation) -> list[tuple[int, int]]:
        """Keep track of small neighbours; return those that have been small for long enough."""
        settings, now_ms = situation.settings, situation.now_ms
        pairs = {(left.id, right.id) for left, right in _small_neighbours(situation)} if settings.auto_merge else set()
        self._quiet_since = {pair: self._quiet_since.get(pair, now_ms) for pair in sorted(pairs)}
        return [pair for pair, since_ms in self._quiet_since.items() if now_ms - since_ms >= settings.merge_quiet_ms]


def _spoken_for(situation: Situation, wall_ms: int) -> set[int]:
    """Shards that a job is about, or that one failed on lately, or that are in a change."""
    found = set(situation.taken)
    for job in situation.topology.jobs.values():
        recent = job.state == "failed" and 0 <= wall_ms - job.ended_ms < RETRY_MS
        if job.state not in ENDED or recent:
            found |= {job.asked[name] for name in ("shard", "left", "right") if name in job.asked}
    return found


def _too_large(situation: Situation) -> Iterator[tuple[ShardDocument, str]]:
    """Shards to split, and by what; the largest first. Only where splitting is likely to help: a shard that holds what
    it has under one token would be split for ever."""
    settings, topology = situation.settings, situation.topology
    if not settings.auto_split:
        return
    dense = {name: _Density(situation, view) for name, view in topology.keyspaces.items()}
    for shard in sorted(topology.shards.values(), key=lambda each: (-situation.bytes_of(each.id), each.id)):
        report = situation.report_of(shard.id)
        if report is None or shard.dropped or shard.keyspace not in topology.keyspaces:
            continue
        by = "size" if report.bytes >= settings.split_bytes else "load" if report.ops_s >= settings.split_ops_s else ""
        if report.middle is not None:
            helps = _inside(shard, report.middle)
        else:
            helps = bool(by) and dense[shard.keyspace].allows(shard, report, by)
        if by and helps:
            yield shard, by


class _Density:
    """How much of a hash keyspace falls on a token: hashes spread evenly, so a shard that has many times as much has it
    under one token."""

    def __init__(self, situation: Situation, view: KeyspaceView) -> None:
        self._hash = view.partition == "hash"
        reports = [situation.report_of(shard.id) for shard in view.shards]
        self._total = {
            "size": sum(report.bytes for report in reports if report),
            "load": sum(report.ops_s for report in reports if report),
        }

    def allows(self, shard: ShardDocument, report: ShardReport, by: str) -> bool:
        """Whether a shard may be cut in the middle of its tokens."""
        if not self._hash or not isinstance(shard.start, int):
            return False
        width = (shard.stop if isinstance(shard.stop, int) else HASH_TOKENS) - shard.start
        amount = report.bytes if by == "size" else report.ops_s
        return width > 1 and amount * HASH_TOKENS <= DENSE * self._total[by] * width


def _inside(shard: ShardDocument, at: int | bytes) -> bool:
    return shard.start < at and (shard.stop is None or at < shard.stop)  # type: ignore[operator]


def _small_neighbours(situation: Situation) -> Iterator[tuple[ShardDocument, ShardDocument]]:
    for name, view in situation.topology.keyspaces.items():
        document = situation.topology.keyspace_documents[name]
        if document.shards and len(view.shards) > document.shards:
            yield from _small_in(situation, view)


def _small_in(situation: Situation, view: KeyspaceView) -> Iterator[tuple[ShardDocument, ShardDocument]]:
    bytes_max, ops_max = merge_limits(situation.settings)
    for left, right in pairwise(view.shards):
        reports = (situation.report_of(left.id), situation.report_of(right.id))
        if reports[0] is None or reports[1] is None:
            continue
        if reports[0].bytes + reports[1].bytes <= bytes_max and reports[0].ops_s + reports[1].ops_s <= ops_max:
            yield left, right


def merge_limits(settings: ControllerSettings) -> tuple[float, float]:
    """(bytes, operations a second) of what may merge: never more than a quarter of what splits."""
    return min(settings.merge_bytes, settings.split_bytes / 4), min(settings.merge_ops_s, settings.split_ops_s / 4)
