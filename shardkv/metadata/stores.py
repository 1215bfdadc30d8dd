"""Which store a metadata process keeps its cluster in, as people write it: `embedded`, or etcd://HOST:PORT,.../NAME."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from shardkv.directory_lock import DirectoryLock
from shardkv.errors import InvalidArgument
from shardkv.metadata.embedded import EmbeddedStore
from shardkv.metadata.store import MetaStore
from shardkv.transport.address import Address, parse_address

EMBEDDED = "embedded"
ETCD = "etcd://"
DEFAULT_NAME = "default"
LOCK_FILE = "LOCK"


@dataclass(frozen=True, slots=True)
class StoreChoice:
    """`endpoints`: none for the embedded store. `name`: of the cluster among those in one etcd."""

    endpoints: tuple[Address, ...] = ()
    name: str = DEFAULT_NAME


def parse_store(text: str) -> StoreChoice:
    """Raises InvalidArgument."""
    if text == EMBEDDED:
        return StoreChoice()
    if not text.startswith(ETCD):
        raise InvalidArgument(
            f"{text!r} is not a metadata store.", hint="Write embedded, or etcd://HOST:PORT,HOST:PORT/NAME."
        )
    addresses, _, name = text.removeprefix(ETCD).partition("/")
    if "/" in name or not name.isprintable():
        raise InvalidArgument(f"{name!r} is not a name for a cluster.", hint="Leave slashes out of it.")
    return StoreChoice(tuple(map(parse_address, addresses.split(","))), name or DEFAULT_NAME)


@asynccontextmanager
async def open_store(choice: StoreChoice, data_dir: Path | None) -> AsyncIterator[MetaStore]:
    """The store that was chosen. The embedded one has its directory to itself.

    Raises StoreLocked, StorageError; InvalidArgument without a directory; ConfigError when a library is missing.
    """
    if choice.endpoints:
        from shardkv.metadata.etcd import EtcdStore

        async with aclosing(EtcdStore(choice.endpoints, choice.name)) as etcd:
            yield etcd
        return
    if data_dir is None:
        raise InvalidArgument("The embedded metadata store needs a directory.", hint="Name one with --data-dir.")
    lock = DirectoryLock(data_dir / LOCK_FILE)
    try:
        async with aclosing(EmbeddedStore(data_dir)) as embedded:
            yield embedded
    finally:
        lock.release()
