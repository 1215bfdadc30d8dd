"""`shardkv shell`: one command a line, with history and completion on a terminal, plain lines from a pipe.

Invariant: an error ends its line, never the shell. Piped input ends with the exit code of its worst line.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shardkv.cli.main import exit_code
from shardkv.cli.options import Target, printable, with_target
from shardkv.errors import InvalidArgument, ShardKVError

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

    from shardkv.client.sync import Client

HISTORY_FILE = "~/.shardkv_history"
RANGE_ROWS_MAX = 1_000
COMPLETIONS_MAX = 20
COMPLETION_TIMEOUT_S = 0.5
PUT_LINE = re.compile(r"""\w+\s+(?P<key>(?:"(?:\\.|[^"\\])*"|'[^']*'|\\.|[^\s"'\\])+)\s+(?P<value>.+)""", re.DOTALL)
QUOTED = re.compile(r"""(?:"(?:\\.|[^"\\])*"|'[^']*')(?:\s+#.*)?""", re.DOTALL)


@click.command()
@with_target
def shell(target: Target) -> int:
    """Type commands one after another; `help` lists them. Reads plain lines when input is not a terminal.

    Words are quoted as in a shell: a key with spaces is "two words". The value of `put` is the rest of the line as
    it is typed, JSON and # included; quotes around the whole of it are taken off.

    \b
    Example:
      shardkv shell
      echo 'range user:1000 user:1999' | shardkv shell
    """
    with target.client() as db:
        if sys.stdin.isatty():
            return _converse(db, target)
        return _run_lines(db, (line.rstrip("\n") for line in sys.stdin))


def _run_lines(db: Client[bytes], lines: Iterable[str]) -> int:
    worst = 0
    for line in lines:
        try:
            for told in run_line(db, line):
                click.echo(told)
        except EOFError:
            break
        except ShardKVError as error:
            click.echo(f"Error: {error}", err=True)
            worst = max(worst, exit_code(error))
    return worst


def _converse(db: Client[bytes], target: Target) -> int:
    session = _session(db)
    click.echo(f"Connected to {target.router}, keyspace {target.keyspace}. `help` lists the commands.")

    def lines() -> Iterator[str]:
        while True:
            try:
                yield session.prompt("shardkv> ")
            except KeyboardInterrupt:
                continue
            except EOFError:
                return

    _run_lines(db, lines())
    return 0


def _session(db: Client[bytes]) -> PromptSession[str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion
    from prompt_toolkit.document import Document
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory

    class Words(Completer):
        """Verbs first, then keys that begin with what was typed."""

        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
            typed = document.get_word_before_cursor(WORD=True)
            first = not document.text_before_cursor[: -len(typed) or None].strip()
            for word in sorted(VERBS) if first else _keys_like(db, typed):
                if word.startswith(typed):
                    yield Completion(word, start_position=-len(typed))

    path = Path(HISTORY_FILE).expanduser()
    try:
        path.touch(mode=0o600)
        history: History = FileHistory(str(path))
    except OSError:
        history = InMemoryHistory()
    return PromptSession(history=history, completer=Words(), complete_in_thread=True, complete_while_typing=False)


def _keys_like(db: Client[bytes], typed: str) -> list[str]:
    try:
        found = db.scan(prefix=typed, limit=COMPLETIONS_MAX, keys_only=True, timeout=COMPLETION_TIMEOUT_S)
        return [shlex.quote(key.decode()) for key in found]
    except (ShardKVError, UnicodeDecodeError):
        return []


# What lines mean


@dataclass(frozen=True, slots=True)
class Verb:
    """`run` takes the words after the verb, of which there are `least` to `most`, and yields lines to print."""

    usage: str
    summary: str
    least: int
    most: int
    run: Callable[[Client[bytes], list[str]], Iterator[str]]


def run_line(db: Client[bytes], line: str) -> Iterator[str]:
    """Carry out one line; what to print. Raises EOFError for `quit`, InvalidArgument, and what the client raises."""
    words = split_line(line)
    if words[:1] == ["shardkv"]:
        raise InvalidArgument("This already is shardkv.", hint="Leave the first word out.")
    if not words:
        return
    verb = VERBS.get(words[0].lower())
    if verb is None:
        raise InvalidArgument(f"There is no command {words[0]!r}.", hint="`help` lists the commands.")
    if not verb.least <= len(words) - 1 <= verb.most:
        raise InvalidArgument(f"Write: {verb.usage}")
    yield from verb.run(db, words[1:])


def split_line(line: str) -> list[str]:
    """The words of a line, quoted as in a shell; of `put`, the value is the rest of the line as it is typed.

    Quotes around that whole rest are taken off, as they are around any word. Raises InvalidArgument.
    """
    line = line.strip()
    if line.lower().startswith("put "):
        found = PUT_LINE.fullmatch(line)
        if found is not None:
            value = found["value"]
            return ["put", *_words(found["key"]), *(_words(value) if QUOTED.fullmatch(value) else [value])]
    return _words(line)


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text, comments=True)
    except ValueError as error:
        raise InvalidArgument(f"The line cannot be read: {error}.", hint='Quote as in "a b".') from None


def _put(db: Client[bytes], words: list[str]) -> Iterator[str]:
    db.put(words[0], words[1])
    yield "ok"


def _get(db: Client[bytes], words: list[str]) -> Iterator[str]:
    value = db.get(words[0])
    yield "(not found)" if value is None else printable(value)


def _delete(db: Client[bytes], words: list[str]) -> Iterator[str]:
    yield "deleted" if db.delete(words[0]) else "(not found)"


def _range(db: Client[bytes], words: list[str]) -> Iterator[str]:
    return _rows(db.get_range(words[0], words[1], limit=RANGE_ROWS_MAX + 1))


def _scan(db: Client[bytes], words: list[str]) -> Iterator[str]:
    if (words and words[0].startswith("--")) or len(words) > 2 or (len(words) == 2 and not words[1].isdecimal()):
        raise InvalidArgument(f"Write: {VERBS['scan'].usage}.", hint="`shardkv scan` outside the shell takes options.")
    limit = int(words[1]) if len(words) == 2 else RANGE_ROWS_MAX + 1
    return _rows(db.scan(prefix=words[0] if words else None, limit=limit))


def _rows(rows: Iterable[tuple[bytes, bytes]]) -> Iterator[str]:
    count = 0
    for count, (key, value) in enumerate(rows, 1):
        if count > RANGE_ROWS_MAX:
            yield f"(more; the shell shows {RANGE_ROWS_MAX} rows, `shardkv scan` all)"
            return
        yield f"{printable(key)}\t{printable(value)}"
    yield "(1 row)" if count == 1 else f"({count} rows)"


def _batch(db: Client[bytes], words: list[str]) -> Iterator[str]:
    if len(words) % 2:
        raise InvalidArgument(f"Write: {VERBS['batch'].usage}")
    with db.batch() as batch:
        for key, value in zip(words[::2], words[1::2], strict=True):
            batch.put(key, value)
    yield f"ok, {len(words) // 2} written"


def _ping(db: Client[bytes], words: list[str]) -> Iterator[str]:
    yield f"{db.ping():.2f} ms"


def _help(db: Client[bytes], words: list[str]) -> Iterator[str]:
    width = max(len(verb.usage) for verb in VERBS.values())
    if words and words[0] not in VERBS:
        raise InvalidArgument(f"There is no command {words[0]!r}.", hint="`help` lists the commands.")
    for verb in [VERBS[words[0]]] if words else VERBS.values():
        yield f"{verb.usage:{width}}  {verb.summary}"


def _quit(db: Client[bytes], words: list[str]) -> Iterator[str]:
    raise EOFError


MANY = 10_000

VERBS = {
    "put": Verb("put KEY VALUE", "store the rest of the line; quote a KEY that has spaces", 2, 2, _put),
    "get": Verb("get KEY", "show a value", 1, 1, _get),
    "range": Verb("range START END", "show the keys from START to END, both included", 2, 2, _range),
    "scan": Verb("scan [PREFIX [LIMIT]]", "show the keys that begin with PREFIX", 0, 9, _scan),
    "batch": Verb("batch KEY VALUE [KEY VALUE ...]", "store several values, atomically per shard", 2, MANY, _batch),
    "delete": Verb("delete KEY", "delete a key", 1, 1, _delete),
    "ping": Verb("ping", "measure the round trip", 0, 0, _ping),
    "?": Verb("?", "this list", 0, 1, _help),
    "help": Verb("help [COMMAND]", "this list, or one line of it", 0, 1, _help),
    "quit": Verb("quit", "leave", 0, 0, _quit),
    "exit": Verb("exit", "leave", 0, 0, _quit),
}
