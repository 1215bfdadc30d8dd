"""`shardkv scan`: lists keys and values in key order."""

from __future__ import annotations

import sys

import click

from shardkv.cli.exporting import as_line
from shardkv.cli.options import BYTES, Target, printable, with_target
from shardkv.errors import InvalidRange


@click.command()
@click.argument("start", type=BYTES, default=b"")
@click.argument("stop", type=BYTES, required=False)
@click.option("--prefix", type=BYTES, help="Only keys that begin with this.")
@click.option("--limit", type=click.IntRange(min=0), help="At most so many rows.")
@click.option("--reverse", is_flag=True, help="The highest key first.")
@click.option("--keys-only", is_flag=True, help="Leave out the values.")
@click.option("--cursor", help="Go on where an earlier scan ended, as its --show-cursor said.")
@click.option("--show-cursor", is_flag=True, help="Afterwards tell on stderr how to go on.")
@click.option("--json", "json_wanted", is_flag=True, help="One JSON object for each row.")
@with_target
def scan(
    target: Target,
    start: bytes,
    stop: bytes | None,
    *,
    prefix: bytes | None,
    limit: int | None,
    reverse: bool,
    keys_only: bool,
    cursor: str | None,
    show_cursor: bool,
    json_wanted: bool,
) -> None:
    """List keys from START up to, not including, STOP, in key order: key, tab, value.

    Bytes that are not printable are escaped; --json keeps them (base64 in "key_b64", "value_b64").

    \b
    Example:
      shardkv scan user:1000 user:2000
      shardkv scan --prefix city:IS: --limit 5 --json
      shardkv scan --reverse --keys-only --limit 1
      shardkv scan --limit 100 --show-cursor
    """
    if stop is not None and stop < start:
        raise InvalidRange(
            f"START {printable(start)} is after STOP {printable(stop)}.",
            hint="Write the lower one first; --reverse lists the highest key first.",
        )
    out = sys.stdout.buffer
    sys.stdout.flush()
    with target.client() as db:
        if keys_only:
            keys = db.scan(start, stop, prefix=prefix, limit=limit, reverse=reverse, keys_only=True, cursor=cursor)
            for key in keys:
                out.write(as_line(key, None) if json_wanted else f"{printable(key)}\n".encode())
            left = keys.cursor
        else:
            rows = db.scan(start, stop, prefix=prefix, limit=limit, reverse=reverse, cursor=cursor)
            for key, value in rows:
                out.write(as_line(key, value) if json_wanted else f"{printable(key)}\t{printable(value)}\n".encode())
            left = rows.cursor
    out.flush()
    if show_cursor:
        click.echo(f"cursor: {left or 'nothing is left'}", err=True)
