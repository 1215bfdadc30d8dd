"""Whether the cluster really serves: hellos and pings to every process, and a read through each router.

Invariant: nothing here trusts a file. A process counts as up when it answers at the address that the metadata
process knows for the very pid that runs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardkv.client.connection import Connection
from shardkv.errors import ShardKVError, UnavailableError
from shardkv.launcher.plan import META
from shardkv.limits import DEFAULT_LIMITS
from shardkv.transport.address import parse_address
from shardkv.wire.hello import Identity
from shardkv.wire.messages import NOTHING, OK, Op, RawReply, Scan, decode_any, decode_page, raw, reply_error

KEYSPACE = "default"
PING_TIMEOUT_S = 1.0
PAGE_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Registered:
    """One start of a process."""

    pid: int
    address: str


@dataclass(slots=True)
class Health:
    """What answered. `addresses` by process name; `problems` says of the rest why not."""

    addresses: dict[str, str] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    registered: dict[str, Registered] = field(default_factory=dict)
    """The starts that the metadata process knows of, by name."""
    keyspaces: dict[str, Any] = field(default_factory=dict)
    cluster_id: str | None = None


def check_health(
    meta_address: str,
    pids: Mapping[str, int],
    *,
    remembered: Mapping[str, Registered] | None = None,
    timeout_s: float = PING_TIMEOUT_S,
) -> Health:
    """Ask every process of `pids` (by name; 0 when it does not run) whether it is there.

    `remembered`: where they were, for when the metadata process cannot be asked.
    """
    health = Health(registered=dict(remembered or {}))
    try:
        status = decode_any(ask(meta_address, [(Op.STATUS, NOTHING)], timeout_s=timeout_s)[0])
    except ShardKVError as error:
        health.problems[META] = error.message
    else:
        _take_status(health, status, meta_address)
    for name, pid in pids.items():
        known = health.registered.get(name)
        if name == META:
            continue
        if known is None or known.pid != pid:
            health.problems[name] = "It has not registered yet."
        else:
            _ping(name, known.address, health, timeout_s)
    return health


def _take_status(health: Health, status: dict[str, Any], meta_address: str) -> None:
    health.cluster_id = status["cluster_id"]
    health.keyspaces = status["keyspaces"]
    health.addresses[META] = meta_address
    health.registered = {
        name: Registered(document["pid"], document["address"])
        for name, document in {**status["nodes"], **status["routers"]}.items()
    }
    health.registered[META] = Registered(status["pid"], meta_address)


def _ping(name: str, address: str, health: Health, timeout_s: float) -> None:
    try:
        ask(address, [(Op.PING, NOTHING)], cluster_id=health.cluster_id, timeout_s=timeout_s)
    except ShardKVError as error:
        health.problems[name] = error.message
    else:
        health.addresses[name] = address


def check_routed(router_address: str, cluster_id: str | None, *, timeout_s: float = PING_TIMEOUT_S) -> None:
    """Read through a router until every shard has been asked. Raises ShardKVError when one does not answer."""
    end = time.monotonic() + timeout_s
    start: bytes | None = b""
    while start is not None:
        scan = Scan(start=start, stop=None, reverse=False, keys_only=True, limit=1, page_bytes=PAGE_BYTES, shards=None)
        left_s = end - time.monotonic()
        page = decode_page(ask(router_address, [(Op.SCAN, raw(scan))], cluster_id=cluster_id, timeout_s=left_s)[0])
        start = None if page.keys else page.frontier


def ask(
    address: str, requests: Sequence[tuple[Op, Any]], *, timeout_s: float, cluster_id: str | None = None
) -> list[Any]:
    """The replies' payloads, from a connection of its own. Raises ShardKVError when there is not one for each."""
    deadline = time.monotonic() + timeout_s
    me = Identity("launcher", "launcher", cluster_id)
    try:
        connection = Connection.open(
            parse_address(address), me=me, keyspace=KEYSPACE, limits=DEFAULT_LIMITS, deadline=deadline
        )
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UnavailableError(f"{address} does not answer: {reason}.") from error
    try:
        outcomes = connection.exchange(requests, deadline)
    finally:
        connection.close()
    return [_payload(address, outcome) for outcome in outcomes]


def _payload(address: str, outcome: Any) -> Any:
    if isinstance(outcome, RawReply):
        if outcome.status == OK:
            return outcome.payload
        raise reply_error(outcome.payload)
    raise UnavailableError(f"{address} does not answer: {getattr(outcome, 'reason', outcome)}")
