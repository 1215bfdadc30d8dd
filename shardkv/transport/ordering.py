"""Per-key order on a connection that asked for it in its hello.

Invariant: two requests of the connection that touch a common key, at least one of them a write, are never at work at
once, and are begun in the order they came. The request at the head waits, and those behind it wait with it: that
keeps the order without a queue for each key. Requests on different keys are still at work together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from shardkv.errors import InvalidArgument
from shardkv.wire.messages import Op, Request, decode_read, decode_write

_FREE = frozenset((Op.HELLO, Op.CONTEXT, Op.PING, Op.STATUS, Op.ROUTES))
"""Touch no key. An operation that is not here and is neither READ nor WRITE counts as a write of every key."""


class KeyOrder:
    """What one connection has at work: ask `begin` before a request, tell `ended` after."""

    def __init__(self) -> None:
        self._at_work: dict[int, tuple[bool, Sequence[bytes]]] = {}
        self._writes: Counter[bytes] = Counter()
        self._touched: Counter[bytes] = Counter()
        self._whole: int | None = None
        """The request at work that counts as a write of every key."""
        self._head: tuple[Request, bool, Sequence[bytes] | None] | None = None
        """The request that was told to wait last, whether it writes, and its keys."""

    def begin(self, request: Request) -> bool:
        """Whether the request may be begun now; if so, it counts as at work. Otherwise ask again later."""
        if request.op in _FREE:
            return True
        if self._head is None or self._head[0] is not request:
            self._head = (request, *_touches(request))
        _, writes, keys = self._head
        if self._whole is not None or (keys is None and self._at_work):
            return False
        if keys is None:
            self._whole, keys = request.id, ()
        elif not (self._touched if writes else self._writes).keys().isdisjoint(keys):
            return False
        self._at_work[request.id] = (writes, keys)
        self._touched.update(keys)
        if writes:
            self._writes.update(keys)
        self._head = None
        return True

    def ended(self, request_id: int) -> None:
        """The request was answered."""
        writes, keys = self._at_work.pop(request_id, (False, ()))
        if self._whole == request_id:
            self._whole = None
        _take_out(self._touched, keys)
        if writes:
            _take_out(self._writes, keys)


def _touches(request: Request) -> tuple[bool, Sequence[bytes] | None]:
    """Whether a request writes, and its keys; None: all of them. What cannot be read is refused later, and has none."""
    try:
        if request.op == Op.READ:
            return False, decode_read(request.payload).keys
        if request.op == Op.WRITE:
            return True, decode_write(request.payload).keys
    except InvalidArgument:
        return False, ()
    return True, None


def _take_out(counts: Counter[bytes], keys: Sequence[bytes]) -> None:
    for key in keys:
        counts[key] -= 1
        if not counts[key]:
            del counts[key]
