"""Which TCP ports a cluster on this machine uses.

Invariant: a port is checked by binding it without SO_REUSEPORT, so that routers which share theirs cannot slip in
beside a stranger. Ports kept across restarts are taken from below the range that the system hands out by itself:
a client that keeps trying a dead port from that range can end up connected to itself and so occupy it.
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
from pathlib import Path

from shardkv.errors import LaunchError

META_PORTS_FROM, META_PORTS = 10_000, 20_000
_LOWEST_KEPT = 1024
_EPHEMERAL_FILE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def check_port(host: str, port: int) -> None:
    """Raises LaunchError when `port` cannot be listened on."""
    problem = _problem(host, port)
    if problem == errno.EADDRINUSE:
        raise LaunchError(
            f"Port {port} on {host} is taken by another program.",
            hint="Stop that program, or choose another port with --port.",
        )
    if problem:
        raise LaunchError(
            f"Port {port} on {host} cannot be listened on: {os.strerror(problem).lower()}.",
            hint="Check --bind and --port.",
        )


def free_port(host: str, *, near: int) -> int:
    """A free port to keep: the first one at or after `near`, starting over at the lowest. Raises LaunchError."""
    lowest, highest = _LOWEST_KEPT, _ephemeral_start() - 1
    first = min(max(near, lowest), highest)
    for port in itertools.chain(range(first, highest + 1), range(lowest, first)):
        if not _problem(host, port):
            return port
    raise LaunchError(f"There is no free port from {lowest} to {highest} on {host}.")


def meta_port_for(port: int) -> int:
    """Where to look first for the metadata process of a cluster on `port`: different for neighbouring clusters."""
    return META_PORTS_FROM + port % META_PORTS


def _problem(host: str, port: int) -> int:
    """The errno that binding fails with; 0 when it works."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise LaunchError(f"{host!r} is not an address of this machine: {error.strerror}.") from error
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen(1)
        except OSError as error:
            code: int | None = error.errno
            return code or errno.EINVAL
    return 0


def _ephemeral_start() -> int:
    try:
        first = int(_EPHEMERAL_FILE.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 32768
    return max(first, _LOWEST_KEPT + 1000)
