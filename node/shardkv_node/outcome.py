"""What became of a write that has ended, as its asker is told."""

from __future__ import annotations

from shardkv.errors import OutcomeUnknown, ShardFenced, ShardKVError, ShardUnavailable, StorePoisoned
from shardkv.wire.messages import WriteResult
from shardkv_node.engine.write import Write

_RESULT_BYTES = bytes((WriteResult.APPLIED, WriteResult.APPLIED_EXISTED))


def told_results(write: Write) -> bytes:
    """A WriteResult for each operation of a write that was applied."""
    return bytes(len(write.keys)) if write.existed is None else bytes(map(_RESULT_BYTES.__getitem__, write.existed))


def told_error(error: Exception) -> ShardKVError:
    """For the error of a `Write`. A store that failed meanwhile cannot say whether the write will be found again; one
    that takes no writes for a tablet is about to split or merge it."""
    if isinstance(error, StorePoisoned):
        return OutcomeUnknown(f"The node failed while it stored the write, and starts again: {error.message}")
    if isinstance(error, ShardUnavailable):
        return ShardFenced("The shard is about to be divided or merged, and takes no writes for a moment.")
    return error if isinstance(error, ShardKVError) else ShardKVError(str(error))
