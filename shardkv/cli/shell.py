"""`shardkv shell`: one command a line, with history and completion on a terminal, plain lines from a pipe.

Invariant: an error ends its line, never the shell. Piped input ends with the exit code of its worst line.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shardkv.cli.main import exit_code
from shardkv.cli.options import Target, with_target
from shardkv.cli.shell_verbs import VERBS, run_line
from shardkv.errors import ShardKVError

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

    from shardkv.client.sync import Client

HISTORY_FILE = "~/.shardkv_history"
COMPLETIONS_MAX = 20
COMPLETION_TIMEOUT_S = 0.5


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
