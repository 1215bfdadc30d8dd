"""Every limit of the wire and of user data, in one place; `shardkv/wire/PROTOCOL.md` has the same table.

All are configurable (`[limits]` in a configuration file); the values here are the defaults.
Sizes are bytes, times milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB

TTL_MS_MAX = 1 << 52
"""The longest time to live. 140,000 years: the sum with the time now stays far inside 64 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a process accepts from its peers and users."""

    key_bytes_max: int = 64 * KIB
    """Longest user key."""
    value_bytes_max: int = 16 * MIB
    """Longest value."""
    frame_bytes_max: int = 32 * MIB
    """Longest frame body after the hello."""
    hello_bytes_max: int = 4 * KIB
    """Longest frame body before the hello was accepted."""
    operations_max: int = 10_000
    """Most keys or operations in one request."""
    requests_in_flight_max: int = 4_096
    """Most unanswered requests of one connection of a router or node; past it the socket is not read."""
    client_requests_in_flight_max: int = 1_024
    """The same for a client's connection. Those of all clients meet on a router's connection to a node, in line: it is
    how many of another's requests a client may find before its own."""
    bytes_in_flight_max: int = 64 * MIB
    """Most bytes of unanswered requests of one connection; past it the socket is not read."""
    process_requests_in_flight_max: int = 65_536
    """Most unanswered requests of all connections of a process; past it, those over their share are Overloaded."""
    process_bytes_in_flight_max: int = 256 * MIB
    """Most bytes of requests, unfinished frames and unread replies of all connections; past it, as above."""
    output_bytes_max: int = 64 * MIB
    """Most bytes of replies a peer may leave unread; past a quarter of it the socket is not read, past it closed."""
    hello_timeout_ms: int = 5_000
    """A connection that has not said hello by then is closed."""
    frame_timeout_ms: int = 30_000
    """A connection whose frame is not complete so long after its first byte is closed."""
    output_timeout_ms: int = 30_000
    """A connection that has replies to read and takes no byte of them for this long is closed."""
    idle_timeout_ms: int = 300_000
    """A connection with nothing in flight and nothing said for this long is closed."""
    silence_timeout_ms: int = 10_000
    """A peer that owes an answer and says nothing for this long, not even to a ping, is connected to anew. More where
    links carry less than about a megabyte a second."""
    connections_max: int = 10_000
    """Most connections of one process."""


DEFAULT_LIMITS = Limits()
