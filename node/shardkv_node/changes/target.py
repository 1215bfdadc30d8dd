"""The target of a move: fetches a shard from the node that has it, and commits.

A round: the owner pins the tablet; its dump and files are fetched (what an earlier round brought is kept) and
installed as a staging tablet; then the tail is applied, batch after batch. A round ends with its connection, or when
more was written than the owner may hold; then the next one begins. Once little is missing, the owner is asked for the
fence, the rest is applied, both compare their numbers, the log is synced, and the commit is sent.

Invariants: the commit is sent only for a staging that is complete, compared and on disk. From the moment the fence was
asked for, the change is committed or given up, never gone on with by another round: the shard is not served meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import os
from functools import partial
from itertools import pairwise
from time import monotonic

import msgspec

from shardkv.control.duties import Work
from shardkv.errors import (
    DeadlineExceeded,
    InvalidArgument,
    OutcomeUnknown,
    ShardKVError,
    ShardUnavailable,
    StorageError,
    UnavailableError,
)
from shardkv.metadata.client import Backoff
from shardkv.topology.documents import Change
from shardkv.wire.moves import MoveNumbers, MoveTailReply
from shardkv_node.changes.fetching import Fetcher
from shardkv_node.changes.link import Link
from shardkv_node.changes.pace import Pace
from shardkv_node.changes.progress import Progress
from shardkv_node.changes.site import Site
from shardkv_node.changes.stops import reached
from shardkv_node.engine.memory_dump import decode_slice
from shardkv_node.engine.staging import Staging, StagingImport
from shardkv_node.engine.table_meta import TableMeta
from shardkv_node.engine.tablet_export import ExportManifest
from shardkv_node.engine.tail import TailBatch, decode_tail

log = logging.getLogger(__name__)

FENCE_LAG_S = 0.03
"""The fence is asked for when what is missing takes less time than this, at the speed it was applied with so far."""
FENCE_LAG_MOST_S = 1.0
PATIENCE_S = 5.0
"""After so long in a tail that comes no nearer twice as much may be missing; and so on, up to FENCE_LAG_MOST_S."""
STALL_LOOK_S = 0.01
END_TIMEOUT_S = 1.0

_decode_manifest = msgspec.msgpack.Decoder(ExportManifest).decode
_RETRIED = (UnavailableError, OutcomeUnknown, DeadlineExceeded)


class Target:
    """Of one move. `start` it, `update` it with every view, `stop` it when the move is over."""

    def __init__(self, site: Site, work: Work) -> None:
        self.work = work
        self._site = site
        self._label = work.stagings[0]
        self._shard = work.shards[0]
        self.progress = Progress(work.change.id, self._shard, "ship")
        self._pace = Pace(self._change)
        self._directory = os.path.join(site.incoming, work.change.id)
        self._link: Link | None = None
        self._staging: Staging | None = None
        self._fencing = False
        self._stopped = False
        self._task: asyncio.Task[None] | None = None

    def _change(self) -> Change:
        return self.work.change

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    def update(self, work: Work) -> None:
        self.work = work

    async def stop(self) -> None:
        """Nothing is done for the change any more once this returns, but that a thread may come to its end."""
        self._stopped = True
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        backoff = Backoff()
        try:
            while not self._stopped:
                try:
                    await self._round()
                    return
                except _RETRIED as error:
                    log.info("move_round_ended change=%s reason=%r", self.work.change.id, error.message)
                    if self._fencing:
                        self._give_up(error)
                        return
                await backoff.pause()
        except ShardKVError as error:
            self._give_up(error)
        except Exception as error:
            log.exception("move_failed change=%s", self.work.change.id)
            self._give_up(ShardKVError(f"It failed inside the node: {error!r}."))
        finally:
            if self._link is not None:
                await self._link.close()

    def _give_up(self, error: ShardKVError) -> None:
        problem = f"Node {self._site.me().name} could not fetch shard {self._shard}: {error.message}"
        self._site.settler.abort(self._shard, self.work.change.id, problem)

    # A round

    async def _round(self) -> None:
        self.progress.phase = "ship"
        self.progress.rounds += 1
        await self._pace.go()
        link = await self._linked()
        begun = await link.begin()
        reached("target.ship")
        try:
            manifest = _decode_manifest(begun.manifest)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise InvalidArgument(f"The manifest of a move cannot be read: {error}.") from error
        found = self._site.store.begin_staging(self._directory, manifest, before=self._staging)
        try:
            await self._fetch_dump(link, found)
            await self._fetch_files(link, found)
        except BaseException:
            found.abandon()
            raise
        await self._site.in_thread(found.fetch, clean_up=found.abandon)
        self._staging = await self._site.between_groups(
            partial(self._install, found), unless=lambda: self._abandoned(found)
        )
        reached("target.staged")
        await self._follow(link, self._staging)

    async def _linked(self) -> Link:
        """To where the source is now. Raises ShardUnavailable while nobody knows."""
        node = self._site.views.newest.nodes.get(self.work.source)
        if node is None:
            raise ShardUnavailable(f"Node {self.work.source} is not registered.")
        if self._link is not None and self._link.address != node.address:
            await self._link.close()
            self._link = None
        if self._link is None:
            self._link = Link(node, self.work, me=self._site.me, limits=self._site.limits)
            self._link.start()
        return self._link

    async def _fetch_dump(self, link: Link, found: StagingImport) -> None:
        index = 0
        while (data := await link.dump(index)) is not None:
            found.add_slice(decode_slice(data))
            self.progress.add(len(data))
            index += 1
            if found.dump_bytes > self._site.store.options.memtable_bytes_max // 2:
                await self._site.in_thread(found.write_dump, clean_up=found.abandon)
            await self._pace.take(len(data))

    async def _fetch_files(self, link: Link, found: StagingImport) -> None:
        absent = found.absent()
        self.progress.bytes_total = self.progress.bytes_done + sum(meta.size for meta in absent)
        fetcher = Fetcher(self._site, link, self._directory, self._pace, self.progress)
        await fetcher.fetch(_largest_first(absent), found.verified)

    def _install(self, found: StagingImport) -> Staging:
        return self._site.store.install_staging(found, self._label, before=self._staging)

    def _abandoned(self, found: StagingImport) -> bool:
        if self._stopped:
            found.abandon()
        return self._stopped

    # The tail

    async def _follow(self, link: Link, staging: Staging) -> None:
        """Apply the tail until little is missing; then to the end."""
        self.progress.phase = "tail"
        began, applied_before = monotonic(), staging.applied
        while True:
            await self._pace.go()
            reply = await link.tail(staging.applied)
            await self._apply(staging, reply)
            reached("target.tail")
            passed = max(monotonic() - began, 1e-6)
            per_second = max(staging.applied - applied_before, 1) / passed
            allowed_s = min(FENCE_LAG_MOST_S, FENCE_LAG_S * 2 ** (passed // PATIENCE_S))
            if self.progress.lag <= allowed_s * per_second:
                break
        await self._finish(link, staging)

    async def _apply(self, staging: Staging, reply: MoveTailReply) -> None:
        batch = decode_tail(reply.batch)
        await self._room()
        await self._site.between_groups(partial(self._stage, staging, batch), unless=lambda: self._stopped)
        self.progress.lag = reply.added - staging.applied

    def _stage(self, staging: Staging, batch: TailBatch) -> None:
        self._site.store.stage(staging, batch)

    async def _room(self) -> None:
        """Until the store takes more. As before any group of writes."""
        store = self._site.store
        while store.stalled:
            await asyncio.sleep(STALL_LOOK_S)
        delay_s = store.write_delay_s()
        if delay_s:
            await asyncio.sleep(delay_s)

    # The end

    async def _finish(self, link: Link, staging: Staging) -> None:
        self.progress.phase = "fence"
        reached("target.fence")
        self._fencing = True
        times = [monotonic()]
        await link.fence()
        times.append(monotonic())
        numbers: MoveNumbers | None = None
        while numbers is None:
            reply = await link.tail(staging.applied)
            await self._apply(staging, reply)
            numbers = reply.numbers
        self._compare(staging, numbers)
        times.append(monotonic())
        await self._site.synced()
        times.append(monotonic())
        self.progress.phase = "commit"
        reached("target.commit")
        self._site.ownership.expect([self._shard], self.work.change.id)
        committed = await self._site.settler.commit(self._shard, self.work.change.id, role="target")
        times.append(monotonic())
        log.info(
            "move_ended change=%s shard=%d committed=%s rounds=%d "
            "fence_ms=%.1f tail_ms=%.1f sync_ms=%.1f commit_ms=%.1f",
            self.work.change.id,
            self._shard,
            committed,
            self.progress.rounds,
            *(1000 * (after - before) for before, after in pairwise(times)),
        )

    def _compare(self, staging: Staging, theirs: MoveNumbers) -> None:
        """Raises StorageError when the two nodes do not have the same."""
        items, digest = staging.digest.value
        ours = MoveNumbers(staging.seqnos[False], staging.seqnos[True], items, digest)
        if ours != theirs:
            raise StorageError(f"The shard that arrived is not the one that was sent: {ours} instead of {theirs}.")


def _largest_first(metas: list[TableMeta]) -> list[TableMeta]:
    """So that the last pieces are of several files."""
    return sorted(metas, key=lambda meta: -meta.size)
