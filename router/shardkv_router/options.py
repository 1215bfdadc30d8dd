"""What can be set about a router, and why one would."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterOptions:
    """Defaults suit one machine; `[router]` in a configuration file changes them."""

    park_ms: int = 10_000
    """Longest a request waits for its shard to come back before ShardUnavailable; its own deadline may be sooner.
    Shorter: callers hear of a dead node sooner. Longer: they ride out a slower restart."""
    parked_bytes_max: int = 64 * 1024 * 1024
    """Most bytes of requests waiting so; past it they are refused at once with Overloaded."""
    page_bytes_max: int = 1024 * 1024
    """Largest page of a scan, whatever the client asks for."""
