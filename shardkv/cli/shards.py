"""`shardkv shard`: list shards, and split, merge or move one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from shardkv.cli.options import as_json
from shardkv.cli.steering import (
    bytes_a_second,
    follow_job,
    json_option,
    plain,
    rate_option,
    show_plan,
    size_text,
    table_text,
    token_text,
    wait_option,
    with_admin,
)

if TYPE_CHECKING:
    from shardkv.admin import Admin, Shard


@click.group(short_help="List, split, merge and move shards.")
def shard() -> None:
    """Shards: the intervals of keys (or of hashes of keys) that nodes own.

    \b
    Example:
      shardkv shard list
      shardkv shard move 3 node-2
    """


@shard.command("list")
@click.option("--keyspace", metavar="NAME", help="Only those of this keyspace.")
@json_option
@with_admin
def list_shards(admin: Admin, *, keyspace: str | None, json_wanted: bool) -> None:
    """List the shards: where they begin, who owns them, how large and how busy they are.

    \b
    Example:
      shardkv shard list --keyspace default
    """
    found = admin.shards(keyspace)
    if json_wanted:
        click.echo(as_json({"shards": plain(found)}))
    else:
        header = ("shard", "keyspace", "from", "node", "epoch", "size", "ops/s", "change")
        click.echo(table_text(header, [_row(each) for each in found]))


def _row(shard: Shard) -> tuple[str, ...]:
    change = shard.change
    told = shard.problem or "-"
    if change is not None:
        to = f" to {change.target}" if change.target else ""
        told = f"{change.kind}{to} ({'paused' if change.paused else change.phase or 'begun'}, job {change.job})"
    ops = "-" if shard.ops_s is None else f"{shard.ops_s:,.0f}"
    start = token_text(shard.start) or "-"
    return (str(shard.id), shard.keyspace, start, shard.node, str(shard.epoch), size_text(shard.bytes), ops, told)


@shard.command()
@click.argument("shard_id", metavar="ID", type=int)
@click.argument("node")
@rate_option
@wait_option
@json_option
@with_admin
def move(admin: Admin, shard_id: int, node: str, *, rate: float | None, no_wait: bool, json_wanted: bool) -> int:
    """Move a shard to a node. It is read and written all the while, but for some milliseconds at the end.

    \b
    Example:
      shardkv shard move 3 node-2 --rate 50
    """
    plan = admin.plan_move(shard_id, node, rate_bytes_s=bytes_a_second(rate))
    show_plan(plan, json_wanted=json_wanted)
    job = admin.move_shard(shard_id, node, rate_bytes_s=bytes_a_second(rate))
    return follow_job(admin, job, no_wait=no_wait, json_wanted=json_wanted, plan=plan)


@shard.command()
@click.argument("shard_id", metavar="ID", type=int)
@click.option("--at", metavar="KEY", help="Where the upper half begins: a key, or 16 hexadecimal digits of a hash.")
@rate_option
@wait_option
@json_option
@with_admin
def split(admin: Admin, shard_id: int, *, at: str | None, rate: float | None, no_wait: bool, json_wanted: bool) -> int:
    """Make two shards of one, at a key or where half of the bytes are on either side.

    \b
    Example:
      shardkv shard split 3
      shardkv shard split 3 --at m
    """
    cut = None if at is None else _token(admin, shard_id, at)
    job = admin.split_shard(shard_id, at=cut, rate_bytes_s=bytes_a_second(rate))
    return follow_job(admin, job, no_wait=no_wait, json_wanted=json_wanted)


def _token(admin: Admin, shard_id: int, at: str) -> int | bytes:
    """What was typed, as a token of that shard's keyspace. Raises UsageError."""
    partition = next((each.partition for each in admin.shards() if each.id == shard_id), "range")
    if partition == "range":
        return os.fsencode(at)
    try:
        return int(at, 16)
    except ValueError:
        raise click.UsageError(
            f"Shard {shard_id} is of a hash keyspace: --at takes up to 16 hexadecimal digits, as `shard list` shows "
            f"them, not {at!r}."
        ) from None


@shard.command()
@click.argument("left", metavar="ID", type=int)
@click.argument("right", metavar="ID", type=int)
@rate_option
@wait_option
@json_option
@with_admin
def merge(admin: Admin, left: int, right: int, *, rate: float | None, no_wait: bool, json_wanted: bool) -> int:
    """Make one shard of two neighbours. If they are on two nodes, the smaller one is moved first.

    \b
    Example:
      shardkv shard merge 3 4
    """
    plan = admin.plan_merge(left, right, rate_bytes_s=bytes_a_second(rate))
    show_plan(plan, json_wanted=json_wanted)
    job = admin.merge_shards(left, right, rate_bytes_s=bytes_a_second(rate))
    return follow_job(admin, job, no_wait=no_wait, json_wanted=json_wanted, plan=plan)
