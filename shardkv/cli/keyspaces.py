"""`shardkv keyspace`: make, list and drop keyspaces."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

import click

from shardkv.cli.options import as_json, counted
from shardkv.cli.steering import confirm, json_option, plain, size_text, table_text, with_admin, yes_option

if TYPE_CHECKING:
    from shardkv.admin import Admin


@click.group(short_help="Make, list and drop keyspaces.")
def keyspace() -> None:
    """Keyspaces: separate maps of keys to values in one cluster. Data commands take --keyspace NAME.

    \b
    Example:
      shardkv keyspace create people --partition range --split-at m
      shardkv --keyspace people put ada 1815
    """


@keyspace.command()
@click.argument("name")
@click.option("--partition", type=click.Choice(["hash", "range"]), default="hash", show_default=True)
@click.option("--shards", type=click.IntRange(1), default=16, show_default=True, help="How many; --split-at wins.")
@click.option("--split-at", multiple=True, metavar="KEY", help="First key of a further shard (range); repeatable.")
@json_option
@with_admin
def create(
    admin: Admin,
    name: str,
    *,
    partition: Literal["hash", "range"],
    shards: int,
    split_at: tuple[str, ...],
    json_wanted: bool,
) -> None:
    """Make a keyspace. When this returns it can be used.

    \b
    Example:
      shardkv keyspace create sessions --shards 32
      shardkv keyspace create people --partition range --split-at h --split-at p
    """
    cuts = [os.fsencode(key) for key in split_at]
    found = admin.create_keyspace(name, partition=partition, shards=shards, split_at=cuts)
    if json_wanted:
        click.echo(as_json(plain(found)))
    else:
        click.echo(f"Keyspace {name} is ready: {found.partition}, {counted(found.shards, 'shard')}.")


@keyspace.command("list")
@json_option
@with_admin
def list_keyspaces(admin: Admin, *, json_wanted: bool) -> None:
    """List the keyspaces.

    \b
    Example:
      shardkv keyspace list
    """
    found = admin.keyspaces()
    if json_wanted:
        click.echo(as_json({"keyspaces": plain(found)}))
    else:
        rows = [(each.name, each.partition, str(each.shards), size_text(each.bytes), each.state) for each in found]
        click.echo(table_text(("keyspace", "partition", "shards", "size", "state"), rows))


@keyspace.command()
@click.argument("name")
@yes_option
@json_option
@with_admin
def drop(admin: Admin, name: str, *, yes: bool, json_wanted: bool) -> None:
    """Delete a keyspace and all that is in it, for good.

    \b
    Example:
      shardkv keyspace drop sessions --yes
    """
    confirm(f"All data of keyspace {name} will be deleted for good.", yes=yes)
    admin.drop_keyspace(name)
    click.echo(as_json({"name": name, "dropped": True}) if json_wanted else f"Keyspace {name} is gone.")
