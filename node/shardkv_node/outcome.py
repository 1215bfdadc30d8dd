"""Why a write that has ended was not applied, as its asker is told."""

from __future__ import annotations

from shardkv.errors import OutcomeUnknown, ShardKVError, StorePoisoned


def told_error(error: Exception) -> ShardKVError:
    """For the error of a `Write`. A store that failed meanwhile cannot say whether the write will be found again."""
    if isinstance(error, StorePoisoned):
        return OutcomeUnknown(f"The node failed while it stored the write, and starts again: {error.message}")
    return error if isinstance(error, ShardKVError) else ShardKVError(str(error))
