"""`shardkv import`: loads a file in batches, shows progress, and can go on where it stopped.

Invariant: the progress file beside the input tells of rows that were acknowledged, never of more; it is there exactly
while an import is unfinished.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypedDict

import click

from shardkv.cli.options import Target, as_json, with_target
from shardkv.cli.progress import Progress
from shardkv.errors import InvalidArgument, ShardKVError, from_wire

if TYPE_CHECKING:
    from shardkv.cli.rows import BadRow, Lines, Row

BATCH_ROWS = 4_000
BATCH_BYTES = 4 * 1024 * 1024


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
        with Progress(None, "Importing") as progress:
            rows = _load(target, sys.stdin.buffer, "standard input", options, None, progress, resume=False)
    else:
        with open(file, "rb") as stream, Progress(os.path.getsize(file), "Importing") as progress:
            sidecar = Path(f"{file}.shardkv-progress")
            rows = _load(target, stream, file, options, sidecar, progress, resume=resume)
    click.echo(f"Imported {rows} rows.", err=True)


def _load(
    target: Target,
    stream: BinaryIO,
    name: str,
    options: Options,
    sidecar: Path | None,
    progress: Progress,
    *,
    resume: bool,
) -> int:
    """Store all rows; how many, with those of the import that is resumed."""
    from shardkv.cli.rows import Lines, read_header, read_rows

    lines = Lines(stream, name)
    header = read_header(lines, options["format"])
    before = done = _resume(lines, sidecar, options) if resume and sidecar is not None else 0
    batches = _batches(read_rows(lines, options["format"], options["key"], options["prefix"].encode(), header))
    try:
        with target.client() as db:
            for batch in batches:
                db.batch_put([key for key, _ in batch.rows], [value for _, value in batch.rows])
                done += len(batch.rows)
                progress.show(lines.offset, done, rows_before=before)
                if batch.bad is not None:
                    raise batch.bad
                if sidecar is not None:
                    _note(sidecar, lines, options, done)
    except ShardKVError as error:
        raise _stopped(error, done, resumable=sidecar is not None and sidecar.exists()) from error
    if sidecar is not None:
        sidecar.unlink(missing_ok=True)
    return done


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
            f"The unfinished import of {lines.name} had other options: {told.get('options')}.",
            hint="Use the same ones, or leave out --resume to start again.",
        )
    if not lines.skip(offset) or lines.digest() != digest:
        raise InvalidArgument(
            f"{lines.name} has changed in the part that was already imported.",
            hint="Leave out --resume to import all of it again.",
        )
    click.echo(f"Resuming after {rows} rows.", err=True)
    return rows


def _stopped(error: ShardKVError, done: int, *, resumable: bool) -> ShardKVError:
    """The same error, saying also what was stored and how to go on."""
    how = " Run the same command with --resume to go on." if resumable else ""
    return from_wire(
        error.code, f"{error.message} {done} rows were stored.", error.detail, f"{error.hint}{how}".strip()
    )
