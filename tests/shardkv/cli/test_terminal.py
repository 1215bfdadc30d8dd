"""What is different on a terminal: the progress bar, and the shell's completion and history."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shardkv.cli.exporting import as_line

ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[a-zA-Z]")


class Terminal:
    """A `shardkv` command that has a terminal for input and output."""

    def __init__(self, *arguments: str, home: Path) -> None:
        self._ours, theirs = pty.openpty()
        self._seen = b""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "shardkv", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "HOME": str(home), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"},
        )
        os.close(theirs)

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def wait_for(self, pattern: str, *, timeout_s: float = 15) -> str:
        """Until the output since the last match has `pattern`; what came up to its end."""
        end = time.monotonic() + timeout_s
        while not (found := re.search(pattern.encode(), ESCAPES.sub(b"", self._seen))):
            assert time.monotonic() < end, f"{pattern!r} not in {self._seen!r}"
            if select.select([self._ours], [], [], 0.05)[0]:
                try:
                    self._seen += os.read(self._ours, 65536)
                except OSError:
                    time.sleep(0.01)
        text = ESCAPES.sub(b"", self._seen)
        self._seen = text[found.end() :]
        return text[: found.end()].decode()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


@contextmanager
def terminal(*arguments: str, home: Path) -> Iterator[Terminal]:
    opened = Terminal(*arguments, home=home)
    try:
        yield opened
    finally:
        opened.close()


def test_an_import_shows_rate_and_time_left(router, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"".join(as_line(b"k%05d" % number, b"v" * 50) for number in range(20_000)))
    router.delay_s = lambda op: 0.02
    with terminal("import", str(source), home=tmp_path) as shown:
        shown.wait_for(r"Importing .*%.*ETA.* rows, [\d,]+/s")
        shown.wait_for("Imported 20000 rows")
        assert shown.process.wait(10) == 0


def test_the_shell_completes_keys_and_remembers_lines(router, tmp_path):
    router.store = {b"user:1000": b"John"}
    with terminal("shell", home=tmp_path) as shown:
        shown.wait_for("shardkv>")
        shown.type("get user:1\t")
        shown.wait_for("000")
        shown.type("\r")
        shown.wait_for(r"John\s+shardkv>")
        shown.type("nonsense\r")
        shown.wait_for(r"There is no command 'nonsense'[^>]*shardkv>")
        shown.type("quit\r")
        assert shown.process.wait(10) == 0
    with terminal("shell", home=tmp_path) as shown:
        shown.wait_for("shardkv>")
        shown.type("\x1b[A\x1b[A\x1b[A\r")
        shown.wait_for(r"John\s+shardkv>")
        shown.type("\x04")
        assert shown.process.wait(10) == 0
