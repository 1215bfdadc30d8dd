"""`shardkv scan`: lists keys and values in key order."""

from __future__ import annotations

import sys
from typing import Any, Literal

import click

from shardkv.cli.exporting import as_line
from shardkv.cli.options import BYTES, Target, printable, with_target
from shardkv.client.missing import Missing
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
@click.option("--partial", is_flag=True, help="Do without shards that are away; tell on stderr which, and exit with 1.")
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
    partial: bool,
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
    on_error: Literal["fail", "partial"] = "partial" if partial else "fail"
    given: dict[str, Any] = {"prefix": prefix, "limit": limit, "reverse": reverse, "cursor": cursor}
    with target.client() as db:
        if keys_only:
            keys = db.scan(start, stop, keys_only=True, on_shard_error=on_error, **given)
            for key in keys:
                out.write(as_line(key, None) if json_wanted else f"{printable(key)}\n".encode())
            left, missing = keys.cursor, keys.missing
        else:
            rows = db.scan(start, stop, on_shard_error=on_error, **given)
            for key, value in rows:
                out.write(as_line(key, value) if json_wanted else f"{printable(key)}\t{printable(value)}\n".encode())
            left, missing = rows.cursor, rows.missing
    out.flush()
    if show_cursor:
        click.echo(f"cursor: {left or 'nothing is left'}", err=True)
    for one in missing:
        click.echo(_told(one), err=True)
    if missing:
        sys.exit(1)


def _told(missing: Missing) -> str:
    """A line for people."""
    stop = "the end" if missing.stop is None else printable(missing.stop)
    keys = f"keys from {printable(missing.start) or 'the first'} to {stop}"
    tokens = "" if missing.tokens is None else f" with tokens {missing.tokens[0]:#x} to {missing.tokens[1]:#x}"
    return f"missing: shard {missing.shard}, {keys}{tokens}: {missing.error.message}"
