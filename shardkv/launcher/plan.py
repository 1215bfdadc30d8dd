"""What a cluster on this machine should consist of: the configuration over what was decided at the first start.

Invariant: the shape of an existing cluster is never changed silently. What was not asked for is taken from the first
start; what was asked for and differs is refused.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path

from shardkv.config import ClusterSection, Config
from shardkv.errors import LaunchError
from shardkv.launcher.ports import free_port, meta_port_for
from shardkv.launcher.state import ClusterFile, Layout, ProcessesFile
from shardkv.transport.address import format_address, is_loopback

META = "meta"
INNER_HOST = "127.0.0.1"
"""Where the metadata process and the nodes listen: only routers are for others."""
ANY_PORTS = (20_000, 32_000)
"""Where to look first for "any free port", by chance so that two clusters hardly ever meet."""
WILDCARDS = ("0.0.0.0", "::")


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One process: how it is called and started."""

    name: str
    role: str
    command: tuple[str, ...]
    log: Path


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything a launcher needs to know."""

    layout: Layout
    file: ClusterFile
    routers: int
    bind: str
    config: Config
    config_file: str | None
    nodes: tuple[str, ...]
    """Those that this machine's launcher starts, as far as it knows before it has asked the metadata store."""
    removed: tuple[str, ...]
    """Nodes that are not started again."""
    port_kept: bool
    """Whether the port was not asked for and is that of an earlier start, other than the default."""

    @property
    def meta_address(self) -> str:
        return format_address(INNER_HOST, self.file.meta_port)

    @property
    def address(self) -> str:
        """Where clients on this machine connect."""
        return local_address(self.bind, self.file.port)


def local_address(bind: str, port: int) -> str:
    """An address that reaches, from this machine, what is bound to `bind`."""
    return format_address(INNER_HOST if bind in WILDCARDS else bind, port)


def make_plan(
    config: Config,
    layout: Layout,
    known: ClusterFile | None,
    config_file: str | None,
    before: ProcessesFile | None = None,
) -> Plan:
    """The plan for `config`, given what an earlier start left behind. Raises LaunchError."""
    asked = config.cluster
    nodes = _node_names(known.nodes if known is not None else asked.nodes, before)
    if known is not None:
        _check_shape(config, known, layout, len(nodes))
    port = asked.port if known is None or "cluster.port" in config.given else known.port
    if port == 0:
        port = known.port if known is not None else free_port(asked.bind, near=random.randint(*ANY_PORTS))
    shape = _shape_of(asked) if known is None else known
    file = ClusterFile(
        nodes=shape.nodes,
        partition=shape.partition,
        shards=shape.shards,
        split_at=shape.split_at,
        port=port,
        meta_port=known.meta_port if known is not None else free_port(INNER_HOST, near=meta_port_for(port)),
    )
    removed = tuple(before.removed) if before is not None else ()
    port_kept = known is not None and "cluster.port" not in config.given and port != asked.port
    return Plan(layout, file, asked.routers, asked.bind, config, config_file, nodes, removed, port_kept)


def _node_names(made_with: int, before: ProcessesFile | None) -> tuple[str, ...]:
    """The nodes of the first start, and those that were added and removed since, as the last launcher knew them."""
    names = [f"node-{number}" for number in range(1, made_with + 1)]
    if before is not None:
        recorded = [record.name for record in before.processes if record.role == "node"]
        names = [name for name in dict.fromkeys([*names, *recorded]) if name not in before.removed]
    return tuple(names)


def _shape_of(asked: ClusterSection) -> ClusterFile:
    cuts = sorted(set(asked.split_at) - {""})
    return ClusterFile(
        nodes=asked.nodes, partition=asked.partition, shards=asked.shards, split_at=cuts, port=0, meta_port=0
    )


def _check_shape(config: Config, known: ClusterFile, layout: Layout, nodes_now: int) -> None:
    asked, given = _shape_of(config.cluster), config.given
    where = f"The cluster in {layout.directory} was made with"
    if "cluster.nodes" in given and asked.nodes not in (known.nodes, nodes_now):
        now = f" and has {nodes_now} now" if nodes_now != known.nodes else ""
        raise LaunchError(
            f"{where} {_count(known.nodes, 'node')}{now}; --nodes does not change that.",
            hint="Leave it out: once the cluster is up, `shardkv cluster add-node` and `shardkv cluster remove-node "
            "NAME` change it. Or choose another --data-dir.",
        )
    differs = {
        "partition": "cluster.partition" in given and asked.partition != known.partition,
        "shards": {"cluster.shards", "cluster.split_at"} & given and asked.shards != known.shards,
        "split_at": "cluster.split_at" in given and asked.split_at != known.split_at,
    }
    if any(differs.values()):
        cuts = f", split at {', '.join(known.split_at)}" if known.split_at else ""
        raise LaunchError(
            f"{where} partition {known.partition} and {_count(known.shards, 'shard')}{cuts}; "
            "these are fixed when a cluster is made.",
            hint="Leave --partition, --shards and split_at out, or choose another --data-dir.",
        )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


# Commands


def process_specs(plan: Plan) -> list[ProcessSpec]:
    """The processes of the cluster: the metadata process, the nodes, the routers."""
    nodes = [node_spec(plan, name) for name in plan.nodes]
    routers = [_router(plan, number) for number in range(1, plan.routers + 1)]
    return [_meta(plan), *nodes, *routers]


def _meta(plan: Plan) -> ProcessSpec:
    file = plan.file
    arguments = ["--data-dir", str(plan.layout.data_of(META)), "--bind", INNER_HOST, "--port", str(file.meta_port)]
    arguments += ["--nodes", str(file.nodes), "--partition", file.partition, "--shards", str(file.shards)]
    for key in file.split_at:
        arguments += ["--split-at", key]
    return _spec(plan, META, "meta", ["shardkv", "meta", "run"], arguments)


def node_spec(plan: Plan, name: str) -> ProcessSpec:
    """How a node of this machine is started."""
    engine, given = plan.config.engine, plan.config.given
    arguments = ["--name", name, "--meta", plan.meta_address, "--data-dir", str(plan.layout.data_of(name))]
    arguments += ["--bind", INNER_HOST, "--advertise", INNER_HOST, "--port", "0"]
    if "engine.memtable_bytes_max" in given:
        arguments += ["--memtable-bytes", str(engine.memtable_bytes_max)]
    if "engine.durability" in given:
        arguments += ["--durability", engine.durability]
    return _spec(plan, name, "node", ["shardkv_node", "run"], arguments)


def _router(plan: Plan, number: int) -> ProcessSpec:
    name = f"router-{number}"
    arguments = ["--name", name, "--meta", plan.meta_address, "--bind", plan.bind, "--port", str(plan.file.port)]
    advertise = plan.config.cluster.advertise or (INNER_HOST if plan.bind in WILDCARDS else plan.bind)
    arguments += ["--advertise", advertise]
    if plan.routers > 1:
        arguments.append("--reuse-port")
    if not is_loopback(plan.bind):
        arguments.append("--insecure")
    return _spec(plan, name, "router", ["shardkv_router", "run"], arguments)


def _spec(plan: Plan, name: str, role: str, program: list[str], arguments: list[str]) -> ProcessSpec:
    log = plan.layout.log_of(name)
    common = ["--log-file", str(log)]
    if plan.config_file is not None:
        common += ["--config", str(Path(plan.config_file).absolute())]
    return ProcessSpec(name, role, (sys.executable, "-P", "-m", *program, *arguments, *common), log)
