"""`Link`: the messages of a move as calls, from the node that fetches a shard to the one that has it.

Invariant: every call is of one change and, after `begin`, of one round. Calls raise what the source refused, or
UnavailableError, OutcomeUnknown and DeadlineExceeded when there was no answer: then a new round is begun.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from shardkv.control.duties import Work
from shardkv.errors import UnavailableError
from shardkv.limits import Limits
from shardkv.topology.documents import NodeDocument
from shardkv.transport.peer import Peer
from shardkv.wire.hello import Identity
from shardkv.wire.messages import Message, Op
from shardkv.wire.moves import (
    MoveBegin,
    MoveBegun,
    MoveDump,
    MoveEnd,
    MoveFence,
    MoveFenced,
    MoveFile,
    MovePiece,
    MoveSlice,
    MoveTail,
    MoveTailReply,
    decode_move_begun,
    decode_move_fenced,
    decode_move_piece,
    decode_move_slice,
    decode_move_tail_reply,
)

CALL_TIMEOUT_S = 10.0


class Link:
    """A connection to the source of one move. `start` it, `close` it."""

    def __init__(self, node: NodeDocument, work: Work, *, me: Callable[[], Identity], limits: Limits) -> None:
        change = work.change
        self._named = (change.id, work.shards[0], change.source_incarnation, change.target_incarnation)
        self._source_incarnation = change.source_incarnation
        self._peer = Peer([node.address], me=me, expected=Identity("node", node.name), limits=limits)
        self.address = node.address
        self._round = 0

    def start(self) -> None:
        self._peer.start()

    async def close(self) -> None:
        await self._peer.close()

    async def begin(self) -> MoveBegun:
        begun: MoveBegun = decode_move_begun(await self._call(Op.MOVE_BEGIN, MoveBegin(*self._named)))
        self._round = begun.round
        return begun

    async def file(self, name: str, offset: int, size: int) -> MovePiece:
        asked = MoveFile(*self._named, self._round, name, offset, size)
        found: MovePiece = decode_move_piece(await self._call(Op.MOVE_FILE, asked))
        return found

    async def dump(self, index: int) -> bytes | None:
        asked = MoveDump(*self._named, self._round, index)
        found: MoveSlice = decode_move_slice(await self._call(Op.MOVE_DUMP, asked))
        return found.slice

    async def tail(self, after: int, *, wait_ms: int = 0) -> MoveTailReply:
        asked = MoveTail(*self._named, self._round, after, wait_ms)
        found: MoveTailReply = decode_move_tail_reply(await self._call(Op.MOVE_TAIL, asked))
        return found

    async def fence(self) -> int:
        """How many writes there are since the pin, now that there will be no more."""
        found: MoveFenced = decode_move_fenced(await self._call(Op.MOVE_FENCE, MoveFence(*self._named, self._round)))
        return found.added

    async def end(self, timeout_s: float) -> None:
        await self._call(Op.MOVE_END, MoveEnd(*self._named, self._round), timeout_s)

    async def _call(self, op: Op, message: Message, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        await self._peer.wait_connected(timeout_s)
        remote = self._peer.remote
        if remote is not None and remote.incarnation != self._source_incarnation:
            raise UnavailableError(
                f"{self._peer.label} is at start {remote.incarnation}; the change began at {self._source_incarnation}."
            )
        return await self._peer.call(op, message, timeout_s=timeout_s)
