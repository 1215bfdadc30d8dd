"""The owner of a shard that is split, or of two that are merged: makes the children's tablets, fences, and commits.

    keys (range)    what is in memory is flushed while the shards are served; then the fence, one more flush of what
                    came meanwhile, and the children share the parents' files
    tokens (hash)   the tables are rewritten while the shards are served; the engine refuses writes for the last
                    stretch, then comes the fence
    merge           as one or the other; the records of tokens are united too, most of them before the fence

Invariants: the parents stay until the topology has the children; the commit is sent only when the children's tablets
are made, durably, of all that was acknowledged, and the parents are fenced on disk.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from functools import partial
from time import monotonic

from shardkv.control.duties import Work
from shardkv.errors import ShardKVError, ShardUnavailable
from shardkv.topology.documents import TopologyBound
from shardkv_node.changes.fencing import Fencer
from shardkv_node.changes.progress import Progress
from shardkv_node.changes.site import Site
from shardkv_node.changes.stops import reached
from shardkv_node.engine.rewriting import Rewriting

log = logging.getLogger(__name__)

LOOK_S = 0.005
PAUSED_LOOK_S = 0.2


class Maker:
    """Of one split or merge. `start` it, `update` it with every view, `stop` it when the change is over."""

    def __init__(self, site: Site, work: Work) -> None:
        self.work = work
        self._site = site
        self._labels = work.stagings
        self.progress = Progress(work.change.id, work.shards[0], "ship")
        self._fencer = Fencer(site, work.change.id, "owner")
        self._parents: list[int] = []
        self._rewriting: Rewriting | None = None
        self._stopped = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    def update(self, work: Work) -> None:
        self.work = work

    async def stop(self) -> None:
        """Nothing is done any more; the parents take writes again, as far as the engine is concerned."""
        self._stopped = True
        self._fencer.close()
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._rewriting is not None:
            self._rewriting.cancel()
        for parent in self._parents:
            with suppress(ShardKVError):
                self._site.store.lift_fence(parent)

    async def _run(self) -> None:
        change, shard = self.work.change, self.work.shards[0]
        try:
            while self.work.change.paused:
                await asyncio.sleep(PAUSED_LOOK_S)
            self._parents = [self._site.tablet_of_shard(each) for each in self.work.shards]
            sizes = [self._site.store.tablet_size(parent) for parent in self._parents]
            self.progress.bytes_total = sum(size.stored_bytes + size.memtable_bytes for size in sizes)
            if change.kind == "split" and isinstance(change.at, bytes):
                await self._split_at_key(change.at)
            else:
                await self._rewrite()
            reached("owner.commit")
            self.progress.phase = "commit"
            self._site.ownership.expect(change.children, change.id)
            committed = await self._site.settler.commit(shard, change.id, role="owner")
            log.info("change_ended change=%s shard=%d committed=%s", change.id, shard, committed)
        except ShardKVError as error:
            self._give_up(error)
        except Exception as error:
            log.exception("change_failed change=%s", change.id)
            self._give_up(ShardKVError(f"It failed inside the node: {error!r}."))

    def _give_up(self, error: ShardKVError) -> None:
        change, node = self.work.change, self._site.me().name
        problem = f"Node {node} could not {change.kind} shard {self.work.shards[0]}: {error.message}"
        self._site.settler.abort(self.work.shards[0], change.id, problem)

    # At a key

    async def _split_at_key(self, at: bytes) -> None:
        parent = self._parents[0]
        await self._flush()
        await self._fence()
        await self._flush()
        lower, upper = self._labels
        split = partial(self._site.store.split_tablet, parent, at, (lower, upper), keep_whole=True)
        await self._site.between_groups(split, unless=lambda: self._stopped)
        reached("owner.staged")

    async def _flush(self) -> None:
        """Until all that the parents were told so far is in tables."""
        store = self._site.store
        awaited = {parent: store.last_seqnos(parent) for parent in self._parents}
        flush_due = True
        while any(store.flushed_seqnos(parent) < seqnos for parent, seqnos in awaited.items()):
            if flush_due and not store.maintenance.frozen:
                await self._site.between_groups(store.flush_soon, unless=lambda: self._stopped)
                flush_due = not store.maintenance.frozen
            await asyncio.sleep(LOOK_S)

    async def _fence(self) -> None:
        self.progress.phase = "fence"
        await self._fencer.fence(self.work.shards, self.work.epochs)

    # By rewriting

    async def _rewrite(self) -> None:
        if isinstance(self._boundary(), bytes):
            await self._flush()
        begin = self._begin_split if self.work.change.kind == "split" else self._begin_merge
        self._rewriting = await self._site.between_groups(begin, unless=lambda: self._stopped)
        await self._ended(self._rewriting)
        reached("owner.staged")
        await self._fence()

    def _boundary(self) -> TopologyBound:
        """Where the lower part ends and the upper one begins."""
        at = self.work.change.at
        return self._site.views.newest.shards[self.work.shards[1]].start if at is None else at

    def _begin_split(self) -> Rewriting:
        lower, upper = self._labels
        token = self._boundary()
        assert isinstance(token, int)
        return self._site.store.split_tablet_by_token(self._parents[0], token, (lower, upper), keep_whole=True)

    def _begin_merge(self) -> Rewriting:
        left, right = self._parents
        return self._site.store.merge_tablets(left, right, self._boundary(), self._labels[0])

    async def _ended(self, rewriting: Rewriting) -> None:
        """Until the children's tablets are made. Raises why they are not.

        The engine refuses writes for the last stretch; if that takes too long, the change is given up.
        """
        fenced_since: float | None = None
        while rewriting.outcome is None:
            fenced = any(self._site.store.is_fenced(parent) for parent in self._parents)
            fenced_since = (fenced_since or monotonic()) if fenced else None
            if fenced_since is not None and monotonic() - fenced_since > self._site.fence_abort_s:
                raise ShardUnavailable(f"Writes were refused for {self._site.fence_abort_s:g} s.")
            await asyncio.sleep(LOOK_S)
        if isinstance(rewriting.outcome, ShardKVError):
            raise rewriting.outcome
