"""`shardkv router`: one router process, for people who start processes themselves (systemd)."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.group()
def router() -> None:
    """A router: takes clients and sends their requests to the nodes.

    \b
    Example:
      shardkv router run --name router-1 --meta 127.0.0.1:7401
    """


@router.command()
@click.option("--name", required=True, help="The router's name in the cluster.")
@click.option("--meta", required=True, metavar="HOST:PORT,...", help="Where the metadata processes are.")
@click.option("--bind", metavar="HOST", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=int, help="Port for clients.  [default: 7400]")
@click.option("--advertise", metavar="HOST[:PORT]", help="How others reach it.  [default: the bound address]")
@click.option("--reuse-port", is_flag=True, help="Share the port with other routers on this machine.")
@click.option("--config", "config_file", metavar="FILE", help="TOML configuration; options win over it.")
@click.option("--log-file", metavar="FILE", help="Log there, rotated, instead of to standard error.")
@click.option("--insecure", is_flag=True, default=None, help="Allow an address other machines can reach.")
def run(
    name: str,
    meta: str,
    bind: str | None,
    port: int | None,
    advertise: str | None,
    reuse_port: bool,
    config_file: str | None,
    log_file: str | None,
    insecure: bool | None,
) -> None:
    """Serve clients on the cluster's port, until SIGTERM.

    \b
    Example:
      shardkv router run --name router-1 --meta 127.0.0.1:7401 --port 7400
    """
    import msgspec

    from shardkv.config import load_config
    from shardkv.logs import configure_logging
    from shardkv.programs import check_advertise, check_bind, guarded
    from shardkv_router.options import RouterOptions
    from shardkv_router.process import RouterSettings, run_router

    def start() -> int:
        config = load_config(
            config_file,
            {
                "cluster.bind": bind,
                "cluster.port": port,
                "cluster.advertise": advertise,
                "cluster.insecure": insecure,
            },
        )
        cluster = config.cluster
        check_bind(cluster.bind, insecure=cluster.insecure)
        check_advertise(cluster.bind, cluster.advertise or None)
        configure_logging(name, log_file=Path(log_file) if log_file else None, **msgspec.structs.asdict(config.logs))
        return run_router(
            RouterSettings(
                name=name,
                meta=meta.split(","),
                bind=cluster.bind,
                port=cluster.port,
                advertise=cluster.advertise or None,
                reuse_port=reuse_port,
                options=RouterOptions(**msgspec.structs.asdict(config.router)),
                limits=config.limits,
            )
        )

    sys.exit(guarded(start))
