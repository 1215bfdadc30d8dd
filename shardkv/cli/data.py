"""The commands for one key: put, get, delete; and ping."""

from __future__ import annotations

import sys

import click

from shardkv.cli.main import NOT_FOUND
from shardkv.cli.options import BYTES, Target, as_json, with_target


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("key", type=BYTES)
@click.argument("value", type=BYTES)
@with_target
def put(target: Target, key: bytes, value: bytes) -> None:
    """Store VALUE under KEY; it is on disk when the command returns (with --durability always, the default).

    \b
    Example:
      shardkv put user:1000 John
    """
    with target.client() as db:
        db.put(key, value)


@click.command()
@click.argument("key", type=BYTES)
@with_target
def get(target: Target, key: bytes) -> int:
    """Print the value of KEY, byte for byte. Exit code 1 when there is none.

    \b
    Example:
      shardkv get user:1000
      shardkv get photo:7 > photo.jpg
    """
    with target.client() as db:
        value = db.get(key)
    if value is None:
        return not_found(key)
    sys.stdout.flush()
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
