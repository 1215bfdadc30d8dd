"""Who a node is across restarts: its name, cluster and incarnation, in `node.json` of its data directory.

Invariant: the incarnation on disk is raised (durably) before the metadata store is asked to raise its own, so the
store is never ahead of an honest directory; a directory that is behind the store is an old copy. One that is started
again and again catches up, so each start draws an id as well, and the file lists those drawn since the last start that
was registered, that one included: a store that shows another id has seen a later state of this directory.
"""

from __future__ import annotations

import os

import msgspec

from shardkv.errors import StorageError, StoreMismatch, UnsupportedFormat
from shardkv_node.engine.vfs import OsVfs

FILE = "node.json"
FORMAT = 1


class NodeFile(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of `node.json`."""

    format: int
    name: str
    cluster_id: str | None
    incarnation: int
    start_ids: list[str] = []
    """Of the last start known to be registered, and of those after it; the last one is of the latest start."""


class NodeIdentity:
    """Reads and writes the node's file in `directory`."""

    def __init__(self, directory: str, name: str) -> None:
        self._path = os.path.join(directory, FILE)
        self._vfs = OsVfs()
        self._file = self._load(name)

    @property
    def name(self) -> str:
        return self._file.name

    @property
    def cluster_id(self) -> str | None:
        return self._file.cluster_id

    @property
    def incarnation(self) -> int:
        return self._file.incarnation

    @property
    def start_id(self) -> str:
        """Of this start. Requires: it has begun."""
        return self._file.start_ids[-1]

    @property
    def start_ids(self) -> list[str]:
        """What the registered start, if it was one of this directory, is known by."""
        return self._file.start_ids

    def _load(self, name: str) -> NodeFile:
        if not self._vfs.exists(self._path):
            return NodeFile(format=FORMAT, name=name, cluster_id=None, incarnation=0)
        data = self._vfs.read_all(self._path)
        try:
            found = msgspec.json.decode(data, type=NodeFile)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise StorageError(
                f"{self._path} cannot be read: {error}.", hint="Restore it from a copy of this data directory."
            ) from error
        if found.format > FORMAT:
            raise UnsupportedFormat(
                f"{self._path} has format {found.format}; this version of shardkv knows up to {FORMAT}.",
                hint="Start it with the version of shardkv that wrote it, or a newer one.",
            )
        if found.name != name:
            raise StoreMismatch(
                f"The data directory of {self._path} belongs to node {found.name!r}, not to {name!r}.",
                hint="Check --name and --data-dir.",
            )
        return found

    def begin(self) -> int:
        """Raise the incarnation on disk for this start, draw its id, and return the incarnation before."""
        before = self._file.incarnation
        start_ids = [*self._file.start_ids, os.urandom(8).hex()]
        self._store(msgspec.structs.replace(self._file, incarnation=before + 1, start_ids=start_ids))
        return before

    def registered(self) -> None:
        """Remember that this start is registered: what was drawn before it says nothing any more."""
        self._store(msgspec.structs.replace(self._file, start_ids=self._file.start_ids[-1:]))

    def join(self, cluster_id: str, incarnation: int) -> None:
        """Remember the cluster and the incarnation the metadata store gave.

        Raises StoreMismatch when the directory belongs to another cluster.
        """
        if self._file.cluster_id not in (None, cluster_id):
            raise StoreMismatch(
                f"The data directory of {self._path} belongs to cluster {self._file.cluster_id}, "
                f"the metadata store to cluster {cluster_id}.",
                hint="Check --data-dir and --meta.",
            )
        self._store(msgspec.structs.replace(self._file, cluster_id=cluster_id, incarnation=incarnation))

    def _store(self, file: NodeFile) -> None:
        self._vfs.write_atomic(self._path, msgspec.json.encode(file) + b"\n")
        self._file = file
