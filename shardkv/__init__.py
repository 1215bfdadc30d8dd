"""shardkv: a sharded, ordered, durable key-value cluster in one pip install.

    from shardkv import Admin, Client, AsyncClient, WriteBatch

Names are loaded when they are first used: a program that uses one client does not pay for the other.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardkv.admin.admin import Admin
    from shardkv.client.aio import AsyncClient
    from shardkv.client.missing import Missing, PartialCount, PartialDict
    from shardkv.client.sync import Client
    from shardkv.errors import (
        AuthError,
        BatchTooLarge,
        ClientClosed,
        ClusterMismatch,
        ConditionFailed,
        ConfigError,
        Corruption,
        DeadlineExceeded,
        DiskFull,
        Draining,
        FrameTooLarge,
        InvalidArgument,
        InvalidKey,
        InvalidNumber,
        InvalidRange,
        KeyTooLarge,
        LaunchError,
        LocalProtocolError,
        MetadataUnavailable,
        OutcomeUnknown,
        Overloaded,
        ProtocolError,
        RemoteProtocolError,
        RequestError,
        RouterUnavailable,
        RoutingError,
        ShardKVError,
        ShardUnavailable,
        StaleEpoch,
        StorageError,
        StoreClosed,
        StoreLocked,
        StoreMismatch,
        StorePoisoned,
        UnavailableError,
        UnknownKeyspace,
        UnknownOperation,
        UnsupportedFormat,
        ValueTooLarge,
        VersionMismatch,
        WrongShard,
    )
    from shardkv.limits import Limits
    from shardkv.write_batch import WriteBatch

__all__ = [
    "Admin",
    "AsyncClient",
    "AuthError",
    "BatchTooLarge",
    "Client",
    "ClientClosed",
    "ClusterMismatch",
    "ConditionFailed",
    "ConfigError",
    "Corruption",
    "DeadlineExceeded",
    "DiskFull",
    "Draining",
    "FrameTooLarge",
    "InvalidArgument",
    "InvalidKey",
    "InvalidNumber",
    "InvalidRange",
    "KeyTooLarge",
    "LaunchError",
    "Limits",
    "LocalProtocolError",
    "MetadataUnavailable",
    "Missing",
    "OutcomeUnknown",
    "Overloaded",
    "PartialCount",
    "PartialDict",
    "ProtocolError",
    "RemoteProtocolError",
    "RequestError",
    "RouterUnavailable",
    "RoutingError",
    "ShardKVError",
    "ShardUnavailable",
    "StaleEpoch",
    "StorageError",
    "StoreClosed",
    "StoreLocked",
    "StoreMismatch",
    "StorePoisoned",
    "UnavailableError",
    "UnknownKeyspace",
    "UnknownOperation",
    "UnsupportedFormat",
    "ValueTooLarge",
    "VersionMismatch",
    "WriteBatch",
    "WrongShard",
]

_HOMES = {
    "Admin": "shardkv.admin.admin",
    "AsyncClient": "shardkv.client.aio",
    "Client": "shardkv.client.sync",
    "Limits": "shardkv.limits",
    "Missing": "shardkv.client.missing",
    "PartialCount": "shardkv.client.missing",
    "PartialDict": "shardkv.client.missing",
    "WriteBatch": "shardkv.write_batch",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'shardkv' has no attribute {name!r}")
    found = getattr(import_module(_HOMES.get(name, "shardkv.errors")), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
