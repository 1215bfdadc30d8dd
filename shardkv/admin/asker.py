"""One question to the cluster as a whole, through any router, asked again until it is answered or the time is up.

Invariant: a question that changes something carries a token under which the cluster does it once, so asking again is
always safe; when no answer came in time, `OutcomeUnknown` says so and names the token.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from shardkv.client.backoff import pause_s
from shardkv.client.calls import Lost
from shardkv.client.connection import Connection
from shardkv.errors import (
    ClientClosed,
    DeadlineExceeded,
    OutcomeUnknown,
    RouterUnavailable,
    ShardKVError,
    UnavailableError,
)
from shardkv.limits import DEFAULT_LIMITS
from shardkv.transport.address import Address, format_address
from shardkv.wire.hello import Identity
from shardkv.wire.messages import OK, Op, RawReply, reply_error

KEYSPACE = "default"
"""Connections name one; admin requests do not look at it."""
ATTEMPT_S = 10.0
"""A router that has not answered for so long is left for another one."""
ANSWER_NEEDS_S = 0.05
ASK_AGAIN = (UnavailableError, OutcomeUnknown, DeadlineExceeded)


class Asker:
    """Keeps one connection, to the router that answered last. May be shared among threads, which take turns."""

    def __init__(self, addresses: Sequence[Address]) -> None:
        self._addresses = list(addresses)
        self._at = random.randrange(len(self._addresses))
        self._connection: Connection | None = None
        self._closed = False
        self._lock = threading.Lock()

    def ask(self, verb: str, arguments: dict[str, Any], *, timeout_s: float, token: str | None = None) -> msgspec.Raw:
        """The answer. Raises what the cluster reported, UnavailableError, DeadlineExceeded, OutcomeUnknown."""
        told = {"verb": verb, **arguments} | ({"token": token} if token is not None else {})
        payload = msgspec.Raw(msgspec.msgpack.encode(told))
        deadline = time.monotonic() + timeout_s
        attempt, maybe_done = 0, False
        while True:
            try:
                with self._lock:
                    return self._ask_once(payload, min(deadline, time.monotonic() + ATTEMPT_S))
            except ASK_AGAIN as error:
                problem = error
            maybe_done = maybe_done or not isinstance(problem, UnavailableError)
            left_s = deadline - time.monotonic()
            pause = pause_s(attempt, random.random(), left_s=left_s, needed_s=ANSWER_NEEDS_S)
            if pause is None:
                raise _given_up(verb, problem, timeout_s, token if maybe_done else None)
            time.sleep(pause)
            attempt += 1

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._drop()

    def _ask_once(self, payload: msgspec.Raw, deadline: float) -> msgspec.Raw:
        outcome = self._connected(deadline).ask(Op.META_ADMIN, payload, deadline)
        if isinstance(outcome, RawReply):
            if outcome.status == OK:
                return outcome.payload.copy()  # it is a view of the buffer that the next answer comes into
            error = reply_error(outcome.payload)
            if isinstance(error, ASK_AGAIN):
                self._drop()
            raise error
        self._drop()
        if isinstance(outcome, Lost):
            raise (OutcomeUnknown if outcome.sent else UnavailableError)(outcome.reason)
        raise outcome if isinstance(outcome, ShardKVError) else OutcomeUnknown("The answer cannot be read.")

    def _connected(self, deadline: float) -> Connection:
        """A connection that can be used; each new one is to the next address. Raises RouterUnavailable."""
        if self._closed:
            raise ClientClosed("This Admin was closed.")
        if self._connection is not None and self._connection.quiet():
            return self._connection
        self._drop()
        address = self._addresses[self._at % len(self._addresses)]
        try:
            self._connection = Connection.open(
                address, me=Identity("client", "admin"), keyspace=KEYSPACE, limits=DEFAULT_LIMITS, deadline=deadline
            )
        except OSError as error:
            self._at += 1
            reason = (error.strerror or str(error)).lower()
            raise RouterUnavailable(
                f"The router at {format_address(*address)} was not reached: {reason}.",
                hint="Is the cluster up? Name a router with its HOST:PORT.",
            ) from error
        except ShardKVError:
            self._at += 1
            raise
        return self._connection

    def _drop(self) -> None:
        """Give up the connection; the next one is to another router, if there are several."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
            self._at += 1


def _given_up(verb: str, problem: ShardKVError, timeout_s: float, token: str | None) -> ShardKVError:
    if token is None:
        return problem
    return OutcomeUnknown(
        f"Whether {verb} was done is not known: no answer came within {timeout_s:g} s. {problem.message}",
        hint=f"Ask again with token={token!r}: it is done once at most.",
        detail={"token": token},
    )
