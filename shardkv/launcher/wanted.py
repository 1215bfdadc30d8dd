"""Which nodes are wanted, as the metadata store has it; followed in a thread, for the launcher's loop waits elsewhere.

Invariant: what is told is a state the store once had, the newest that was heard; while the store cannot be reached,
nothing changes.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress

from shardkv.client.connection import Connection
from shardkv.errors import ShardKVError, UnavailableError
from shardkv.launcher.readiness import KEYSPACE
from shardkv.limits import DEFAULT_LIMITS
from shardkv.topology.documents import WANTED, WantedDocument, decode_document
from shardkv.transport.address import parse_address
from shardkv.wire.hello import Identity
from shardkv.wire.messages import (
    OK,
    MetaEntries,
    MetaWatch,
    Op,
    RawReply,
    decode_meta_entries,
    raw,
    reply_error,
)

WAIT_MS = 20_000
ANSWER_GRACE_S = 5.0
RETRY_S = 0.5


class WantedFollower:
    """`fd` becomes readable when something is new; `take` tells all of it."""

    def __init__(self, meta_address: str) -> None:
        self._address = parse_address(meta_address)
        self.fd, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._revision = 0
        self._wanted: dict[str, WantedDocument] = {}
        self._thread = threading.Thread(target=self._follow, name="wanted", daemon=True)
        self._thread.start()

    def take(self) -> dict[str, WantedDocument]:
        """What is wanted of each node that a person said something about; the others are wanted as they are."""
        with suppress(BlockingIOError):
            os.read(self.fd, 1024)
        with self._lock:
            return dict(self._wanted)

    def close(self) -> None:
        """Follow no longer. The thread ends with its next answer, at the latest with the process."""
        with self._lock:
            self._ended.set()
            os.close(self.fd)
            os.close(self._writer)

    def _follow(self) -> None:
        while not self._ended.is_set():
            try:
                self._follow_connected()
            except (OSError, ShardKVError):
                self._ended.wait(RETRY_S)

    def _follow_connected(self) -> None:
        deadline = time.monotonic() + ANSWER_GRACE_S
        me = Identity("launcher", "launcher")
        connection = Connection.open(self._address, me=me, keyspace=KEYSPACE, limits=DEFAULT_LIMITS, deadline=deadline)
        try:
            while not self._ended.is_set():
                self._learn(_watch(connection, self._revision))
        finally:
            connection.close()

    def _learn(self, news: MetaEntries) -> None:
        if news.revision < self._revision:
            self._revision = 0
            return
        fresh = self._revision == 0
        changed = {entry.key: entry.value for entry in news.entries if entry.key.startswith(WANTED)}
        self._revision = news.revision
        if not changed and not fresh:
            return
        with self._lock:
            if self._ended.is_set():
                return
            if fresh:
                self._wanted = {}
            for key, value in changed.items():
                document = decode_document(key, value) if value is not None else None
                self._wanted.pop(key.removeprefix(WANTED), None)
                if isinstance(document, WantedDocument):
                    self._wanted[document.name] = document
            with suppress(BlockingIOError):
                os.write(self._writer, b"w")


def _watch(connection: Connection, since: int) -> MetaEntries:
    """What is newer than `since`, as soon as something is. Raises ShardKVError."""
    deadline = time.monotonic() + WAIT_MS / 1000 + ANSWER_GRACE_S
    outcome = connection.ask(Op.META_WATCH, raw(MetaWatch(since, WAIT_MS)), deadline)
    if not isinstance(outcome, RawReply):
        raise UnavailableError(f"The metadata process does not answer: {getattr(outcome, 'reason', outcome)}")
    if outcome.status != OK:
        raise reply_error(outcome.payload)
    found: MetaEntries = decode_meta_entries(outcome.payload)
    return found
