"""The storage engine of a node: an LSM store that can also be embedded.

    from shardkv_node.engine import Engine

The name is loaded when it is first used, so that a worker process does not pay for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardkv_node.engine.engine import Engine

__all__ = ["Engine"]


def __getattr__(name: str) -> Any:
    if name != "Engine":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from shardkv_node.engine.engine import Engine

    return Engine
