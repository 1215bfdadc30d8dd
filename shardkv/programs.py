"""What the node, router and metadata programs share on the command line: exit codes, binding rules, start-up errors.

Invariant: a program that cannot start says why in one sentence on standard error (its log, when it has one: logs.py
puts the file in its place), and its exit code tells a supervisor whether starting it again could help.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable

from shardkv.errors import (
    ClusterMismatch,
    ConfigError,
    DiskFull,
    InvalidArgument,
    RequestError,
    ShardKVError,
    StorageError,
    StorePoisoned,
    VersionMismatch,
)
from shardkv.transport.address import format_address, is_loopback, parse_address, problem_of

EXIT_OK = 0
EXIT_FAILED = 1
"""Something broke; starting again may help."""
EXIT_USAGE = 2
"""Bad arguments or configuration."""
EXIT_NOT_STARTABLE = 4
"""Starting again cannot help: the directory is locked, damaged, too new, an old copy or another cluster's."""


def exit_code_of(error: ShardKVError) -> int:
    """The exit code of a program that ends because of `error`."""
    if isinstance(error, ConfigError | RequestError):
        return EXIT_USAGE
    if isinstance(error, StorePoisoned | DiskFull):
        return EXIT_FAILED
    if isinstance(error, StorageError | ClusterMismatch | VersionMismatch):
        return EXIT_NOT_STARTABLE
    return EXIT_FAILED


def check_bind(host: str, *, insecure: bool) -> None:
    """Raises InvalidArgument when others than this machine could connect and `insecure` was not said."""
    if not insecure and not is_loopback(host):
        raise InvalidArgument(
            f"Binding {host} lets other machines read and write everything: there is no authentication yet.",
            hint="Bind 127.0.0.1, or say --insecure on a network you trust.",
        )


def check_advertise(bind: str, advertise: str | None) -> None:
    """Raises InvalidArgument when others would not know where to connect: `advertised`, before there is a port."""
    advertised(bind, 0, advertise)


def advertised(bind: str, port: int, advertise: str | None) -> str:
    """The address others should use: `advertise` is HOST, or HOST:PORT where something forwards another port here.

    Raises InvalidArgument when it cannot be guessed from `bind`, or is no address.
    """
    if advertise is None and bind in ("0.0.0.0", "::", ""):
        raise InvalidArgument(
            f"Others cannot connect to {bind or 'an empty address'}.",
            hint="Say with --advertise under which name or address they reach this machine.",
        )
    if advertise is not None and (advertise.startswith("[") or advertise.count(":") == 1):
        return format_address(*parse_address(advertise))
    return format_address(advertise or bind, port)


def port_problem(error: OSError, host: str, port: int) -> ShardKVError:
    """Why a port could not be listened on, as a sentence."""
    where = format_address(host, port)
    if error.errno == errno.EADDRINUSE:
        return ShardKVError(
            f"Port {port} on {host} is taken by another program.", hint="Choose another port with --port."
        )
    return ShardKVError(f"Cannot listen on {where}: {problem_of(error)}.")


def guarded(start: Callable[[], int]) -> int:
    """The result of `start()`, or the exit code of the ShardKVError it raised."""
    try:
        return start()
    except ShardKVError as error:
        print(f"Error: {error}", file=sys.stderr, flush=True)
        return exit_code_of(error)
