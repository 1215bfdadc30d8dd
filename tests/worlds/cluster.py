"""A real cluster on loopback, started as a user would, with a handle on every process.

Invariant: `close` leaves no process behind, also when the launcher was killed; only processes the launcher recorded
in this world's own directory are ever signalled.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from shardkv import Client
from shardkv.errors import ShardKVError
from shardkv.launcher.control import stop_cluster
from shardkv.launcher.state import Layout
from tests.worlds.ports import free_port

START_TIMEOUT_S = 30
SMALL_ENGINE = """
[engine]
memtable_bytes_max = 65536
block_cache_bytes = 65536
table_bytes_max = 65536
"""
"""A configuration under which a few thousand rows already flush and compact."""


class ClusterWorld:
    """One cluster in `directory`. Use `cluster_world`."""

    def __init__(self, directory: Path, *options: str, config: str = "") -> None:
        self.directory = directory
        self.data_dir = directory / "data"
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self._options = list(options)
        if config:
            path = directory / "config.toml"
            path.write_text(config)
            self._options += ["--config", str(path)]
        self._launcher: subprocess.Popen[bytes] | None = None
        self._output = directory / "launcher.out"

    def start(self) -> None:
        """`shardkv cluster up`, and wait until it serves."""
        command = [*shardkv("cluster", "up"), "--port", str(self.port), "--data-dir", str(self.data_dir)]
        with self._output.open("ab") as output:
            self._launcher = subprocess.Popen(
                [*command, *self._options], stdout=output, stderr=output, stdin=subprocess.DEVNULL
            )
        self.wait_serving()

    def wait_serving(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Until every shard answers a read."""
        end = time.monotonic() + timeout_s
        while True:
            try:
                with self.client(timeout=2) as db:
                    db.get_many([b"%d" % number for number in range(200)])
                    return
            except ShardKVError as error:
                if time.monotonic() > end or not self.launcher_lives:
                    raise AssertionError(f"not serving: {error}\n{self.output}\n{self.logs()}") from error
                time.sleep(0.02)

    @property
    def launcher_lives(self) -> bool:
        return self._launcher is not None and self._launcher.poll() is None

    @property
    def output(self) -> str:
        """What the launcher printed."""
        return self._output.read_text() if self._output.exists() else ""

    def logs(self) -> str:
        """The ends of all logs, for a failure's message."""
        files = sorted((self.data_dir / "logs").glob("*.log"))
        return "\n".join(f"--- {file.name}\n" + "\n".join(file.read_text().splitlines()[-12:]) for file in files)

    def client(self, **options: Any) -> Client:
        return Client(self.address, **options)

    def records(self) -> dict[str, dict[str, Any]]:
        """The launcher's record of each process, by name."""
        found = json.loads((self.data_dir / "run" / "processes.json").read_text())
        return {record["name"]: record for record in found["processes"]}

    def pid(self, name: str) -> int:
        pid: int = self.records()[name]["pid"]
        return pid

    def address_of(self, name: str) -> tuple[str, int]:
        """Host and port of a process's own, as soon as the launcher knows it."""
        until(lambda: self.records()[name]["address"], what=f"the address of {name}")
        host, _, port = self.records()[name]["address"].rpartition(":")
        return host, int(port)

    def kill(self, *names: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to processes by name; `launcher` is one of them."""
        pids = [self._launcher.pid if name == "launcher" and self._launcher else self.pid(name) for name in names]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if "launcher" in names and self._launcher is not None and number == signal.SIGKILL:
            self._launcher.wait(10)

    def status(self) -> dict[str, Any]:
        """`shardkv cluster status --json`."""
        found: dict[str, Any] = json.loads(self.run("cluster", "status", "--json", "--data-dir", str(self.data_dir)))
        return found

    def run(self, *arguments: str, check: bool = True) -> str:
        """Run a `shardkv` command against this cluster and return what it printed."""
        done = subprocess.run(
            shardkv(*arguments),
            env={**os.environ, "SHARDKV_ROUTER": self.address},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert not check or done.returncode == 0, f"exit code {done.returncode}: {done.stdout}\n{done.stderr}"
        return done.stdout

    def stop(self) -> int:
        """Ctrl-C, and the launcher's exit code."""
        assert self._launcher is not None
        self._launcher.send_signal(signal.SIGINT)
        return self._launcher.wait(30)

    def close(self) -> None:
        if self.launcher_lives:
            self.stop()
        with contextlib.suppress(ShardKVError):
            stop_cluster(Layout(self.data_dir), grace_s=10)


def shardkv(*arguments: str) -> list[str]:
    """The command line of a `shardkv` command, of this checkout."""
    return [sys.executable, "-m", "shardkv", *arguments]


@contextlib.contextmanager
def cluster_world(directory: Path, *options: str, config: str = "") -> Iterator[ClusterWorld]:
    """A running cluster; everything is stopped afterwards."""
    world = ClusterWorld(directory, *options, config=config)
    try:
        world.start()
        yield world
    finally:
        world.close()


def until(condition: Callable[[], object], *, timeout_s: float = 15, what: str = "") -> None:
    """Wait for a condition. Raises AssertionError after `timeout_s`."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not within {timeout_s} s: {what or condition}"
        time.sleep(0.01)
