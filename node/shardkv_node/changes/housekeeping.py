"""`Housekeeping`: carries out what `shardkv.control.duties` asks of this node, view after view.

Invariants: of a newer view, first the shards are not answered for any more that it does not let this node serve; then
the other steps are carried out in order, each durable before the next; then what it is to serve is served. Nothing is
done before a view contains this start of the node, nor for a store that is behind what was acted on before. Steps are
carried out for one view at a time, and the loop is left to others every few milliseconds.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import shutil
from collections.abc import Iterable, Sequence
from functools import partial
from time import monotonic
from typing import Protocol

from shardkv.control.duties import (
    Abort,
    Adopt,
    Create,
    Drop,
    Keep,
    Missing,
    Serve,
    Step,
    Unfence,
    Work,
    duties,
)
from shardkv.control.reports import ChangeReport
from shardkv.errors import DiskFull, StorageError
from shardkv.topology.documents import SHARDS, ShardDocument, decode_document
from shardkv.topology.view import Topology
from shardkv.transport.server import Connection
from shardkv.wire.messages import MetaTxn
from shardkv_node.changes.making import Maker
from shardkv_node.changes.part import Part, changed_part, parsed, whole
from shardkv_node.changes.progress import Progress
from shardkv_node.changes.site import Site
from shardkv_node.changes.source import Source
from shardkv_node.changes.stops import reached
from shardkv_node.changes.target import Target

log = logging.getLogger(__name__)

STRETCH_S = 0.002
"""Steps are carried out for about so long before others get their turn."""
CREATE_TOGETHER = 256
SAVE_EVERY_S = 1.0
DISK_FULL_PAUSE_S = 1.0


class Worker(Protocol):
    """This node's part in one change."""

    work: Work

    def start(self) -> None: ...
    def update(self, work: Work) -> None: ...
    async def stop(self) -> None: ...


class Housekeeping:
    """`show` it every view, and `run` it. Its `site` has the store whose tablets it keeps."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._node = site.me().name
        self._workers: dict[str, Worker] = {}
        self._carried_out: Topology | None = None
        self._kept: dict[int, str] = {}
        """Shards of which tablets are kept that are not served, and why."""
        self._missing: dict[int, str] = {}
        self._stretch_began = 0.0
        self._removing: set[asyncio.Task[None]] = set()
        """Of files that were fetched for changes that are over."""

    # Views

    def show(self, topology: Topology) -> None:
        """A newer view has come."""
        self._site.views.show(topology)

    def note_applied(self, txn: MetaTxn, revision: int) -> None:
        """A transaction of this node was applied: act on that now, not when the store's next word has come.

        What else may have been written since the newest view is not in this one; the next view has it.
        """
        newest = self._site.views.newest
        shards, revisions = dict(newest.shards), dict(newest.revisions)
        for put in txn.puts:
            document = decode_document(put.key, put.value) if put.value is not None else None
            if isinstance(document, ShardDocument):
                shards[document.id], revisions[put.key] = document, revision
            elif put.key.startswith(SHARDS):
                shards.pop(int(put.key.removeprefix(SHARDS)), None)
                revisions.pop(put.key, None)
        self._site.views.guess(dataclasses.replace(newest, revision=revision, shards=shards, revisions=revisions))

    async def run(self) -> None:
        """Carry out the newest view, and the next one, until cancelled. Raises StorageError."""
        await self._site.in_thread(partial(shutil.rmtree, self._site.incoming, ignore_errors=True))
        saving = asyncio.get_running_loop().create_task(self._keep_saving())
        try:
            while True:
                topology = self._site.views.newest
                if self._may_act_on(topology):
                    try:
                        await self._carry_out(topology)
                    except DiskFull as error:
                        log.warning("duties_wait reason=%r", error.message)
                        await asyncio.sleep(DISK_FULL_PAUSE_S)
                        continue
                if topology is self._site.views.newest:
                    await self._site.views.moved()
        finally:
            saving.cancel()

    async def close(self) -> None:
        """End all work; what is on disk is gone on with, or given up, by the next start."""
        for worker in list(self._workers.values()):
            await worker.stop()
        for task in self._removing:
            task.cancel()
        await self._site.settler.close()
        self._site.threads.shutdown(wait=False, cancel_futures=True)

    def _may_act_on(self, topology: Topology) -> bool:
        me, known = self._site.me(), topology.nodes.get(self._node)
        if known is None or known.incarnation != me.incarnation or topology is self._carried_out:
            return False
        if topology.revision < self._site.fences.revision:
            log.warning("old_metadata revision=%d seen=%d", topology.revision, self._site.fences.revision)
            return False
        return True

    async def _keep_saving(self) -> None:
        """Have the revision on disk soon, where no fence takes it there."""
        while True:
            await asyncio.sleep(SAVE_EVERY_S)
            try:
                await self._site.fences.save()
            except StorageError as error:
                log.warning("revision_not_saved reason=%r", error.message)

    # Steps

    async def _carry_out(self, topology: Topology) -> None:
        self._stretch_began = monotonic()
        part = await self._part(topology)
        steps = duties(
            self._node,
            self._site.me().incarnation,
            part.topology,
            part.labels,
            self._site.fences.all,
            revision_seen=self._site.fences.revision,
        )
        if steps is None:
            return
        self._site.fences.note_revision(topology.revision)
        self._stop_serving(part, [step for step in steps if isinstance(step, Serve)])
        works = {step.change.id: step for step in steps if isinstance(step, Work)}
        await self._stop_working(works)
        await self._change_tablets(steps)
        self._note_reports(part, steps)
        for step in steps:
            if isinstance(step, Abort):
                self._site.settler.abort(step.shard, step.change, step.problem)
        await self._serve([step for step in steps if isinstance(step, Serve)])
        self._site.ownership.settle(works)
        self._work(works.values())
        self._carried_out, self._site.ownership.revision = topology, topology.revision

    async def _part(self, topology: Topology) -> Part:
        labels = list(self._site.store.tablets.values())
        if self._carried_out is None:
            return whole(topology, labels)
        reported = [*self._kept, *self._missing]
        return changed_part(topology, self._carried_out, self._node, labels, self._site.fences.all, reported)

    def _stop_serving(self, part: Part, serves: Sequence[Serve]) -> None:
        ownership, topology = self._site.ownership, part.topology
        wanted = {step.shard: step for step in serves}
        ids = ownership.shards.keys() if part.shards is None else part.shards
        fenced = {fence.shard: fence for fence in sorted(self._site.fences.all)}  # of each shard the newest
        for shard in [*ids, *(topology.shards if part.shards is None else ())]:
            document, step = topology.shards.get(shard), wanted.get(shard)
            if step is not None:
                if ownership.epoch_of(shard) not in (None, step.epoch):
                    ownership.stop(shard)
            elif document is None or document.node != self._node:
                ownership.stop(shard)
            elif shard in fenced and fenced[shard].epoch >= document.epoch:
                ownership.fence(shard, fenced[shard].epoch)
            else:
                ownership.refuse(shard, f"Node {self._node} is not ready to serve shard {shard}.")

    async def _stop_working(self, works: dict[str, Work]) -> None:
        for change in [change for change in self._workers if change not in works]:
            worker = self._workers.pop(change)
            await worker.stop()
            log.info("change_over change=%s role=%s", change, worker.work.role)
            remove = partial(shutil.rmtree, f"{self._site.incoming}/{change}", ignore_errors=True)
            removing = asyncio.get_running_loop().create_task(self._site.after_threads(remove))
            self._removing.add(removing)
            removing.add_done_callback(self._removing.discard)

    async def _change_tablets(self, steps: Sequence[Step]) -> None:
        """Create, adopt, drop and unfence, in the order of the steps."""
        numbers = {label: number for number, label in self._site.store.tablets.items()}
        making = [step.label for step in steps if isinstance(step, Create)]
        for first in range(0, len(making), CREATE_TOGETHER):
            self._site.store.create_tablets(making[first : first + CREATE_TOGETHER])
            await self._breathe()
        for step in steps:
            if isinstance(step, Adopt):
                await self._adopt(step, numbers[step.staging])
            elif isinstance(step, Drop):
                await self._drop(step, numbers[step.label])
        over = [step.fence for step in steps if isinstance(step, Unfence)]
        if over:
            reached("source.unfence")
            await self._site.fences.remove(over)

    async def _adopt(self, step: Adopt, number: int) -> None:
        role = "owner" if self._is_parent(step.label) else "target"
        reached(f"{role}.adopt")
        began = monotonic()
        await self._site.between_groups(partial(self._site.store.adopt_staging, number, step.label))
        log.info("tablet_adopted label=%s ms=%.1f", step.label.decode(), 1000 * (monotonic() - began))
        reached(f"{role}.serve")

    def _is_parent(self, label: bytes) -> bool:
        found = parsed(label)
        document = self._site.views.newest.shards.get(found.shard) if found is not None else None
        return document is not None and bool(document.parents) and document.source == self._node

    async def _drop(self, step: Drop, number: int) -> None:
        found = parsed(step.label)
        gone = found is not None and found.shard not in self._site.views.newest.shards
        reached("owner.drop" if gone else "source.drop")
        log.info("tablet_dropped label=%s why=%r", step.label.decode(), step.why)
        await self._site.between_groups(partial(self._site.store.drop_tablet, number))
        await self._breathe()

    def _note_reports(self, part: Part, steps: Iterable[Step]) -> None:
        kept_before = set(self._kept.values())
        self._kept = {shard: why for shard, why in self._kept.items() if not part.covers(shard)}
        self._missing = {shard: why for shard, why in self._missing.items() if not part.covers(shard)}
        for step in steps:
            if isinstance(step, Keep):
                if step.why not in kept_before:
                    log.warning("tablet_kept label=%s why=%r", step.label.decode(errors="replace"), step.why)
                found = parsed(step.label)
                if found is not None and not found.is_staging:
                    self._kept[found.shard] = step.why
            elif isinstance(step, Missing):
                log.error("shard_missing shard=%d why=%r", step.shard, step.why)
                self._missing[step.shard] = step.why
                self._site.ownership.lose(step.shard, step.why)

    async def _serve(self, serves: Sequence[Serve]) -> None:
        numbers = {label: number for number, label in self._site.store.tablets.items()}
        for step in serves:
            if not self._site.fences.holds(step.shard, step.epoch):
                self._site.ownership.serve(step.shard, step.epoch, numbers[step.label])
            await self._breathe()

    async def _breathe(self) -> None:
        """Let others have their turn, now and then."""
        if monotonic() - self._stretch_began > STRETCH_S:
            await asyncio.sleep(0)
            self._stretch_began = monotonic()

    # Changes

    def _work(self, works: Iterable[Work]) -> None:
        for work in works:
            worker = self._workers.get(work.change.id)
            if worker is not None:
                worker.update(work)
                continue
            log.info("change_begun change=%s kind=%s role=%s", work.change.id, work.change.kind, work.role)
            worker = self._workers[work.change.id] = self._worker(work)
            worker.start()

    def _worker(self, work: Work) -> Worker:
        if work.role == "source":
            return Source(self._site, work)
        if work.role == "target":
            return Target(self._site, work)
        return Maker(self._site, work)

    def source_of(self, change: str) -> Source | None:
        """The source of a move that the newest view carried out has."""
        worker = self._workers.get(change)
        return worker if isinstance(worker, Source) else None

    def on_gone(self, connection: Connection) -> None:
        """A connection has ended, and with it the round of a move that it was about."""
        for worker in self._workers.values():
            if isinstance(worker, Source):
                worker.on_gone(connection)

    # Reports

    @property
    def topology(self) -> Topology:
        """The newest view."""
        return self._site.views.newest

    @property
    def kept(self) -> list[int]:
        """Shards it has tablets of and does not serve; stagings not counted."""
        return sorted(self._kept)

    @property
    def fenced(self) -> list[int]:
        """Shards it answers nothing for at an epoch, until it sees a later one."""
        return sorted({fence.shard for fence in self._site.fences.all})

    @property
    def missing(self) -> dict[int, str]:
        """Shards this node owns without their data, and why."""
        return dict(self._missing)

    def change_reports(self) -> list[ChangeReport]:
        """How far the changes are that this node carries out."""
        found = [getattr(worker, "progress", None) for worker in self._workers.values()]
        return [progress.report() for progress in found if isinstance(progress, Progress)]
