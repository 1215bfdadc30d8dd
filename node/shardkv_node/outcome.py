"""Why a write that has ended was not applied, as its asker is told."""

from __future__ import annotations

from shardkv.errors import OutcomeUnknown, ShardKVError, StorePoisoned
from shardkv_node.engine.write import Write


def write_error(write: Write) -> ShardKVError | None:
    """None: it was applied. A store that failed meanwhile cannot say whether the write will be found again."""
    error = write.error
    if isinstance(error, StorePoisoned):
        return OutcomeUnknown(f"The node failed while it stored the write, and starts again: {error.message}")
    if error is None or isinstance(error, ShardKVError):
        return error
    return ShardKVError(str(error))
