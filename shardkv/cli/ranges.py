"""The commands for ranges of keys: count and delete-range.

Invariant: delete-range deletes nothing before it was told to, by --yes or by the answer of a person at a terminal.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from shardkv.cli.main import NOT_FOUND
from shardkv.cli.options import BYTES, Target, as_json, counted, printable, with_target
from shardkv.errors import DeadlineExceeded, OutcomeUnknown

if TYPE_CHECKING:
    from shardkv.client.sync import Client


@click.command()
@click.argument("start", type=BYTES, default=b"")
@click.argument("stop", type=BYTES, required=False)
@click.option("--prefix", type=BYTES, help="Only keys that begin with this.")
@click.option("--json", "json_wanted", is_flag=True, help="Print one JSON object.")
@with_target
def count(target: Target, start: bytes, stop: bytes | None, *, prefix: bytes | None, json_wanted: bool) -> None:
    """Count the keys from START up to, not including, STOP; without them, all keys. The nodes count, no key is sent.

    \b
    Example:
      shardkv count
      shardkv count --prefix user: --timeout 60
    """
    with target.client() as db:
        found = db.count(start, stop, prefix=prefix)
    click.echo(as_json({"count": found}) if json_wanted else found)


@click.command()
@click.argument("start", type=BYTES, required=False)
@click.argument("stop", type=BYTES, required=False)
@click.option("--prefix", type=BYTES, help="Only keys that begin with this.")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many keys.")
@click.option("--all", "all_wanted", is_flag=True, help="All keys of the keyspace.")
@click.option("--yes", is_flag=True, help="Do not ask before deleting.")
@click.option("--json", "json_wanted", is_flag=True, help="Print one JSON object.")
@with_target
def delete_range(
    target: Target,
    start: bytes | None,
    stop: bytes | None,
    *,
    prefix: bytes | None,
    limit: int | None,
    all_wanted: bool,
    yes: bool,
    json_wanted: bool,
) -> int:
    """Delete the keys from START up to, not including, STOP, and print how many there were.

    Asks before it begins, unless --yes says not to. Not atomic: done in steps. --timeout is how long it may take
    without getting on; when it stops, call it again to go on.

    \b
    Example:
      shardkv delete-range user:1000 user:2000
      shardkv delete-range --prefix session: --yes
    """
    if all_wanted == (start is not None or prefix is not None):
        raise click.UsageError("Say what to delete: START and STOP, or --prefix, or --all for every key.")
    low = start or b""
    with target.client() as db:
        if not yes and not _agreed(target, db.count(low, stop, prefix=prefix), low, stop, prefix, limit):
            click.echo("Nothing was deleted.", err=True)
            return NOT_FOUND
        deleted = _delete(db, low, stop, prefix, limit)
    click.echo(as_json({"deleted": deleted}) if json_wanted else f"{counted(deleted, 'key')} deleted.")
    return 0


def _agreed(
    target: Target, found: int, start: bytes, stop: bytes | None, prefix: bytes | None, limit: int | None
) -> bool:
    """Whether a person says that so many keys may go. Raises UsageError when there is nobody to ask."""
    what = counted(found if limit is None else min(found, limit), "key")
    bounds = [f"from {printable(start)}"] if start else []
    bounds += [f"up to {printable(stop)}"] if stop is not None else []
    bounds += [f"beginning with {printable(prefix)}"] if prefix else []
    question = " ".join([f"Delete {what}", *(bounds or ["which are all"]), f"in keyspace {target.keyspace}?"])
    if not sys.stdin.isatty():
        raise click.UsageError(f"{question} There is no terminal to ask on; --yes answers it.")
    return click.confirm(question, err=True)


def _delete(db: Client[bytes], start: bytes, stop: bytes | None, prefix: bytes | None, limit: int | None) -> int:
    """Go on as long as something is deleted within each timeout."""
    deleted = 0
    while True:
        try:
            return deleted + db.delete_range(start, stop, prefix=prefix, limit=limit)
        except (DeadlineExceeded, OutcomeUnknown) as error:
            if limit is not None or not error.detail.get("deleted"):
                if deleted:
                    click.echo(f"{counted(deleted, 'key')} deleted before this:", err=True)
                raise
            deleted += error.detail["deleted"]
