"""The commands for one key: put, get, delete, incr; and ping."""

from __future__ import annotations

import sys

import click

from shardkv.cli.main import NOT_FOUND
from shardkv.cli.options import BYTES, Target, as_fields, as_json, with_target


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("key", type=BYTES)
@click.argument("value", type=BYTES)
@click.option("--ttl", type=float, metavar="SECONDS", help="How long it stays; without it, for good.")
@click.option("--if-absent", is_flag=True, help="Only if the key does not exist.")
@click.option("--if-version", type=int, metavar="VERSION", help="Only if the key has this version (0: does not exist).")
@click.option("--json", "json_wanted", is_flag=True, help="Print the new version, as a JSON object.")
@with_target
def put(
    target: Target,
    key: bytes,
    value: bytes,
    *,
    ttl: float | None,
    if_absent: bool,
    if_version: int | None,
    json_wanted: bool,
) -> None:
    """Store VALUE under KEY; it is on disk when the command returns (with --durability always, the default).

    Exit code 1 when it was asked for another version than the key has. `get --with-version` prints the version.

    \b
    Example:
      shardkv put user:1000 John
      shardkv put session:7 open --ttl 3600 --if-absent
    """
    with target.client() as db:
        version = db.put(key, value, ttl=ttl, if_absent=if_absent, if_version=if_version)
    if json_wanted:
        click.echo(as_json({"version": version}))


@click.command()
@click.argument("key", type=BYTES)
@click.option("--with-version", is_flag=True, help="Print the version and a tab before the value.")
@click.option("--json", "json_wanted", is_flag=True, help="Print key, value and version as a JSON object.")
@with_target
def get(target: Target, key: bytes, *, with_version: bool, json_wanted: bool) -> int:
    """Print the value of KEY, byte for byte. Exit code 1 when there is none.

    \b
    Example:
      shardkv get user:1000
      shardkv get photo:7 > photo.jpg
    """
    with target.client() as db:
        found = db.get(key, with_version=True)
    if found is None:
        return not_found(key)
    value, version = found
    if json_wanted:
        click.echo(as_json({**as_fields(key, value), "version": version}))
        return 0
    sys.stdout.flush()
    if with_version:
        sys.stdout.buffer.write(b"%d\t" % version)
    sys.stdout.buffer.write(value)
    if sys.stdout.isatty():
        sys.stdout.buffer.write(b"\n")
    sys.stdout.buffer.flush()
    return 0


@click.command()
@click.argument("key", type=BYTES)
@with_target
def delete(target: Target, key: bytes) -> int:
    """Delete KEY. Exit code 1 when it did not exist.

    \b
    Example:
      shardkv delete user:1000
    """
    with target.client() as db:
        return 0 if db.delete(key) else not_found(key)


@click.command()
@click.argument("key", type=BYTES)
@click.option("--by", type=int, default=1, show_default=True, help="What to add; may be negative.")
@click.option("--ttl", type=float, metavar="SECONDS", help="How long it stays; without it, as long as it would have.")
@with_target
def incr(target: Target, key: bytes, *, by: int, ttl: float | None) -> None:
    """Add to the number stored under KEY, in one step, and print the sum. A key that does not exist counts from 0.

    \b
    Example:
      shardkv incr visits
      shardkv incr stock:42 --by -3
    """
    with target.client() as db:
        click.echo(db.incr(key, by, ttl=ttl))


@click.command()
@click.option("--json", "json_wanted", is_flag=True, help="Print one JSON object.")
@with_target
def ping(target: Target, *, json_wanted: bool) -> None:
    """Measure the round trip to the router, in milliseconds.

    \b
    Example:
      shardkv ping
      shardkv --router 10.0.0.5:7400 ping --json
    """
    with target.client() as db:
        db.ping()
        took_ms = db.ping()
    if json_wanted:
        click.echo(as_json({"router": target.router, "round_trip_ms": round(took_ms, 3)}))
    else:
        click.echo(f"{target.router} answered in {took_ms:.2f} ms.")


def not_found(key: bytes) -> int:
    """Says so on stderr; the exit code for it."""
    click.echo(f"Not found: {key.decode(errors='backslashreplace')}", err=True)
    return NOT_FOUND
