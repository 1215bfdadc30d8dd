"""A cluster as on several machines: metadata in etcd behind several metadata processes, nodes and routers that know
all of these. Processes are called `meta-1`, `node-1`, `router-1` and so on; their links run through proxies.

Invariant: as of WiredCluster and EtcdWorld; nothing is left running.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shardkv.errors import ShardKVError
from shardkv.launcher.readiness import ask
from shardkv.wire.messages import NOTHING, Op, decode_any
from tests.worlds.etcd import EtcdWorld, etcd_world
from tests.worlds.wired_cluster import WiredCluster, _port

LEASE_MS = 2_000


class EtcdCluster(WiredCluster):
    """Use `etcd_cluster`."""

    def __init__(
        self,
        directory: Path,
        etcd: EtcdWorld,
        *,
        metas: int,
        nodes: int,
        routers: int,
        partition: str = "hash",
        config: str = "",
    ) -> None:
        config += f"[metadata]\nlease_ms = {LEASE_MS}\n"
        super().__init__(directory, partition=partition, nodes=nodes, routers=routers, config=config)
        self.etcd = etcd
        self.metas = [f"meta-{number}" for number in range(1, metas + 1)]
        del self._commands["meta"]
        known = {name: _port() for name in self.metas}
        self.proxies |= {name: self.wires.add(port) for name, port in known.items()}
        addresses = ",".join(self.proxies[name].address for name in self.metas)
        self._metas_known = addresses
        for command in self._commands.values():
            command[command.index("--meta") + 1] = addresses
        shape = [
            "--nodes",
            str(nodes),
            "--shards",
            str(2 * nodes),
            "--partition",
            partition,
            "--store",
            f"etcd://{etcd.endpoints}/test",
        ]
        serve = {
            name: ["shardkv", "meta", "run", "--name", name, "--port", str(port), *shape]
            for name, port in known.items()
        }
        self._commands = serve | self._commands

    def status_of(self, meta: str) -> dict[str, Any] | None:
        """What this metadata process says of itself; None when it does not answer."""
        with contextlib.suppress(ShardKVError):
            status: dict[str, Any] = decode_any(ask(self.proxies[meta].address, [(Op.STATUS, NOTHING)], timeout_s=1)[0])
            return status
        return None

    def leader(self) -> str | None:
        """The metadata process that controls the cluster, as the first one that answers knows it."""
        for meta in self.metas:
            if (status := self.status_of(meta)) is not None:
                return status["leader"]["name"] if status["leader"] else None
        return None


@contextlib.contextmanager
def etcd_cluster(
    directory: Path,
    *,
    metas: int = 2,
    nodes: int = 2,
    routers: int = 1,
    partition: str = "hash",
    config: str = "",
) -> Iterator[EtcdCluster]:
    """A cluster of which nothing but etcd runs yet; everything is stopped afterwards."""
    with etcd_world(directory / "etcd") as etcd:
        world = EtcdCluster(
            directory, etcd, metas=metas, nodes=nodes, routers=routers, partition=partition, config=config
        )
        try:
            yield world
        finally:
            world.close()
