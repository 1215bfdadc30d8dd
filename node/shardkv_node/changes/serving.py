"""Hands the messages of moves to the source they are for, and refuses all others."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from shardkv.errors import LocalProtocolError, ShardKVError, ShardUnavailable, UnknownOperation
from shardkv.transport.server import Connection
from shardkv.wire.messages import Op, Request
from shardkv.wire.moves import (
    MoveBegin,
    decode_move_begin,
    decode_move_dump,
    decode_move_end,
    decode_move_fence,
    decode_move_file,
    decode_move_tail,
)
from shardkv_node.changes.source import Source

log = logging.getLogger(__name__)

Answer = Callable[[Source, Connection, Any], Coroutine[Any, Any, Any]]

_ANSWERS: dict[Op, tuple[Callable[[Any], MoveBegin], Answer]] = {
    Op.MOVE_BEGIN: (decode_move_begin, Source.begin),
    Op.MOVE_FILE: (decode_move_file, Source.file),
    Op.MOVE_DUMP: (decode_move_dump, Source.dump),
    Op.MOVE_TAIL: (decode_move_tail, Source.tail),
    Op.MOVE_FENCE: (decode_move_fence, Source.fence),
    Op.MOVE_END: (decode_move_end, Source.end),
}


class MoveService:
    """`handlers` are a node service's. `source_of` finds the source of a change that the newest view has."""

    def __init__(self, source_of: Callable[[str], Source | None]) -> None:
        self._source_of = source_of
        self._answering: set[asyncio.Task[None]] = set()
        self.handlers = dict.fromkeys(_ANSWERS, self._on_request)

    def _on_request(self, connection: Connection, request: Request, deadline: float | None) -> None:
        if connection.peer is None or connection.peer.role != "node":
            raise UnknownOperation("Only nodes ask each other for shards.")
        decode, answer = _ANSWERS[Op(request.op)]
        message = decode(request.payload)
        source = self._source_of(message.change)
        if source is None:
            raise ShardUnavailable(
                f"This node gives no shard away by change {message.change}, as far as it knows now.",
                detail={"shard": message.shard},
            )
        source.check(connection, message)
        task = asyncio.get_running_loop().create_task(
            _answer(connection, request.id, answer(source, connection, message))
        )
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    async def close(self) -> None:
        tasks = list(self._answering)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _answer(connection: Connection, request_id: int, answering: Coroutine[Any, Any, Any]) -> None:
    try:
        found = await answering
    except ShardKVError as error:
        connection.fail(request_id, error)
    except asyncio.CancelledError:
        connection.fail(request_id, ShardUnavailable("The move is over."))
    except Exception as error:
        log.exception("move_request_failed")
        connection.fail(request_id, LocalProtocolError(f"The request failed inside the node: {error!r}."))
    else:
        connection.reply(request_id, found, size_bytes=len(getattr(found, "data", b"")))
