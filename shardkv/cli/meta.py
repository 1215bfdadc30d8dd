"""`shardkv meta`: the metadata process by itself, for people who start processes with systemd."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.group()
def meta() -> None:
    """The metadata process: the one place that knows who owns what.

    \b
    Example:
      shardkv meta run --data-dir /var/lib/shardkv/meta --nodes 3
    """


@meta.command()
@click.option(
    "--store",
    metavar="STORE",
    help="embedded, or etcd://HOST:PORT,HOST:PORT/NAME for several machines.  [default: embedded]",
)
@click.option("--data-dir", metavar="DIR", help="Where the embedded store is kept.")
@click.option("--name", default="meta", show_default=True, help="Of this process, where several serve one etcd.")
@click.option("--bind", metavar="HOST", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", default=7401, show_default=True, type=click.IntRange(0, 65535), help="0: any free one.")
@click.option("--advertise", metavar="HOST[:PORT]", help="How others reach it.  [default: the bound address]")
@click.option("--nodes", type=int, help="Nodes that must have registered before shards are placed.  [default: 3]")
@click.option("--partition", type=click.Choice(["hash", "range"]), help="How keys become shards.  [default: hash]")
@click.option("--shards", type=int, help="Shards of the default keyspace.  [default: 16]")
@click.option("--split-at", multiple=True, metavar="KEY", help="First key of a further shard (range); repeatable.")
@click.option("--config", "config_file", metavar="FILE", help="TOML configuration; options win over it.")
@click.option("--log-file", metavar="FILE", help="Log there, rotated, instead of to standard error.")
@click.option("--insecure", is_flag=True, default=None, help="Allow an address other machines can reach.")
def run(
    store: str | None,
    data_dir: str | None,
    name: str,
    bind: str | None,
    port: int,
    advertise: str | None,
    nodes: int | None,
    partition: str | None,
    shards: int | None,
    split_at: tuple[str, ...],
    config_file: str | None,
    log_file: str | None,
    insecure: bool | None,
) -> None:
    """Keep the metadata of a cluster and place its shards, until SIGTERM.

    \b
    Examples:
      shardkv meta run --data-dir /var/lib/shardkv/meta --bind 127.0.0.1 --port 7401 --nodes 3
      shardkv meta run --store etcd://10.0.0.1:2379,10.0.0.2:2379/shop --name meta-2 --bind 10.0.0.2 --insecure
    """
    import msgspec

    from shardkv.config import load_config
    from shardkv.logs import configure_logging
    from shardkv.metadata.process import MetaOptions, run_meta
    from shardkv.metadata.stores import parse_store
    from shardkv.programs import check_advertise, check_bind, guarded
    from shardkv.topology.documents import ClusterDocument

    def start() -> int:
        config = load_config(
            config_file,
            {
                "metadata.store": store,
                "cluster.bind": bind,
                "cluster.advertise": advertise,
                "cluster.nodes": nodes,
                "cluster.partition": partition,
                "cluster.shards": shards,
                "cluster.split_at": list(split_at) or None,
                "cluster.insecure": insecure,
            },
        )
        cluster = config.cluster
        check_bind(cluster.bind, insecure=cluster.insecure)
        check_advertise(cluster.bind, cluster.advertise or None)
        configure_logging(name, log_file=Path(log_file) if log_file else None, **msgspec.structs.asdict(config.logs))
        asked = ClusterDocument(
            cluster_id="",
            nodes_wanted=cluster.nodes,
            partition=cluster.partition,
            shards=cluster.shards,
            split_at=[key.encode() for key in sorted(set(cluster.split_at) - {""})],
        )
        options = MetaOptions(
            name=name,
            store=parse_store(config.metadata.store),
            data_dir=Path(data_dir) if data_dir is not None else None,
            bind=cluster.bind,
            port=port,
            advertise=cluster.advertise or None,
            asked=asked,
            lease_s=config.metadata.lease_ms / 1000,
            limits=config.limits,
        )
        return run_meta(options)

    sys.exit(guarded(start))
