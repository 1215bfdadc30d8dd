"""The source of a move: answers the node that fetches a shard, until the topology says that the move is over.

    MOVE_BEGIN   pins the shard's tablet: its files and memtables as they are, and a tail of what follows
    MOVE_FILE, MOVE_DUMP, MOVE_TAIL     what was pinned, piece by piece
    MOVE_FENCE   no more requests for the shard (fencing.py)
    MOVE_END     the pin is not needed any more

Invariants: one round at a time; it ends with its connection, with the next MOVE_BEGIN, and with the move. A message is
answered only if it is of the change, the starts and the round at hand. Files are read in a thread.
"""

from __future__ import annotations

import asyncio
import itertools
import logging

import google_crc32c
import msgspec

from shardkv.control.duties import Work
from shardkv.errors import ShardUnavailable
from shardkv.transport.server import Connection
from shardkv.wire.moves import (
    MoveBegin,
    MoveBegun,
    MoveDump,
    MoveFenced,
    MoveFile,
    MoveNumbers,
    MovePiece,
    MoveSlice,
    MoveTail,
    MoveTailReply,
)
from shardkv_node.changes.fencing import Fencer
from shardkv_node.changes.site import Site
from shardkv_node.changes.stops import reached
from shardkv_node.engine.memory_dump import encode_slice
from shardkv_node.engine.tablet_pin import TabletPin
from shardkv_node.engine.tail import encode_tail
from shardkv_node.engine.vfs import OsVfs

log = logging.getLogger(__name__)

_rounds = itertools.count(1)
_encode = msgspec.msgpack.Encoder().encode


class Source:
    """Of one move. `update` it with every view, `stop` it when the move is over."""

    def __init__(self, site: Site, work: Work) -> None:
        self.work = work
        self.fencer = Fencer(site, work.change.id, "source")
        self._site = site
        self._pin: TabletPin | None = None
        self._round = 0
        self._files: set[str] = set()
        self._asker: Connection | None = None
        self._stopped = False
        self._vfs = OsVfs()

    def start(self) -> None:
        """The target begins."""

    def update(self, work: Work) -> None:
        self.work = work

    async def stop(self) -> None:
        self._stopped = True
        self.fencer.close()
        self._unpin()

    def on_gone(self, connection: Connection) -> None:
        """A connection has ended."""
        if connection is self._asker:
            self._unpin()

    def _unpin(self) -> None:
        self._round, self._asker = 0, None
        pin, self._pin = self._pin, None
        if pin is not None:
            pin.close()

    def check(self, asker: Connection, message: MoveBegin) -> None:
        """Raises ShardUnavailable for a message that is not of this move, as the newest view has it."""
        change, peer = self.work.change, asker.peer
        fits = (
            peer is not None
            and (peer.name, peer.incarnation) == (change.target, change.target_incarnation)
            and (message.source_incarnation, message.target_incarnation)
            == (change.source_incarnation, change.target_incarnation)
            and message.shard == self.work.shards[0]
        )
        if not fits:
            raise ShardUnavailable(f"Change {message.change} is not between these starts of its nodes.")

    def _pinned(self, message: MoveBegin) -> TabletPin:
        if self._pin is None or message.round != self._round:
            raise ShardUnavailable(f"Round {message.round} of change {message.change} has ended.")
        return self._pin

    # Answers

    async def begin(self, asker: Connection, message: MoveBegin) -> MoveBegun:
        tablet = self._site.tablet_of_shard(message.shard)

        def pin() -> TabletPin:
            self._unpin()
            return self._site.store.pin_tablet(tablet)

        self._pin = await self._site.between_groups(pin, unless=lambda: self._stopped or asker.closed)
        self._round, self._asker = next(_rounds), asker
        manifest = self._pin.manifest
        self._files = {meta.file_name for _, meta in (*manifest.tables, *manifest.records)}
        log.info("move_round_begun change=%s shard=%d files=%d", message.change, message.shard, len(self._files))
        reached("source.begin")
        return MoveBegun(self._round, _encode(manifest), self._pin.dump_rows)

    async def file(self, asker: Connection, message: MoveFile) -> MovePiece:
        pin = self._pinned(message)
        if message.name not in self._files:
            raise ShardUnavailable(f"File {message.name!r} is not one of this round.")
        path = pin.path(message.name)
        return await self._site.in_thread(lambda: self._read(path, message.offset, message.size))

    def _read(self, path: str, offset: int, size: int) -> MovePiece:
        file = self._vfs.open_read(path)
        try:
            data = file.pread(offset, size)
        finally:
            file.close()
        return MovePiece(data, google_crc32c.value(data))

    async def dump(self, asker: Connection, message: MoveDump) -> MoveSlice:
        found = self._pinned(message).dump_slice(message.index)
        return MoveSlice(None if found is None else encode_slice(found))

    async def tail(self, asker: Connection, message: MoveTail) -> MoveTailReply:
        tail = self._pinned(message).tail
        if message.wait_ms and tail.added <= message.after and not tail.overflowed:
            await self._written(self._pinned(message), message.wait_ms / 1000)
        pin = self._pinned(message)
        batch = pin.tail.batch(message.after)
        last = self.fencer.done and pin.tail.given == pin.tail.added
        return MoveTailReply(encode_tail(batch), pin.tail.added, self._numbers(pin) if last else None)

    async def _written(self, pin: TabletPin, timeout_s: float) -> None:
        """Until something was written to the tablet, or the time is over."""
        written = asyncio.Event()
        pin.tail.on_write = written.set
        try:
            async with asyncio.timeout(timeout_s):
                await written.wait()
        except TimeoutError:
            pass
        finally:
            pin.tail.on_write = None

    def _numbers(self, pin: TabletPin) -> MoveNumbers:
        items, digest = pin.digest.value
        return MoveNumbers(pin.seqnos[False], pin.seqnos[True], items, digest)

    async def fence(self, asker: Connection, message: MoveBegin) -> MoveFenced:
        self._pinned(message)
        await self.fencer.fence(self.work.shards, self.work.epochs)
        return MoveFenced(self._pinned(message).tail.added)

    async def end(self, asker: Connection, message: MoveBegin) -> None:
        self._pinned(message)
        self._unpin()
