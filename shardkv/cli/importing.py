"""`shardkv import`: loads a file in batches, shows progress, and can go on where it stopped.

Invariant: the progress file beside the input tells of rows that were acknowledged, never of more; it is there exactly
while an import is unfinished.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypedDict

import click

from shardkv.cli.options import Target, as_json, counted, with_target
from shardkv.cli.progress import Progress
from shardkv.errors import DeadlineExceeded, InvalidArgument, OutcomeUnknown, ShardKVError, from_wire

if TYPE_CHECKING:
    from shardkv.cli.rows import BadRow, Lines, Row
    from shardkv.client.sync import Client

BATCH_ROWS = 4_000
BATCH_BYTES = 4 * 1024 * 1024
RETRY_S = 30.0
"""How long a batch that failed is tried again: a node that died is back long before."""
RETRY_PAUSE_S = 0.2


class Options(TypedDict):
    """What decides how the rows of a file are stored: an import can be resumed only with the same."""

    format: str
    key: str | None
    prefix: str
    keyspace: str


@click.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@click.option("--format", "form", type=click.Choice(["jsonl", "csv", "tsv"]), help="[default: by the file's name]")
@click.option("--key", "template", metavar="COLUMN", help="The column that is the key, or a text such as '{a}:{b}'.")
@click.option("--prefix", default="", help="Put in front of every key.")
@click.option("--resume", is_flag=True, help="Go on after the last row of this file that was acknowledged.")
@with_target
def import_command(
    target: Target, file: str, form: str | None, template: str | None, prefix: str, *, resume: bool
) -> None:
    """Load FILE, a row for each key; `-` is standard input.

    Rows have "key" and "value". With --key, the key is made from columns and the value is the whole row as JSON.
    A row that cannot be stored stops the import and is named; rows before it are stored.

    \b
    Example:
      shardkv import users.jsonl
      shardkv import cities.csv --key '{country}:{name}' --prefix city:
      shardkv import cities.csv --key '{country}:{name}' --prefix city: --resume
      shardkv export - | shardkv --router 10.0.0.5:7400 import -
    """
    if file == "-" and resume:
        raise InvalidArgument("Standard input cannot be resumed.", hint="Import from a file, or leave out --resume.")
    form = form or {".csv": "csv", ".tsv": "tsv"}.get(Path(file).suffix.lower(), "jsonl")
    options = Options(format=form, key=template, prefix=prefix, keyspace=target.keyspace)
    if file == "-":
        told = _load(target, sys.stdin.buffer, "standard input", options, None, None, resume=False)
    else:
        with open(file, "rb") as stream:
            size, sidecar = os.path.getsize(file), Path(f"{file}.shardkv-progress")
            told = _load(target, stream, file, options, size, sidecar, resume=resume)
    click.echo(told, err=True)


def _load(
    target: Target,
    stream: BinaryIO,
    name: str,
    options: Options,
    size: int | None,
    sidecar: Path | None,
    *,
    resume: bool,
) -> str:
    """Store all rows; what was done, as a sentence."""
    from shardkv.cli.rows import Lines, read_header, read_rows

    lines = Lines(stream, name)
    header = read_header(lines, options["format"])
    before = done = _resume(lines, sidecar, options) if resume and sidecar is not None else 0
    batches = _batches(read_rows(lines, options["format"], options["key"], options["prefix"].encode(), header))
    try:
        with target.client() as db, Progress(size, "Importing") as progress:
            db.ping()
            if sidecar is not None:
                _note(sidecar, lines, options, done)
            for batch in batches:
                _store(db, batch.rows, progress)
                done += len(batch.rows)
                progress.show(lines.offset, done, rows_before=before)
                if batch.bad is not None:
                    raise batch.bad
                if sidecar is not None:
                    _note(sidecar, lines, options, done)
    except ShardKVError as error:
        raise _stopped(error, _how_far(done, sidecar)) from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_far(done, sidecar)) from None
    if sidecar is not None:
        sidecar.unlink(missing_ok=True)
    parts = f": {before:,} by the earlier run, {done - before:,} by this one" if before else ""
    return f"Imported {counted(done, 'row')}{parts}."


def _store(db: Client[bytes], rows: list[Row], progress: Progress) -> None:
    """Store one batch, again if need be: a row is written whole, so writing it twice does no harm.

    Raises what the last attempt failed with once it was tried for RETRY_S.
    """
    end = None
    while True:
        try:
            db.batch_put([key for key, _ in rows], [value for _, value in rows])
            return
        except ShardKVError as error:
            if not (error.retriable or isinstance(error, OutcomeUnknown | DeadlineExceeded)):
                raise
            now = time.monotonic()
            if end is None:
                end = now + RETRY_S
                if RETRY_S:
                    progress.say(f"{error.message} Trying again for up to {RETRY_S:g} s.")
            if now >= end:
                raise
        time.sleep(RETRY_PAUSE_S)


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows to store at once, and the bad row right after them, if there is one."""

    rows: list[Row]
    bad: BadRow | None = None


def _batches(rows: Iterator[Row]) -> Iterator[Batch]:
    from shardkv.cli.rows import BadRow

    batch: list[Row] = []
    size = 0
    try:
        for row in rows:
            batch.append(row)
            size += len(row[0]) + len(row[1])
            if len(batch) == BATCH_ROWS or size >= BATCH_BYTES:
                yield Batch(batch)
                batch, size = [], 0
    except BadRow as error:
        yield Batch(batch, error)
        return
    if batch:
        yield Batch(batch)


def _note(sidecar: Path, lines: Lines, options: Options, rows: int) -> None:
    """Remember that all rows up to here were acknowledged."""
    told = {"rows": rows, "offset": lines.offset, "digest": lines.digest(), "options": options}
    fresh = sidecar.with_name(sidecar.name + ".tmp")
    fresh.write_text(as_json(told) + "\n")
    fresh.replace(sidecar)


def _resume(lines: Lines, sidecar: Path, options: Options) -> int:
    """Go to where the unfinished import of this file stopped; how many rows that was."""
    try:
        told = json.loads(sidecar.read_text())
        rows, offset, digest = int(told["rows"]), int(told["offset"]), told["digest"]
    except FileNotFoundError:
        click.echo(f"There is no unfinished import of {lines.name}; starting with its first row.", err=True)
        return 0
    except (ValueError, KeyError, TypeError):
        raise InvalidArgument(f"{sidecar} cannot be read.", hint="Remove it and import without --resume.") from None
    if told.get("options") != options:
        raise InvalidArgument(
            f"The unfinished import of {lines.name} was started with {_options_text(told.get('options'))}.",
            hint="Use the same options, or leave out --resume to start again.",
        )
    if not lines.skip(offset) or lines.digest() != digest:
        raise InvalidArgument(
            f"{lines.name} has changed in the part that was already imported.",
            hint="Leave out --resume to import all of it again.",
        )
    click.echo(f"Resuming after {counted(rows, 'row')}." if rows else "Resuming with the first row.", err=True)
    return rows


def _options_text(options: object) -> str:
    """Options as they are typed."""
    told = options if isinstance(options, dict) else {}
    return " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in told.items() if value) or "other options"


def _how_far(done: int, sidecar: Path | None) -> str:
    """What was stored and how to go on. Forgets an import that stored nothing."""
    if sidecar is not None and not done:
        sidecar.unlink(missing_ok=True)
    how = " Run the same command with --resume to go on." if sidecar is not None and done else ""
    return f"{counted(done, 'row')} {'was' if done == 1 else 'were'} stored.{how}"


def _stopped(error: ShardKVError, how_far: str) -> ShardKVError:
    """The same error, saying also what was stored and how to go on, which no outcome of a single write changes."""
    hint = "" if isinstance(error, OutcomeUnknown) else f" {error.hint}"
    return from_wire(error.code, error.message, error.detail, f"{hint} {how_far}".strip())
