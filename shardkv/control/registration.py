"""Whether a node's directory is the newest one that ran under its name.

A number that rises at every start cannot tell: an old copy that is refused, and started again and again, counts up
until it is ahead. So each start draws an id. The directory lists the ids it drew since the last one it saw registered,
that one included; it adds a new one, durably, before it asks to be registered, and forgets those before its own when it
is. A copy of before the last registered start cannot know that start's id, however often it is started.
"""

from __future__ import annotations

from collections.abc import Collection

from shardkv.topology.documents import NodeDocument


def is_newest_directory(known: NodeDocument | None, store_id: str, start_ids: Collection[str]) -> bool:
    """Whether a directory with this store and these drawn ids may take over from the registered start `known`.

    A document without an id is of a version that drew none: then the number of the start has to do.
    """
    if known is None:
        return True
    return known.store_id == store_id and (not known.start_id or known.start_id in start_ids)


def next_incarnation(known: NodeDocument | None) -> int:
    """The number to register with, by compare-and-set on `known`: one start has it, whatever was tried before."""
    return known.incarnation + 1 if known is not None else 1
