"""What is different on a terminal: the progress bar, and the shell's completion and history."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shardkv import Admin
from shardkv.cli.exporting import as_line
from tests.worlds.cluster import cluster_world, until

ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[a-zA-Z]")


class Terminal:
    """A `shardkv` command that has a terminal for input and output."""

    def __init__(self, *arguments: str, home: Path, program: list[str] | None = None) -> None:
        self._ours, theirs = pty.openpty()
        self._seen = b""
        self.process = subprocess.Popen(
            program or [sys.executable, "-m", "shardkv", *arguments],
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

    def rest(self) -> str:
        """What an ended command printed after the last match."""
        while select.select([self._ours], [], [], 0.05)[0]:
            try:
                self._seen += os.read(self._ours, 65536)
            except OSError:
                break
        return self._seen.decode()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


@contextmanager
def terminal(*arguments: str, home: Path, program: list[str] | None = None) -> Iterator[Terminal]:
    opened = Terminal(*arguments, home=home, program=program)
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
        shown.wait_for("Imported 20,000 rows")
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


def test_an_interrupted_import_says_how_far_it_came_and_resumes_above_its_bar(router, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"".join(as_line(b"k%05d" % number, b"v" * 50) for number in range(40_000)))
    router.delay_s = lambda op: 0.2
    with terminal("import", str(source), home=tmp_path) as shown:
        shown.wait_for("Importing .*[1-9],000 rows")
        shown.process.send_signal(signal.SIGINT)
        shown.wait_for(r"Interrupted\. \d+,000 rows were stored\. Run the same command with --resume to go on\.")
        assert shown.process.wait(10) == 130
    router.delay_s = lambda op: 0.01
    with terminal("import", str(source), "--resume", home=tmp_path) as shown:
        assert "Importing" not in shown.wait_for(r"Resuming after \d+,000 rows\.\r\n")
        shown.wait_for(r"Imported 40,000 rows: \d+,000 by the earlier run")


def test_an_export_into_a_pipe_shows_no_bar_and_ends_quietly_when_its_reader_does(router, tmp_path):
    router.store = {b"k%05d" % number: b"v" * 50 for number in range(30_000)}
    command = f"{sys.executable} -m shardkv export - | head -1"
    with terminal(home=tmp_path, program=["sh", "-c", command]) as shown:
        assert shown.process.wait(20) == 0
        assert shown.wait_for(r"\}\r\n") == '{"key":"k00000","value":"' + "v" * 50 + '"}\r\n'
        assert shown.rest() == ""


def test_bench_tells_what_it_does_meanwhile(router, tmp_path):
    with terminal("bench", "--keys", "500", "--seconds", "1.2", home=tmp_path) as shown:
        shown.wait_for("mixed: loading 500 records")
        shown.wait_for(r"mixed: \d s, [\d,]+ operations, [\d,]+ per second\r")
        shown.wait_for(r"\rmixed: [\d,]+ operations in 1\.\d+ s")


def test_delete_range_asks_and_takes_no_for_an_answer(tmp_path, router):
    router.store = {b"a": b"1", b"b": b"2"}
    for answer, code, left in (("n", 1, 2), ("", 1, 2), ("y", 0, 0)):
        with terminal("delete-range", "--all", home=tmp_path) as shown:
            shown.wait_for(r"Delete 2 keys which are all in keyspace default\? \[y/N\]")
            shown.type(f"{answer}\r")
            shown.wait_for("2 keys deleted" if code == 0 else "Nothing was deleted")
            assert shown.process.wait(15) == code
        assert len(router.store) == left


def test_a_job_shows_a_bar_and_goes_on_when_the_watching_is_interrupted(tmp_path):
    with cluster_world(tmp_path, "--nodes", "2", "--shards", "2") as world, Admin(world.address) as admin:
        with world.client(timeout=30) as db:
            db.put_many({f"{number:04d}": "x" * 4000 for number in range(1500)})
        until(lambda: (admin.shards()[0].bytes or 0) > 2_000_000, what="the node has measured it")
        shard = admin.shards()[0]
        other = "node-1" if shard.node == "node-2" else "node-2"
        command = ["shard", "move", str(shard.id), other, "--rate", "0.2", "--router", world.address]
        with terminal(*command, home=tmp_path) as shown:
            shown.wait_for(r"Plan: 1 shard with [\d.]+ MB to move, in about \d+ s")
            shown.wait_for(r"job 1 move 0/1 shards running: ship .*%.*/s")
            shown.process.send_signal(signal.SIGINT)
            shown.wait_for(r"Job 1 goes on; `shardkv job cancel 1` would end it")
            assert shown.process.wait(10) == 130
        assert admin.job(1).state == "running"
        admin.set_job_rate(1, 1_000_000_000)
        with terminal("job", "watch", "1", "--router", world.address, home=tmp_path) as shown:
            shown.wait_for(r"Job 1 \(move\) is done", timeout_s=60)
            assert shown.process.wait(10) == 0


def test_dropping_a_keyspace_asks_and_takes_no_for_an_answer(tmp_path):
    with cluster_world(tmp_path, "--nodes", "1", "--shards", "1") as world, Admin(world.address) as admin:
        for answer, left in (("n", ["default", "people"]), ("y", ["default"])):
            if answer == "n":
                admin.create_keyspace("people", shards=1)
            with terminal("keyspace", "drop", "people", "--router", world.address, home=tmp_path) as shown:
                shown.wait_for("All data of keyspace people will be deleted for good")
                shown.type(f"{answer}\r")
                assert shown.process.wait(20) == (130 if answer == "n" else 0)
            assert [each.name for each in admin.keyspaces()] == left
