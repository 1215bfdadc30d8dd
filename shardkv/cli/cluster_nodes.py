"""The commands of `shardkv cluster` that change which nodes there are, and what they carry."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from shardkv.cli.options import as_json, counted
from shardkv.cli.steering import (
    bytes_a_second,
    confirm,
    exit_code_of,
    follow_job,
    json_option,
    plain,
    rate_option,
    show_plan,
    wait_option,
    watch,
    with_admin,
    yes_option,
)

if TYPE_CHECKING:
    from shardkv.admin import Added, Admin, Job, Node

START_TIMEOUT_S = 60.0
"""How long a node of this machine's launcher may take to join."""
HOST_TIMEOUT_S = 7 * 24 * 3600.0
META_PORT = 7401
NODE_PORT = 7402
"""Of the first node on another machine; the next ones count up."""


@click.command("add-node", short_help="Add nodes, and move a fair share of the shards to them.")
@click.option("--count", type=click.IntRange(1, 100), default=1, show_default=True, help="How many.")
@click.option("--host", metavar="HOST", help="Not on this machine: print what to run on that one, and wait for it.")
@click.option("--no-rebalance", is_flag=True, help="Move nothing to them now.")
@rate_option
@wait_option
@json_option
@with_admin
def add_node(
    admin: Admin,
    *,
    count: int,
    host: str | None,
    no_rebalance: bool,
    rate: float | None,
    no_wait: bool,
    json_wanted: bool,
) -> int:
    """Add nodes. The launcher of this machine starts them; with --host you do.

    Shards move to them one after the other, while they are read and written.

    \b
    Example:
      shardkv cluster add-node
      shardkv cluster add-node --count 2 --rate 50
      shardkv cluster add-node --host 10.0.0.4
    """
    rate_bytes_s = bytes_a_second(rate)
    plan = None
    if not no_rebalance:
        plan = admin.plan_add(count, rate_bytes_s=rate_bytes_s)
        show_plan(plan, json_wanted=json_wanted)
    added = [
        admin.add_node(host=host or "", rebalance=not no_rebalance, rate_bytes_s=rate_bytes_s) for _ in range(count)
    ]
    if host is not None:
        click.echo(_how_to_start(admin, [each.node for each in added], host), err=True)
    if not no_wait:
        timeout_s = START_TIMEOUT_S if host is None else HOST_TIMEOUT_S
        nodes = [_joined(admin, each.node, timeout_s, json_wanted=json_wanted) for each in added]
    jobs = _followed(admin, added, no_wait=no_wait)
    if json_wanted:
        told: dict[str, Any] = {"plan": plan, "added": added, "jobs": jobs} | ({} if no_wait else {"nodes": nodes})
        click.echo(as_json(plain(told)))
    elif no_wait:
        click.echo(f"Added {', '.join(each.node for each in added)}; `shardkv cluster status` shows how they do.")
    else:
        moved = sum(len(job.done) for job in jobs)
        click.echo(f"Added {', '.join(each.node for each in added)}: {counted(moved, 'shard')} moved there.")
    return max((exit_code_of(job) for job in jobs), default=0)


def _joined(admin: Admin, name: str, timeout_s: float, *, json_wanted: bool) -> Node:
    """The node, once it serves. Raises LaunchError when it does not in time."""
    from shardkv.errors import DeadlineExceeded, LaunchError

    try:
        node = admin.wait_joined(name, timeout=timeout_s)
    except DeadlineExceeded as error:
        raise LaunchError(
            error.message,
            hint=f"Does the cluster's launcher (`shardkv cluster up`) run? See `shardkv cluster logs {name}`. Once the "
            f"node is there, its shards come by themselves; `shardkv cluster remove-node {name}` gives it up.",
        ) from error
    if not json_wanted:
        click.echo(f"{name} has joined at {node.address}.")
    return node


def _followed(admin: Admin, added: list[Added], *, no_wait: bool) -> list[Job]:
    jobs = [admin.job(each.job) for each in added if each.job]
    return jobs if no_wait else [watch(admin, job) for job in jobs]


def _how_to_start(admin: Admin, names: list[str], host: str) -> str:
    """The commands that start nodes on another machine."""
    from shardkv.transport.address import is_loopback, parse_address

    meta = admin.status().meta
    addresses = ",".join(meta) or f"META-HOST:{META_PORT}"
    lines = [f"Run this on {host}:"]
    for name, port in zip(names, _free_ports(admin, host), strict=False):
        command = ["shardkv", "node", "run", "--name", name, "--meta", addresses]
        command += ["--data-dir", f"/var/lib/shardkv/{name}", "--bind", host, "--port", str(port), "--insecure"]
        lines.append(f"  {shlex.join(command)}")
    lines.append("With --config as well, if the other nodes are given a file.")
    if not is_loopback(host) and any(is_loopback(parse_address(each)[0]) for each in meta):
        lines.append(
            f"The metadata process listens on {addresses}, where {host} cannot reach it: see docs/several-machines.md."
        )
    return "\n".join(lines)


def _free_ports(admin: Admin, host: str) -> Iterator[int]:
    """Ports for new nodes on a machine, from NODE_PORT on, without those of its nodes."""
    from shardkv.transport.address import parse_address

    known = [(node.host, *parse_address(node.address)) for node in admin.nodes() if node.address]
    taken = {port for name, at, port in known if host in (name, at)}
    return (port for port in itertools.count(NODE_PORT) if port not in taken)


@click.command("remove-node", short_help="Move everything away from a node, then stop it.")
@click.argument("name")
@click.option("--force", is_flag=True, help="Do not wait for a node that does not answer.")
@click.option("--accept-data-loss", metavar="NAME", help="Give up what only that node has: its name once more.")
@rate_option
@wait_option
@json_option
@yes_option
@with_admin
def remove_node(
    admin: Admin,
    name: str,
    *,
    force: bool,
    accept_data_loss: str | None,
    rate: float | None,
    no_wait: bool,
    json_wanted: bool,
    yes: bool,
) -> int:
    """Move all shards of a node to the others, then stop it.

    A node that does not answer is waited for: only it has its data. With --force it is not waited for, and if it owns
    shards that is refused, unless --accept-data-loss names it: then its shards are given to others, empty.

    \b
    Example:
      shardkv cluster remove-node node-3
      shardkv cluster remove-node node-3 --force --accept-data-loss node-3
    """
    plan = admin.plan_remove(name, rate_bytes_s=bytes_a_second(rate))
    show_plan(plan, json_wanted=json_wanted)
    if accept_data_loss is not None:
        confirm(f"What only {accept_data_loss} has will be lost for good.", yes=yes)
    job = admin.remove_node(name, force=force, accept_data_loss=accept_data_loss, rate_bytes_s=bytes_a_second(rate))
    code = follow_job(admin, job, no_wait=no_wait, json_wanted=json_wanted, plan=plan)
    if not no_wait and not code and not json_wanted:
        click.echo(_after_removal(admin, name))
    return code


def _after_removal(admin: Admin, name: str) -> str:
    node = next((each for each in admin.nodes() if each.name == name), None)
    if node is not None and node.started_by == "operator":
        return f"{name} has nothing left: stop it{' on ' + node.host if node.host else ''}, and delete its directory."
    return f"{name} has nothing left, and is stopped. Its directory can be deleted."


@click.command(short_help="Even out what nodes carry, by bytes and by load.")
@click.option("--dry-run", is_flag=True, help="Only show what would move.")
@click.option("--max-moves", type=click.IntRange(1), metavar="N", help="Move no more shards than this.")
@rate_option
@wait_option
@json_option
@with_admin
def rebalance(
    admin: Admin, *, dry_run: bool, max_moves: int | None, rate: float | None, no_wait: bool, json_wanted: bool
) -> int:
    """Move shards until every node carries about the mean. Nothing moves while all are within a tenth of it.

    \b
    Example:
      shardkv cluster rebalance --dry-run
      shardkv cluster rebalance --max-moves 4 --rate 50
    """
    rate_bytes_s = bytes_a_second(rate)
    plan = admin.rebalance(dry_run=True, moves_max=max_moves, rate_bytes_s=rate_bytes_s)
    show_plan(plan, json_wanted=json_wanted)
    if dry_run or not plan.moves:
        if json_wanted:
            click.echo(as_json(plain({"plan": plan, "job": None})))
        return 0
    job = admin.rebalance(moves_max=max_moves, rate_bytes_s=rate_bytes_s)
    return follow_job(admin, job, no_wait=no_wait, json_wanted=json_wanted, plan=plan)


@click.command(short_help="Restart every process, one after the other.")
@click.option("--rolling", is_flag=True, help="One after the other, while the cluster serves.")
@click.option("--data-dir", metavar="DIR", help="Where the cluster is kept.  [default: shardkv-data]")
@click.option("--config", "config_file", metavar="FILE", help="TOML configuration.")
@click.option("--timeout", type=float, default=60.0, show_default=True, help="Seconds a process may take to be back.")
@json_option
def restart(*, rolling: bool, data_dir: str | None, config_file: str | None, timeout: float, json_wanted: bool) -> None:
    """Restart every process of this machine's cluster: nodes, then routers, then the metadata process.

    Each is back and serves before the next one is stopped. Clients notice nothing but a pause. For new options or a new
    configuration, stop the launcher and start it anew instead.

    \b
    Example:
      shardkv cluster restart --rolling
    """
    if not rolling:
        raise click.UsageError(
            "Say --rolling for one process after the other. To stop all at once: `shardkv cluster down`, then `up`."
        )
    from shardkv.config import load_config
    from shardkv.launcher.rolling import Restarted, restart_rolling
    from shardkv.launcher.state import Layout

    config = load_config(config_file, {"cluster.data_dir": data_dir})

    def tell(restarted: Restarted) -> None:
        if not json_wanted:
            click.echo(f"{restarted.name} is back after {restarted.seconds:.1f} s, as process {restarted.pid}.")

    done = restart_rolling(Layout(config.cluster.data_dir), timeout_s=timeout, on_restarted=tell)
    if json_wanted:
        rows = [{"name": each.name, "pid": each.pid, "seconds": round(each.seconds, 3)} for each in done]
        click.echo(as_json({"restarted": rows}))


@click.command(short_help="Show or change how the cluster decides by itself.")
@click.argument("changes", nargs=-1, metavar="[NAME=VALUE]...")
@json_option
@with_admin
def settings(admin: Admin, changes: tuple[str, ...], *, json_wanted: bool) -> None:
    """Show how the cluster decides (when shards split, how fast they move); with NAME=VALUE, change that.

    \b
    Example:
      shardkv cluster settings
      shardkv cluster settings auto_split=false rate_bytes_s=50000000
    """
    import json

    changed: dict[str, Any] = {}
    for change in changes:
        name, _, value = change.partition("=")
        try:
            changed[name] = json.loads(value)
        except ValueError:
            raise click.UsageError(f"{change!r} is not NAME=VALUE with a number, true or false.") from None
    found = plain(admin.change_settings(**changed) if changed else admin.settings())
    if json_wanted:
        click.echo(as_json(found))
    else:
        for name, value in found.items():
            click.echo(f"{name} = {json.dumps(value)}")
