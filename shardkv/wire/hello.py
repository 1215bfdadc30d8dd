"""Who may talk to whom: making a hello and judging the peer's. Pure; the transport sends what is made here.

Invariant: two processes of different clusters, or of protocol versions that do not understand each other, exchange
nothing but the one error that says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardkv.errors import ClusterMismatch, RemoteProtocolError, VersionMismatch
from shardkv.wire.messages import MAGIC, PROTOCOL_VERSION, Hello

ROLES = ("client", "router", "node", "meta", "launcher")


@dataclass(frozen=True, slots=True)
class Identity:
    """What a process says of itself."""

    role: str
    name: str
    cluster_id: str | None = None
    """None: does not know it yet (a client, or a process before it reached the metadata store)."""
    incarnation: int = 0

    def hello(self, *, ordered: bool = False) -> Hello:
        """`ordered`: asks for, or grants, per-key order."""
        return Hello(
            magic=MAGIC,
            protocol=PROTOCOL_VERSION,
            role=self.role,
            name=self.name,
            cluster_id=self.cluster_id,
            incarnation=self.incarnation,
            credentials=None,
            ordered=ordered,
        )


def check_hello(me: Identity, peer: Hello, *, expected: Identity | None = None) -> None:
    """Judge a peer's hello. With `expected`, the peer must also have that role and, if given, that name.

    Raises RemoteProtocolError (not shardkv, or another process than expected), VersionMismatch, ClusterMismatch.
    """
    if peer.magic != MAGIC or peer.role not in ROLES:
        raise RemoteProtocolError("The peer does not speak the shardkv protocol.")
    if peer.protocol != PROTOCOL_VERSION:
        raise VersionMismatch(
            f"The {peer.role} {peer.name!r} speaks protocol version {peer.protocol}, this {me.role} speaks "
            f"version {PROTOCOL_VERSION}.",
            hint="Install the same version of shardkv on both.",
        )
    if me.cluster_id and peer.cluster_id and me.cluster_id != peer.cluster_id:
        raise ClusterMismatch(
            f"The {peer.role} {peer.name!r} belongs to cluster {peer.cluster_id}, this {me.role} {me.name!r} "
            f"to cluster {me.cluster_id}.",
            hint="Check the addresses and the data directories.",
        )
    if expected is not None and (expected.role != peer.role or (expected.name and expected.name != peer.name)):
        raise RemoteProtocolError(
            f"Expected the {expected.role} {expected.name!r} at this address and met the {peer.role} {peer.name!r}."
        )
