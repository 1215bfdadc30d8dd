"""`shardkv export`: writes keys and values to a JSONL file that `shardkv import` reads back exactly.

Invariant: FILE is the whole export or is not touched: rows go to a file beside it, which is synced and renamed at
the end. An export of nothing does not replace a file that holds something.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import click

from shardkv.cli.options import BYTES, Target, as_fields, as_json, counted, with_target
from shardkv.cli.progress import Progress
from shardkv.errors import InvalidArgument

SHOW_EVERY_ROWS = 1_000


@click.command()
@click.option("--prefix", type=BYTES, default=b"", help="Only keys that begin with this.")
@click.argument("file", type=click.Path(dir_okay=False, writable=True, allow_dash=True))
@with_target
def export(target: Target, file: str, *, prefix: bytes) -> None:
    """Write all keys and values, in key order, to FILE as JSON lines; `-` is standard output.

    What is not text is written as base64 in "key_b64" and "value_b64".

    \b
    Example:
      shardkv export backup.jsonl
      shardkv export --prefix city:IS: - | head
    """
    rows = 0
    with target.client() as db, _output(file) as out, _progress(file) as progress:
        for key, value in db.scan(prefix=prefix or None):
            out.write(as_line(key, value))
            rows += 1
            if rows % SHOW_EVERY_ROWS == 0:
                progress.show(0, rows)
    click.echo(f"Exported {counted(rows, 'row')}.", err=True)


def _progress(file: str) -> Progress:
    """No bar among the rows: not when they go to a terminal or to another program that may write there too."""
    in_a_file = file != "-" or stat.S_ISREG(os.fstat(sys.stdout.fileno()).st_mode)
    return Progress(None, "Exporting", wanted=in_a_file)


def as_line(key: bytes, value: bytes | None) -> bytes:
    """One row, or only its key, as a line of JSON."""
    return (as_json(as_fields(key, value)) + "\n").encode()


@contextmanager
def _output(file: str) -> Iterator[BinaryIO]:
    """Where to write: standard output, or a file that takes its name once it is complete."""
    if file == "-":
        sys.stdout.flush()
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    unfinished = Path(f"{file}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "xb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        if unfinished.stat().st_size == 0 and os.path.exists(file) and os.path.getsize(file):
            raise InvalidArgument(
                f"Nothing was found to export, and {file} is not empty: it was left as it is.",
                hint="Check --prefix and --keyspace, or remove the file.",
            )
        os.replace(unfinished, file)
    except OSError as error:
        raise InvalidArgument(
            f"{file} cannot be written: {error.strerror}.", hint="Nothing was exported; name another file."
        ) from error
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
