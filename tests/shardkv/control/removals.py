"""The rules of CHANGES.md, each taken away: in the pure code by putting something else in the place of a function, in
the simulated node by name. A test runs seeds until a removal is noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import msgspec

from shardkv.control import changes, duties
from shardkv.control.draft import Draft
from shardkv.topology.documents import ShardDocument
from shardkv.wire.messages import MetaTxn
from tests.shardkv.control.sim import Tilt

CALM = Tilt()
LATE = Tilt(slow=0.3, late_s=1.0, duplicates=0.2, fury=0.5)


@dataclass(frozen=True)
class Removal:
    """`names`: rules the simulated node does not keep; `patches`: (where, what, instead) in the real code."""

    names: frozenset[str] = frozenset()
    patches: tuple[tuple[object, str, Callable[..., Any]], ...] = ()
    tilt: Tilt = CALM
    """The weather in which the rule matters."""


@contextmanager
def without(removal: Removal) -> Iterator[frozenset[str]]:
    """The real code without a rule; gives the names for the simulated node."""
    with ExitStack() as stack:
        for where, what, instead in removal.patches:
            stack.enter_context(patch.object(where, what, instead))
        yield removal.names


def _named(*names: str, tilt: Tilt = CALM) -> Removal:
    return Removal(frozenset(names), tilt=tilt)


_commit, _abort = changes.commit, changes.draft_abort


def _commit_uncompared(*arguments: Any) -> MetaTxn | None:
    txn = _commit(*arguments)
    return MetaTxn([], txn.puts) if txn is not None else None


def _commit_comparing_one(topology: Any, shard_id: int, change_id: str) -> MetaTxn | None:
    txn = _commit(topology, shard_id, change_id)
    if txn is None:
        return None
    first = f"shards/{changes.carriers(topology, shard_id, change_id)[0].id}"
    return MetaTxn([compare for compare in txn.compares if compare.key == first], txn.puts)


def _abort_of_one(draft: Draft, carrying: list[ShardDocument], problem: str) -> None:
    _abort(draft, carrying[-1:], problem)


def _abort_at_the_same_epoch(draft: Draft, carrying: list[ShardDocument], problem: str) -> None:
    for shard in carrying:
        draft.put_shard(msgspec.structs.replace(shard, change=None, problem=problem))


def _never(*arguments: Any) -> bool:
    return False


def _without_earlier_lives(shard: ShardDocument, node: str, incarnation: int) -> bool:
    return False


_NO_ABORT_AFTER_RESTART = ((duties, "begun_in_earlier_life", _without_earlier_lives),)
_AFTER_THE_FENCE = Tilt(ambush=("fence told", "kill source, pause the others"), fury=0.2)
_ABORTED_LATE = Tilt(ambush=("before commit", "abort"), fury=0.2)

REMOVALS: dict[str, Removal] = {
    "compared": Removal(patches=((changes, "commit", _commit_uncompared),), tilt=_ABORTED_LATE),
    "both-carriers": Removal(
        patches=((changes, "commit", _commit_comparing_one), (changes, "draft_abort", _abort_of_one)),
        tilt=_ABORTED_LATE,
    ),
    "epoch-up": Removal(
        patches=((changes, "draft_abort", _abort_at_the_same_epoch),),
        tilt=Tilt(ambush=("after fence", "abort"), fury=0.2),
    ),
    "settled-by-txn": _named("settled-by-txn", tilt=Tilt(ambush=("before commit", "late"), fury=0.2)),
    "read-first": _named("read-first", tilt=Tilt(ambush=("fence told", "kill source"), fury=0.2)),
    "forward": _named("forward", tilt=LATE),
    "fence-reads": _named("fence-reads", tilt=Tilt(ambush=("fence told", "source and clients hear nothing"), fury=0.2)),
    "fence-stays": _named("fence-stays", tilt=LATE),
    "fence-durable with new-life": Removal(frozenset(("fence-durable",)), _NO_ABORT_AFTER_RESTART, _AFTER_THE_FENCE),
    "fence-drains": _named("fence-drains", tilt=Tilt(slow_disk_s=0.3, fury=0.2)),
    "change-named": _named("change-named", tilt=Tilt(slow=0.3, late_s=1.0, ambush=("fetched", "abort"), fury=0.2)),
    "fresh-round": _named("fresh-round", tilt=Tilt(ambush=("fetched", "pause"), fury=0.2)),
    "whole-data": _named("whole-data", tilt=Tilt(often="ack cut", fury=0.5)),
    "numbers-agree": _named("numbers-agree", tilt=Tilt(damage=0.2, fury=0.2)),
    "synced-first": _named("synced-first"),
    "word-of-the-store": _named("word-of-the-store", tilt=_ABORTED_LATE),
    "superseded": Removal(patches=((duties, "is_superseded", _never),)),
    "no-old-directory": _named("no-old-directory", tilt=Tilt(often="old disk")),
}

BACKED_UP: dict[str, Removal] = {
    "fence-durable": _named("fence-durable", tilt=_AFTER_THE_FENCE),
    "new-life": Removal(patches=_NO_ABORT_AFTER_RESTART, tilt=_AFTER_THE_FENCE),
}
"""Rules that another one backs up: nothing happens without one of them."""

NOTICED_AT: dict[str, tuple[int, ...]] = {
    "compared": (0, 3),
    "both-carriers": (45, 27),
    "epoch-up": (3, 23),
    "settled-by-txn": (5, 4),
    "read-first": (0, 2),
    "forward": (4, 14),
    "fence-reads": (6, 10),
    "fence-stays": (1, 0),
    "fence-durable with new-life": (0, 4),
    "fence-drains": (2, 1),
    "change-named": (13, 19),
    "fresh-round": (32, 15),
    "whole-data": (18, 16),
    "numbers-agree": (2, 5),
    "synced-first": (0, 8),
    "word-of-the-store": (1, 0),
    "superseded": (1, 2),
    "no-old-directory": (5, 7),
}
"""Seeds at which each was noticed when this was written: they make the default run short."""
