"""`shardkv node`: one node process, for people who start processes themselves (systemd)."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.group()
def node() -> None:
    """A node: keeps and serves the shards it owns.

    \b
    Example:
      shardkv node run --name node-1 --meta 127.0.0.1:7401 --data-dir /var/lib/shardkv/node-1
    """


@node.command()
@click.option("--name", required=True, help="The node's name in the cluster; it belongs to its data directory.")
@click.option("--meta", required=True, metavar="HOST:PORT,...", help="Where the metadata processes are.")
@click.option("--data-dir", required=True, metavar="DIR", help="Where the data is kept.")
@click.option("--bind", metavar="HOST", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", default=0, show_default=True, type=click.IntRange(0, 65535), help="0: any free one.")
@click.option("--advertise", metavar="HOST[:PORT]", help="How others reach it.  [default: the bound address]")
@click.option("--memtable-bytes", type=int, metavar="N", help="Memory for writes not yet in tables.")
@click.option("--durability", type=click.Choice(["always", "interval", "os"]), help="What an acknowledgement means.")
@click.option("--config", "config_file", metavar="FILE", help="TOML configuration; options win over it.")
@click.option("--log-file", metavar="FILE", help="Log there, rotated, instead of to standard error.")
@click.option("--insecure", is_flag=True, default=None, help="Allow an address other machines can reach.")
def run(
    name: str,
    meta: str,
    data_dir: str,
    bind: str | None,
    port: int,
    advertise: str | None,
    memtable_bytes: int | None,
    durability: str | None,
    config_file: str | None,
    log_file: str | None,
    insecure: bool | None,
) -> None:
    """Serve the shards the cluster gives this node, until SIGTERM.

    \b
    Example:
      shardkv node run --name node-1 --meta 127.0.0.1:7401 --data-dir /var/lib/shardkv/node-1
    """
    import msgspec

    from shardkv.config import load_config
    from shardkv.logs import configure_logging
    from shardkv.programs import check_advertise, check_bind, guarded
    from shardkv_node.engine.options import Options
    from shardkv_node.process import NodeSettings, run_node

    def start() -> int:
        config = load_config(
            config_file,
            {
                "cluster.bind": bind,
                "cluster.advertise": advertise,
                "cluster.insecure": insecure,
                "engine.memtable_bytes_max": memtable_bytes,
                "engine.durability": durability,
            },
        )
        cluster, limits = config.cluster, config.limits
        check_bind(cluster.bind, insecure=cluster.insecure)
        check_advertise(cluster.bind, cluster.advertise or None)
        configure_logging(name, log_file=Path(log_file) if log_file else None, **msgspec.structs.asdict(config.logs))
        engine = Options(
            **msgspec.structs.asdict(config.engine),
            key_bytes_max=limits.key_bytes_max,
            value_bytes_max=limits.value_bytes_max,
        )
        return run_node(
            NodeSettings(
                name=name,
                meta=meta.split(","),
                data_dir=data_dir,
                bind=cluster.bind,
                port=port,
                advertise=cluster.advertise or None,
                engine=engine,
                limits=limits,
                fence_abort_ms=config.node.fence_abort_ms,
            )
        )

    sys.exit(guarded(start))
