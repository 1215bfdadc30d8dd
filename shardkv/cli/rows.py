"""Rows of a JSONL, CSV or TSV file as (key, value), one after another; and the position up to which they were read.

Invariants: a row that cannot be stored exactly is BadRow with its line number, never skipped; after a row was given
out, `lines.offset`, `lines.number` and `lines.digest()` describe exactly the bytes up to its end, so reading can
resume there. Nothing here knows a client.

Without a key template a row must have `key` and `value` (or `key_b64` and `value_b64`, base64 of bytes that are not
text, as `shardkv export` writes them). With one, the key is made from the row's columns and the value is the row as
JSON.
"""

from __future__ import annotations

import base64
import binascii
import csv
import json
import string
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import xxhash

from shardkv.cli.options import counted
from shardkv.errors import InvalidArgument

BOM = b"\xef\xbb\xbf"
DELIMITERS = {"csv": ",", "tsv": "\t"}
CSV_FIELD_BYTES_MAX = 32 * 1024 * 1024

Row = tuple[bytes, bytes]


class BadRow(InvalidArgument):
    """A row that cannot be stored. The message says where and why."""


class Lines:
    """Text lines of a binary file, counted and digested as they are given out."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.name = name
        self.offset = 0
        self.number = 0
        self._file = file
        self._digest = xxhash.xxh3_64()

    def __iter__(self) -> Iterator[str]:
        for line in self._file:
            self.number += 1
            self.offset += len(line)
            self._digest.update(line)
            text = line.removeprefix(BOM) if self.number == 1 else line
            try:
                yield text.decode()
            except UnicodeDecodeError as error:
                raise self.bad(f"it is not UTF-8 text ({error.reason} at byte {error.start})") from None

    def skip(self, offset: int) -> bool:
        """Go to `offset`, which is where an earlier reading stopped; False when the file ends before."""
        while self.offset < offset:
            line = self._file.readline(offset - self.offset)
            if not line:
                return False
            self.number += line.endswith(b"\n")
            self.offset += len(line)
            self._digest.update(line)
        return True

    def digest(self) -> str:
        """A digest of all bytes given out or skipped so far."""
        return self._digest.hexdigest()

    def bad(self, why: str) -> BadRow:
        """The error for the row that was read last."""
        return BadRow(
            f"{self.name}, line {self.number}: {why}.", detail={"line": self.number}, hint="Correct the line."
        )


def read_rows(lines: Lines, form: str, template: str | None, prefix: bytes, header: list[str] | None) -> Iterator[Row]:
    """The rows from where `lines` is. `header` names the columns of csv and tsv; None: the next line does."""
    rows = _json_rows(lines) if form == "jsonl" else _delimited_rows(lines, DELIMITERS[form], header)
    to_row = _stored_row if template is None else _templated(template)
    for columns in rows:
        try:
            key, value = to_row(columns)
        except ValueError as error:
            raise lines.bad(str(error)) from None
        if not prefix + key:
            raise lines.bad("its key is empty")
        yield prefix + key, value


def read_header(lines: Lines, form: str) -> list[str] | None:
    """The column names of a csv or tsv file, which is at its beginning; None for jsonl."""
    if form == "jsonl":
        return None
    header = next(csv.reader(iter(lines), delimiter=DELIMITERS[form]), None)
    if not header:
        raise BadRow(f"{lines.name} has no header line.", hint="The first line must name the columns.")
    return header


def _json_rows(lines: Lines) -> Iterator[dict[str, Any]]:
    for line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise lines.bad(f"it is not JSON ({error})") from None
        if not isinstance(row, dict):
            raise lines.bad("it is not a JSON object")
        yield row


def _delimited_rows(lines: Lines, delimiter: str, header: list[str] | None) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(CSV_FIELD_BYTES_MAX)
    reader = csv.reader(iter(lines), delimiter=delimiter, strict=True)
    try:
        names = header or next(reader, [])
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(names):
                raise lines.bad(f"it has {counted(len(cells), 'column')} and the header has {len(names):,}")
            yield dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise lines.bad(f"it is not valid ({error})") from None


def _stored_row(row: dict[str, Any]) -> Row:
    return _field(row, "key"), _field(row, "value")


def _field(row: dict[str, Any], name: str) -> bytes:
    """A key or value. Text is stored as it is, other JSON as its JSON. Raises ValueError with the reason."""
    coded = row.get(f"{name}_b64")
    if isinstance(coded, str):
        try:
            return base64.b64decode(coded, validate=True)
        except binascii.Error as error:
            raise ValueError(f'its "{name}_b64" is not base64 ({error})') from None
    value = row.get(name)
    if value is None:
        raise ValueError(
            f'it has no "{name}" (columns: {", ".join(map(str, row)) or "none"}); use --key for other rows'
        )
    if name == "key" and (isinstance(value, bool) or not isinstance(value, str | int | float)):
        raise ValueError('its "key" is neither text nor a number')
    return _encoded(value if isinstance(value, str) else _json(value))


def _templated(template: str) -> Callable[[dict[str, Any]], Row]:
    """Makes (key, row as JSON) by a template: a column's name, or text with {column} in it."""
    pattern = template if "{" in template else f"{{{template}}}"
    try:
        columns = [name for _, name, _, _ in string.Formatter().parse(pattern) if name is not None]
    except ValueError as error:
        raise InvalidArgument(f"The key {template!r} is not a template: {error}.", hint="Write {column}.") from None
    if not all(columns):
        raise InvalidArgument(f"The key {template!r} names no column.", hint="Write {column}.")

    def to_row(row: dict[str, Any]) -> Row:
        values = {}
        for name in columns:
            value = row.get(name)
            if not isinstance(value, str | int | float) or value == "":
                raise ValueError(f'it has no text or number in the column "{name}" that its key needs')
            values[name] = value
        key = "".join(
            literal + (str(values[name]) if name is not None else "")
            for literal, name, _, _ in string.Formatter().parse(pattern)
        )
        return _encoded(key), _encoded(_json(row))

    return to_row


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _encoded(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise ValueError("it has half of a surrogate pair, which is not text") from None
