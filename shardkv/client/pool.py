"""Connections to the routers, or to a node, shared by the threads of one process.

Invariants: a connection is lent to one thread at a time; at most `size` exist, and who finds none free waits, within
its deadline, instead of failing; those who wait are served in turn, and whoever comes just when one is free is served
before them for no longer than OVERTAKEN_S; a forked child never touches its parent's connections, it opens its own. One
on which an answer is to come that nobody waits for yet is parked, and makes room for whoever finds no other. One that
was lent and lost, because a signal's exception ended the call between any two steps, is missed only until others need
its room.
"""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol, TypeVar

from shardkv.client.backoff import CONNECT_NEEDS_S, pause_s
from shardkv.client.connection import Connection
from shardkv.errors import ClientClosed, DeadlineExceeded, RouterUnavailable, ShardKVError
from shardkv.limits import Limits
from shardkv.transport.address import Address, format_address
from shardkv.wire.hello import Identity

CONNECT_ATTEMPT_S = 2.0
"""One of several addresses may take this long to answer, and half of what is left, before the next one is tried."""
RECOUNT_S = 1.0
"""How often those who wait look whether what they wait for still exists."""


OVERTAKEN_S = 0.005
"""Waking a thread for each call that ends would cost more than the call."""


class _Ticket:
    """Of one who waits."""

    __slots__ = ("since", "turn")

    def __init__(self, lock: threading.Lock) -> None:
        self.turn = threading.Condition(lock)
        self.since = time.monotonic()


class _Place:
    """Stands for a connection while it is being made."""


Made = TypeVar("Made", Connection, _Place)


class Pool:
    """Lends connections: `acquire`, then `release`, always."""

    def __init__(self, addresses: Sequence[Address], *, size: int, me: Identity, keyspace: str, limits: Limits) -> None:
        self._addresses = list(addresses)
        self._size = size
        self._me = me
        self._keyspace = keyspace
        self._limits = limits
        self._turn = itertools.count(random.randrange(len(self._addresses)))
        self._closed = False
        self._start_empty()
        when_forked(self)

    def _start_empty(self) -> None:
        self._lock = threading.Lock()
        self._line: deque[_Ticket] = deque()
        """Those who wait."""
        self._idle: list[Connection] = []
        self._parked: dict[Connection, None] = {}
        """Those on which an answer is to come that nobody waits for yet."""
        self._lent = 0
        self._made: list[weakref.ref[Connection | _Place]] = []
        """All there are: whoever was lent one holds on to it."""

    def forget_inherited(self) -> None:
        """In a forked child: the connections, and the lock as another thread may have left it, are the parent's."""
        inherited = [*self._idle, *self._parked]
        self._start_empty()
        for connection in inherited:
            connection.close()

    def acquire(self, timeout_s: float, deadline: float) -> Connection:
        """A usable connection, at the latest at `deadline` (monotonic), which is `timeout_s` after the call began.

        Raises ClientClosed, RouterUnavailable, DeadlineExceeded (all connections in use all the time), or a router's
        refusal of us.
        """
        with self._lock:
            if (not self._idle and not self._room()) or (self._line and self._someone_is_overdue()):
                self._wait_for_one(timeout_s, deadline)
            if self._closed:
                raise closed_error()
            self._lent += 1
            connection = self._idle.pop() if self._idle else None
            place = self._new(_Place()) if connection is None else None
        try:
            if connection is not None:
                if connection.quiet():
                    return connection
                with self._lock:
                    place = self._new(_Place())
                connection.close()
            connection = self._connect(timeout_s, deadline)
            with self._lock:
                del place
                return self._new(connection)
        except BaseException:
            self._give_back(None)
            raise

    def _room(self) -> bool:
        """Whether one may be had, be it in the place of a parked one. Requires: the lock is held."""
        if self._idle or self._lent + len(self._parked) < self._size:
            return True
        if not self._parked:
            return self._recount()
        self.discard(next(iter(self._parked)))
        return True

    def _new(self, made: Made) -> Made:
        """Requires: as above."""
        self._made = [one for one in self._made if one() is not None]
        self._made.append(weakref.ref(made))
        return made

    def _recount(self) -> bool:
        """Whether there is room after all, since some that were lent do not exist any more. Requires: as above."""
        unused = {*self._idle, *self._parked}
        made = [one for one in (each() for each in self._made) if one is not None and one not in unused]
        self._lent = min(self._lent, sum(not (isinstance(one, Connection) and one.closed) for one in made))
        return self._lent + len(self._parked) < self._size

    def _someone_is_overdue(self) -> bool:
        """Requires: the lock is held."""
        return time.monotonic() - self._line[0].since > OVERTAKEN_S

    def _call_next(self) -> None:
        """Wake the one who has waited longest. Requires: as above."""
        if self._line:
            self._line[0].turn.notify()

    def _wait_for_one(self, timeout_s: float, deadline: float) -> None:
        """Until it is our turn and one may be had, or the pool is closed. Requires: as above."""
        ticket, taken = _Ticket(self._lock), 0
        try:
            self._line.append(ticket)
            while not (self._closed or (self._line[0] is ticket and self._room())):
                left_s = deadline - time.monotonic()
                if not ticket.turn.wait(min(left_s, RECOUNT_S)) and left_s <= RECOUNT_S:
                    raise DeadlineExceeded(
                        f"All {self._size} connections of this client were in use for {timeout_s:g} s.",
                        hint="Raise connections_max, or share the client among fewer threads.",
                    )
            taken = 1
        finally:
            with suppress(ValueError):
                self._line.remove(ticket)
            if self._size - self._lent - len(self._parked) > taken:
                self._call_next()

    def release(self, connection: Connection) -> None:
        """Take back what `acquire` lent."""
        self._give_back(connection)

    def take_idle(self) -> Connection | None:
        """One that lies idle, if all others can do without it. Then `park` or `release` it."""
        with self._lock:
            if self._closed or self._line or not self._idle or self._size == 1:
                return None
            self._lent += 1
            return self._idle.pop()

    def park(self, connection: Connection) -> None:
        """Leave one here until its answer is wanted, or the connection for somebody else."""
        with self._lock:
            self._lent -= 1
            parked = not self._closed and not self._line
            if parked:
                self._parked[connection] = None
            else:
                self._call_next()
        if not parked:
            connection.close()

    def unpark(self, connection: Connection) -> bool:
        """Have it back, to `release` it. False: it was taken, and closed."""
        with self._lock:
            if connection not in self._parked:
                return False
            del self._parked[connection]
            self._lent += 1
            return True

    def discard(self, connection: Connection) -> None:
        """Close one that is parked. Takes no lock, so that it can be called anywhere."""
        self._parked.pop(connection, None)
        connection.close()

    def close(self) -> None:
        """Close idle connections now and lent ones when they come back; `acquire` raises ClientClosed from now on."""
        with self._lock:
            self._closed = True
            unused = [*self._idle, *self._parked]
            self._idle.clear()
            self._parked.clear()
            for ticket in self._line:
                ticket.turn.notify()
        for connection in unused:
            connection.close()

    def _give_back(self, connection: Connection | None) -> None:
        with self._lock:
            self._lent -= 1
            kept = connection is not None and connection.usable and not self._closed
            if kept and connection is not None:
                self._idle.append(connection)
            if self._line:
                self._call_next()
        if connection is not None and not kept:
            connection.close()

    def _connect(self, timeout_s: float, deadline: float) -> Connection:
        """Try the addresses in turn, again and again with pauses, until one answers or the time is over."""
        reasons: dict[str, str] = {}
        for attempt in itertools.count():
            first = next(self._turn)
            for step in range(len(self._addresses)):
                address = self._addresses[(first + step) % len(self._addresses)]
                try:
                    return self._open(address, deadline)
                except OSError as error:
                    reasons[format_address(*address)] = reason_of(error)
                except ShardKVError as error:
                    if not error.retriable:
                        raise
                    reasons[format_address(*address)] = error.message.rstrip(".")
            left_s = deadline - time.monotonic()
            pause = pause_s(attempt, random.random(), left_s=left_s, needed_s=CONNECT_NEEDS_S)
            if pause is None:
                break
            time.sleep(pause)
            if self._closed:
                raise closed_error()
        raise no_router_error(reasons, timeout_s)

    def _open(self, address: Address, deadline: float) -> Connection:
        if len(self._addresses) > 1:
            now = time.monotonic()
            deadline = now + min(CONNECT_ATTEMPT_S, (deadline - now) / 2)
        return Connection.open(address, me=self._me, keyspace=self._keyspace, limits=self._limits, deadline=deadline)


def closed_error() -> ClientClosed:
    return ClientClosed("This client was closed.", hint="Create a new one.")


def no_router_error(reasons: dict[str, str], timeout_s: float) -> RouterUnavailable:
    """`reasons`: why, for each address."""
    told = "; ".join(f"{address}: {reason}" for address, reason in reasons.items())
    return RouterUnavailable(
        f"No router could be reached within {timeout_s:g} s ({told}).",
        detail={"addresses": list(reasons)},
        hint="Is the cluster running? `shardkv cluster up` starts one.",
    )


def reason_of(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


class Inherited(Protocol):
    """What a forked child must not use as it is."""

    def forget_inherited(self) -> None: ...


_inherited: weakref.WeakSet[Inherited] = weakref.WeakSet()
_forks_watched = False


def when_forked(holder: Inherited) -> None:
    """Call `forget_inherited` of it in every child that this process forks."""
    global _forks_watched
    _inherited.add(holder)
    if not _forks_watched and hasattr(os, "register_at_fork"):
        _forks_watched = True
        os.register_at_fork(after_in_child=_forget_inherited)


def _forget_inherited() -> None:
    for holder in list(_inherited):
        holder.forget_inherited()
