"""Every error a shardkv program or library call raises, as one tree.

    ShardKVError                       code, retriable, refresh_topology, detail, hint
      RequestError                     the caller's fault; the same call will fail again
        InvalidArgument  InvalidKey  KeyTooLarge  ValueTooLarge  BatchTooLarge  InvalidRange
        InvalidNumber  UnknownKeyspace  UnknownOperation  ClientClosed
      RoutingError                     asked the wrong place: refresh the topology, retry inside the deadline
        WrongShard  StaleEpoch  ShardFenced
      UnavailableError                 not now: retry with backoff
        ShardUnavailable  RouterUnavailable  MetadataUnavailable  Overloaded  Draining
      DeadlineExceeded                 the time ran out; nothing was changed by this call
      OutcomeUnknown                   a write may or may not have been applied
      ConditionFailed                  a write's condition did not hold; nothing was changed by this call
      ProtocolError
        LocalProtocolError             we broke the protocol
        RemoteProtocolError            the peer broke it:  FrameTooLarge  VersionMismatch  ClusterMismatch
      AuthError
      StorageError
        Corruption(path, offset, expected, got)  UnsupportedFormat  StoreLocked  StoreMismatch
        StoreClosed  DiskFull  StorePoisoned
      ConfigError(problems)            all problems at once
      LaunchError                      the launcher could not do what was asked

Invariant: `code` is unique, is what travels on the wire, and is never given to another class.
A message is a sentence: what happened, where, what to do. A missing key is `None`, not an error.
"""

from __future__ import annotations

from typing import Any, ClassVar


class ShardKVError(Exception):
    """Base of all shardkv errors.

    `retriable`: the same call may succeed later and was not applied.
    `refresh_topology`: the caller's idea of who owns what is old.
    `detail`: facts for programs (shard, node, limit...); `hint`: what a person can do.
    """

    code: ClassVar[str] = "error"
    retriable: ClassVar[bool] = False
    refresh_topology: ClassVar[bool] = False

    def __init__(self, message: str, *, detail: dict[str, Any] | None = None, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.detail: dict[str, Any] = detail or {}
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".rstrip()

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.message, self.detail, self.hint))


def _rebuild(cls: type[ShardKVError], message: str, detail: dict[str, Any], hint: str) -> ShardKVError:
    error = cls.__new__(cls)
    ShardKVError.__init__(error, message, detail=detail, hint=hint)
    return error


class RequestError(ShardKVError):
    """The request itself is wrong; sending it again will fail again."""

    code = "bad_request"


class InvalidArgument(RequestError):
    code = "invalid_argument"


class InvalidKey(RequestError):
    code = "invalid_key"


class KeyTooLarge(RequestError):
    code = "key_too_large"


class ValueTooLarge(RequestError):
    code = "value_too_large"


class BatchTooLarge(RequestError):
    code = "batch_too_large"


class InvalidRange(RequestError):
    code = "invalid_range"


class InvalidNumber(RequestError):
    """An `incr` of a value that is no whole number of 64 bits, or would not be one afterwards. Nothing was changed."""

    code = "invalid_number"


class UnknownKeyspace(RequestError):
    code = "unknown_keyspace"


class UnknownOperation(RequestError):
    code = "unknown_operation"


class ClientClosed(RequestError):
    code = "client_closed"


class RoutingError(ShardKVError):
    """The request reached a process that does not own the shard. It was not applied."""

    code = "routing"
    retriable = True
    refresh_topology = True


class WrongShard(RoutingError):
    code = "wrong_shard"


class StaleEpoch(RoutingError):
    code = "stale_epoch"


class ShardFenced(RoutingError):
    """The shard is about to have another owner, or other bounds: wait for the topology to move on. Not applied."""

    code = "shard_fenced"


class UnavailableError(ShardKVError):
    """Not possible now, may be possible soon. The request was not applied."""

    code = "unavailable"
    retriable = True


class ShardUnavailable(UnavailableError):
    code = "shard_unavailable"


class RouterUnavailable(UnavailableError):
    code = "router_unavailable"


class MetadataUnavailable(UnavailableError):
    code = "metadata_unavailable"


class Overloaded(UnavailableError):
    code = "overloaded"


class Draining(UnavailableError):
    code = "draining"


class DeadlineExceeded(ShardKVError):
    """The deadline passed before an answer came, and nothing was changed by this call, but for what a call on many keys
    counts in its `detail` (`applied`, `deleted`)."""

    code = "deadline_exceeded"


class OutcomeUnknown(ShardKVError):
    """A write was sent and no answer came back: it may or may not have been applied."""

    code = "outcome_unknown"


class ConditionFailed(ShardKVError):
    """A key did not have the version a write asked for, and nothing was changed. Read again, then decide.

    `detail`: `key` (bytes), and `expected` and `found`, versions, 0 for a key that does not exist.
    """

    code = "condition_failed"


class ProtocolError(ShardKVError):
    code = "protocol"


class LocalProtocolError(ProtocolError):
    """This side broke the protocol: a bug in shardkv or a misuse of its lower layers."""

    code = "protocol_local"


class RemoteProtocolError(ProtocolError):
    """The peer broke the protocol. It gets one error and the connection is closed."""

    code = "protocol_remote"


class FrameTooLarge(RemoteProtocolError):
    code = "frame_too_large"


class VersionMismatch(RemoteProtocolError):
    code = "version_mismatch"


class ClusterMismatch(RemoteProtocolError):
    code = "cluster_mismatch"


class AuthError(ShardKVError):
    code = "auth"


class StorageError(ShardKVError):
    code = "storage"


class Corruption(StorageError):
    """Bytes on disk are not what was written.

    `path`, `offset` (bytes from the start of the file), `expected` and `got` say where and how.
    """

    code = "corruption"

    def __init__(self, what: str, *, path: str, offset: int, expected: object, got: object) -> None:
        super().__init__(
            f"{what} in {path} at offset {offset}: expected {expected}, got {got}.",
            detail={"path": path, "offset": offset, "expected": str(expected), "got": str(got)},
            hint="Nothing was changed. Restore this file from a copy; do not delete it.",
        )
        self.path, self.offset, self.expected, self.got = path, offset, expected, got


class UnsupportedFormat(StorageError):
    code = "unsupported_format"


class StoreLocked(StorageError):
    code = "store_locked"


class StoreMismatch(StorageError):
    """The directory is not the one it is taken for: another cluster's, another node's, or an old copy."""

    code = "store_mismatch"


class StoreClosed(StorageError):
    code = "store_closed"


class DiskFull(StorageError):
    """Writes are refused until space returns; reads go on. The write was not applied."""

    code = "disk_full"
    retriable = True


class StorePoisoned(StorageError):
    """A write or sync to disk failed. The store takes no more writes; reopening it decides what was kept."""

    code = "store_poisoned"


class ConfigError(ShardKVError):
    """Every problem of a configuration at once: `problems` holds one sentence each."""

    code = "config"

    def __init__(self, problems: list[str], *, where: str = "the configuration") -> None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{count} in {where}:\n" + "\n".join(f"  - {problem}" for problem in problems))
        self.problems = problems


class LaunchError(ShardKVError):
    code = "launch"


FINAL_REFUSALS = (ConditionFailed, InvalidNumber)
"""What a node, asked again to make a write with a token, refuses for good: no copy of that write is made later."""


def _tree(cls: type[ShardKVError]) -> list[type[ShardKVError]]:
    return [cls, *(found for child in cls.__subclasses__() for found in _tree(child))]


BY_CODE: dict[str, type[ShardKVError]] = {cls.code: cls for cls in _tree(ShardKVError)}
"""Class for each code. A peer's unknown code is read as plain `ShardKVError` by `from_wire`."""


def from_wire(code: str, message: str, detail: dict[str, Any], hint: str) -> ShardKVError:
    """The error a peer reported, as an exception of the class its code names."""
    return _rebuild(BY_CODE.get(code, ShardKVError), message, detail, hint)
