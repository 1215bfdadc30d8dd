"""A node program with one bug planted, to see that the checks of a storm find it:

python -m tests.worlds.buggy_node <bug> run ...

reads-while-fenced   the source goes on answering reads of a shard that it has fenced
drops-a-batch        the target leaves out a batch of the tail, and does not compare numbers
no-records           the target takes no records of idempotency tokens, and does not compare numbers
"""

from __future__ import annotations

import sys
from typing import Any

import msgspec

from shardkv_node.changes.target import Target
from shardkv_node.command import node
from shardkv_node.engine.columns import Columns
from shardkv_node.engine.memory_dump import DumpSlice
from shardkv_node.engine.staging import Staging, StagingImport
from shardkv_node.engine.store import Store
from shardkv_node.engine.tail import TailBatch
from shardkv_node.ownership import Ownership
from shardkv_node.service import NodeService


def reads_while_fenced() -> None:
    fence, tablet_of = Ownership.fence, Ownership.tablet_of
    was_served: dict[tuple[int, int], int] = {}
    reading: list[bool] = []

    def remembering(self: Ownership, shard: int, epoch: int) -> None:
        served = self._served.get(shard)
        if served is not None:
            was_served[shard, epoch] = served[1]
        fence(self, shard, epoch)

    def answering(self: Ownership, shard: Any, epoch: Any) -> int:
        if reading and shard in self._fenced and (shard, epoch) in was_served:
            return was_served[shard, epoch]
        return tablet_of(self, shard, epoch)

    def as_read(name: str) -> None:
        original = getattr(NodeService, name)

        def read(*arguments: Any) -> Any:
            reading.append(True)
            try:
                return original(*arguments)
            finally:
                reading.pop()

        setattr(NodeService, name, read)

    Ownership.fence, Ownership.tablet_of = remembering, answering  # type: ignore[method-assign]
    for name in ("_read", "read_together", "_scan_when_ready"):
        as_read(name)


def _compare_nothing() -> None:
    Target._compare = lambda self, staging, theirs: None  # type: ignore[method-assign]


def drops_a_batch() -> None:
    stage = Target._stage

    def leaving_out(self: Target, staging: Staging, batch: TailBatch) -> None:
        if batch.writes and self.progress.rounds:
            self.progress.rounds = 0  # only the first one
            staging.note(staging.news_of(batch))
        else:
            stage(self, staging, batch)

    Target._stage = leaving_out  # type: ignore[method-assign]
    _compare_nothing()


def no_records() -> None:
    begin, add_slice, stage = Store.begin_staging, StagingImport.add_slice, Store.stage

    def without_tables(self: Store, directory: str, manifest: Any, **options: Any) -> StagingImport:
        return begin(self, directory, msgspec.structs.replace(manifest, records=[]), **options)

    def without_slices(self: StagingImport, found: DumpSlice) -> None:
        if found.records:
            found = DumpSlice(found.index, found.records, Columns([], b"", [], [], []))
        add_slice(self, found)

    def of_another_lane(self: Store, staging: Staging, batch: TailBatch) -> None:
        writes = [
            msgspec.structs.replace(one, keys=[b"lost" + key[4:] for key in one.keys]) if one.records else one
            for one in batch.writes
        ]
        stage(self, staging, TailBatch(batch.after, writes))

    Store.begin_staging, Store.stage = without_tables, of_another_lane  # type: ignore[method-assign]
    StagingImport.add_slice = without_slices  # type: ignore[method-assign]
    _compare_nothing()


BUGS = {"reads-while-fenced": reads_while_fenced, "drops-a-batch": drops_a_batch, "no-records": no_records}

if __name__ == "__main__":
    BUGS[sys.argv.pop(1)]()
    node(prog_name="buggy node")
