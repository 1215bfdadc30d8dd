"""`shardkv cluster`: start, look at and stop a whole cluster on this machine.

Invariant: what a command needs is imported when it runs; `up` starts its processes before it imports what it needs
to talk to them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shardkv.cli.cluster_nodes import add_node, rebalance, remove_node, restart, settings

if TYPE_CHECKING:
    from shardkv.config import Config
    from shardkv.launcher.state import Layout
    from shardkv.launcher.summary import Started

UNAVAILABLE = 3

_data_dir = click.option("--data-dir", metavar="DIR", help="Where the cluster is kept.  [default: shardkv-data]")
_config_file = click.option("--config", "config_file", metavar="FILE", help="TOML configuration; options win over it.")


@click.group(short_help="Start, stop and look at a whole cluster on this machine.")
def cluster() -> None:
    """Start, stop and look at a whole cluster on this machine.

    \b
    Example:
      shardkv cluster up --detach
      shardkv cluster status
      shardkv cluster down
    """


@cluster.command(short_help="Start a cluster, or bring one back.")
@click.option("--nodes", type=int, help="Storage nodes.  [default: 3]")
@click.option("--routers", type=int, help="Routers; they share the port.  [default: 1]")
@click.option("--partition", type=click.Choice(["hash", "range"]), help="How keys become shards.  [default: hash]")
@click.option("--shards", type=int, help="Shards of the default keyspace.  [default: 16]")
@click.option("--split-at", multiple=True, metavar="KEY", help="First key of a further shard (range); repeatable.")
@_data_dir
@click.option("--bind", metavar="HOST", help="Address the routers listen on.  [default: 127.0.0.1]")
@click.option("--port", type=int, help="Port; 0: any free one.  [default: that of the last start, else 7400]")
@click.option("--insecure", is_flag=True, default=None, help="Allow an address that other machines can reach.")
@click.option("--memtable-bytes", type=int, metavar="N", help="Memory of a node for writes not yet in tables.")
@click.option("--durability", type=click.Choice(["always", "interval", "os"]), help="When a write is acknowledged.")
@_config_file
@click.option("--detach", is_flag=True, help="Return when the cluster serves; it runs on in the background.")
def up(
    nodes: int | None,
    routers: int | None,
    partition: str | None,
    shards: int | None,
    split_at: tuple[str, ...],
    data_dir: str | None,
    bind: str | None,
    port: int | None,
    insecure: bool | None,
    memtable_bytes: int | None,
    durability: str | None,
    config_file: str | None,
    detach: bool,
) -> None:
    """Start a cluster, or bring one back: what still runs is taken over, the rest is started.

    Runs in the foreground until Ctrl-C, which stops everything in order.

    \b
    Example:
      shardkv cluster up
      shardkv cluster up --nodes 1 --port 7500 --data-dir /tmp/one
      shardkv cluster up --partition range --split-at m --detach
    """
    from shardkv.config import load_config

    config = load_config(
        config_file,
        {
            "cluster.nodes": nodes,
            "cluster.routers": routers,
            "cluster.partition": partition,
            "cluster.shards": shards,
            "cluster.split_at": list(split_at) or None,
            "cluster.data_dir": data_dir,
            "cluster.bind": bind,
            "cluster.port": port,
            "cluster.insecure": insecure,
            "engine.memtable_bytes_max": memtable_bytes,
            "engine.durability": durability,
        },
    )
    if detach:
        from shardkv.launcher.detach import run_detached

        click.echo(run_detached(config, config_file=config_file))
        return
    from shardkv.launcher.up import run_cluster

    run_cluster(config, config_file=config_file, report=_say, on_ready=_show_summary)
    _say(f"Stopped. The data stays in {Path(config.cluster.data_dir).resolve()}.")


def _show_summary(started: Started) -> None:
    from shardkv.launcher.summary import summary

    _say(f"{summary(started)}\nCtrl-C stops the cluster.")


def _say(text: str) -> None:
    """Print for whoever still listens: a closed terminal or pipe must not end a launcher."""
    try:
        print(text, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


@cluster.command(short_help="Show processes, nodes, jobs, and what to do next.")
@_data_dir
@_config_file
@click.option("--router", metavar="HOST:PORT", help="Ask this router: a cluster that was not launched here.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def status(data_dir: str | None, config_file: str | None, router: str | None, as_json: bool) -> int:
    """Show every process of the cluster and whether it answers, what each node carries, which jobs are under way, and
    what to do next, if anything. Exit code 3 when not all of them serve.

    \b
    Example:
      shardkv cluster status
      shardkv cluster status --data-dir /tmp/one --json
      shardkv cluster status --router 10.0.0.5:7400
    """
    from shardkv.cli.cluster_status import cluster_text, serves, whole

    if router is not None:
        found: dict[str, Any] = {"cluster": whole(router)}
    else:
        from shardkv.launcher.control import cluster_status

        found = cluster_status(_layout(data_dir, config_file)[1])
        found["cluster"] = whole(found["meta_address"], if_reached=True) if found["state"] != "stopped" else None
    if as_json:
        import json

        click.echo(json.dumps(found, indent=2))
    else:
        click.echo(cluster_text(found))
    return 0 if serves(found) else UNAVAILABLE


@cluster.command()
@_data_dir
@_config_file
def down(data_dir: str | None, config_file: str | None) -> None:
    """Stop the cluster in order, its launcher too. What is stored stays.

    \b
    Example:
      shardkv cluster down
    """
    from shardkv.launcher.control import launcher_pid, stop_cluster

    config, layout = _layout(data_dir, config_file)
    launched = launcher_pid(layout) is not None
    stopped = stop_cluster(layout, grace_s=config.launcher.stop_grace_ms / 1000)
    if stopped or launched:
        click.echo(f"Stopped {', '.join(stopped) or 'the launcher'}. The data stays in {layout.directory}.")
    else:
        click.echo(f"Nothing of the cluster in {layout.directory} was running.")


@cluster.command(short_help="Print the last lines of the logs.")
@click.argument("name", required=False)
@_data_dir
@_config_file
@click.option("-f", "--follow", "follow_on", is_flag=True, help="Go on printing what is added, until Ctrl-C.")
@click.option("-n", "--lines", default=20, show_default=True, type=click.IntRange(0), help="Lines of each log.")
def logs(name: str | None, data_dir: str | None, config_file: str | None, follow_on: bool, lines: int) -> None:
    """Print the last lines of every process's log, or of one process's.

    \b
    Example:
      shardkv cluster logs
      shardkv cluster logs node-1 -f
    """
    from shardkv.launcher.tail import follow, last_lines

    paths = _log_files(_layout(data_dir, config_file)[1], name)
    if follow_on:
        for line in follow(paths, lines):
            click.echo(line)
    for path in paths:
        for line in last_lines(path, lines):
            click.echo(line)


def _log_files(layout: Layout, name: str | None) -> list[Path]:
    """Raises LaunchError when there are none, InvalidArgument when `name` is not one of them."""
    from shardkv.errors import InvalidArgument, LaunchError

    paths = {path.stem: path for path in sorted(layout.logs.glob("*.log"))}
    if not paths:
        raise LaunchError(f"There are no logs in {layout.logs}.", hint="Say with --data-dir where the cluster is.")
    if name is None:
        return list(paths.values())
    if name not in paths:
        raise InvalidArgument(f"There is no process {name!r}; known are {', '.join(paths)}.")
    return [paths[name]]


for _command in (add_node, remove_node, rebalance, restart, settings):
    cluster.add_command(_command)


def _layout(data_dir: str | None, config_file: str | None) -> tuple[Config, Layout]:
    from shardkv.config import load_config
    from shardkv.launcher.state import Layout

    config = load_config(config_file, {"cluster.data_dir": data_dir})
    return config, Layout(config.cluster.data_dir)
