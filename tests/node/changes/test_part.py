"""A part of a view gives the same duties as the whole: nothing that was left out had anything to do."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable

import pytest

from shardkv.control import changes
from shardkv.control.draft import Draft
from shardkv.control.duties import Adopt, Create, Drop, Fence, Keep, Missing, Serve, Step, Unfence, Work, duties
from shardkv.topology.documents import (
    HASH_TOKENS,
    KeyspaceDocument,
    NodeDocument,
    ShardDocument,
    encode_document,
)
from shardkv.topology.view import Topology
from shardkv.wire.messages import MetaTxn
from shardkv_node.changes.part import changed_part, whole

ME, OTHERS = "node-1", ["node-2", "node-3"]
SHARDS, STEPS = 12, 60


class World:
    """A topology that changes at random, and what one node has on its disk."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        width = HASH_TOKENS // SHARDS
        documents: dict[str, object] = {"keyspaces/default": KeyspaceDocument("default", "hash")}
        documents |= {f"nodes/{name}": NodeDocument(name, "s", 1, "127.0.0.1:1", 1) for name in (ME, *OTHERS)}
        for number in range(SHARDS):
            stop = (number + 1) * width if number < SHARDS - 1 else None
            owner = self.rng.choice([ME, ME, *OTHERS])
            documents[f"shards/{number + 1}"] = ShardDocument(number + 1, "default", number * width, stop, 1, owner)
        entries = [(key, encode_document(document)) for key, document in documents.items()]  # type: ignore[arg-type]
        self.topology = Topology().with_entries(1, entries)
        self.labels: set[bytes] = set()
        self.fences: set[Fence] = set()
        self.reported: set[int] = set()

    def apply(self, txn: MetaTxn) -> None:
        revision = self.topology.revision + 1
        self.topology = self.topology.with_entries(revision, [(put.key, put.value, revision) for put in txn.puts])

    def change(self) -> None:
        """Something happens: a change begins, or ends; or this node fences or loses something."""
        rng, topology = self.rng, self.topology
        shard = rng.choice(list(topology.shards.values()))
        draft = Draft(topology)
        if shard.change is not None:
            end = changes.commit if rng.random() < 0.6 else _aborted
            txn = end(topology, shard.id, shard.change.id)
            assert txn is not None
            if shard.node == ME and rng.random() < 0.7:
                self.fences.add(Fence(shard.id, shard.epoch, shard.change.id))
            self.apply(txn)
            return
        name = f"{rng.getrandbits(32):08x}"
        kind = rng.choice(["move", "move", "split", "merge", "restart"])
        stop = shard.stop if isinstance(shard.stop, int) else HASH_TOKENS
        assert isinstance(shard.start, int)
        if kind == "move":
            target = rng.choice([one for one in (ME, *OTHERS) if one != shard.node])
            changes.begin_move(draft, shard, target, job=1, change=name)
        elif kind == "split" and stop - shard.start > 2:
            changes.begin_split(draft, shard, (shard.start + stop) // 2, job=1, change=name)
        elif kind == "merge":
            beside = next((one for one in topology.shards.values() if one.start == shard.stop), None)
            if beside is None or beside.node != shard.node or beside.change is not None:
                return
            changes.begin_merge(draft, shard, beside, job=1, change=name)
        else:
            self.labels -= {label for label in self.labels if b"/" in label and rng.random() < 0.3}
            return
        self.apply(draft.txn())

    def duties_of(self, topology: Topology, labels: Iterable[bytes]) -> list[Step]:
        found = duties(ME, 1, topology, labels, self.fences)
        assert found is not None
        return found

    def carry_out(self, steps: list[Step]) -> None:
        self.reported = set()
        for step in steps:
            match step:
                case Create(label):
                    self.labels.add(label)
                case Adopt(staging, label):
                    self.labels.discard(staging)
                    self.labels.add(label)
                case Drop(label, _):
                    self.labels.discard(label)
                case Unfence(fence):
                    self.fences.discard(fence)
                case Work(stagings=stagings):
                    self.labels |= {label for label in stagings if self.rng.random() < 0.8}
                case Keep(label, _):
                    self.reported.add(int(label.split(b"@")[0].split(b"/")[0]))
                case Missing(shard, _):
                    self.reported.add(shard)


def _aborted(topology: Topology, shard: int, change: str) -> MetaTxn | None:
    return changes.abort(topology, shard, change, "A test wants so.")


def _sorted(steps: Iterable[Step]) -> list[str]:
    """As text; a merge may be met at either of its shards, and any heir is named as the reason of a drop."""
    return sorted(re.sub(r"partner=\d+|Shard \d+ is made", "", repr(step)) for step in steps)


@pytest.mark.parametrize("seed", range(40))
def test_the_part_that_changed_has_all_there_is_to_do(seed: int) -> None:
    world = World(seed)
    first = world.duties_of(*_of(whole(world.topology, world.labels)))
    world.carry_out(first)
    served = {step.shard: step for step in first if isinstance(step, Serve)}
    for _ in range(STEPS):
        before = world.topology
        for _ in range(world.rng.randrange(1, 4)):
            world.change()
        part = changed_part(world.topology, before, ME, world.labels, world.fences, world.reported)
        narrow = world.duties_of(part.topology, part.labels)
        wide = world.duties_of(world.topology, world.labels)
        assert _sorted(one for one in narrow if not isinstance(one, Serve)) == _sorted(
            one for one in wide if not isinstance(one, Serve)
        )
        served = {shard: step for shard, step in served.items() if not part.covers(shard)}
        served |= {step.shard: step for step in narrow if isinstance(step, Serve)}
        assert served == {step.shard: step for step in wide if isinstance(step, Serve)}
        world.carry_out(narrow)


def _of(part: object) -> tuple[Topology, list[bytes]]:
    return part.topology, part.labels  # type: ignore[attr-defined]
