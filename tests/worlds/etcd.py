"""A real etcd on loopback, one member or several, in a directory of its own.

Invariant: `close` leaves no process behind; only processes started here are ever signalled. Where etcd is not
installed the test is skipped with a sentence.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from shardkv.launcher.ports import free_port

START_TIMEOUT_S = 30
HOST = "127.0.0.1"
PORTS = (10_000, 19_000)
"""Below those that the system gives to connecting sockets, so that a member that was stopped finds its ports free."""


class EtcdWorld:
    """Members named by number, from 0. Use `etcd_world`."""

    def __init__(self, directory: Path, members: int = 1) -> None:
        self.directory = directory
        ports: list[int] = []
        while len(ports) < 2 * members:
            port = free_port(HOST, near=random.randint(*PORTS))
            if port not in ports:
                ports.append(port)
        self.clients, self.peers = ports[:members], ports[members:]
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    @property
    def endpoints(self) -> str:
        """As in etcd://ENDPOINTS/name."""
        return ",".join(f"127.0.0.1:{port}" for port in self.clients)

    def start(self, *members: int) -> None:
        """Start these members, or all, and wait until they serve."""
        chosen = members or range(len(self.clients))
        for member in chosen:
            self._start(member)
        end = time.monotonic() + START_TIMEOUT_S
        for member in chosen:
            while not self._healthy(member):
                assert time.monotonic() < end, self.log(member)
                assert self._processes[member].poll() is None, self.log(member)
                time.sleep(0.02)

    def _start(self, member: int) -> None:
        everybody = ",".join(f"m{number}=http://127.0.0.1:{port}" for number, port in enumerate(self.peers))
        client, peer = (f"http://127.0.0.1:{port}" for port in (self.clients[member], self.peers[member]))
        command = ["etcd", "--name", f"m{member}", "--data-dir", str(self.directory / f"m{member}")]
        command += ["--listen-client-urls", client, "--advertise-client-urls", client]
        command += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
        command += ["--initial-cluster", everybody, "--logger", "zap", "--log-level", "warn"]
        with self._log_file(member).open("ab") as output:
            self._processes[member] = subprocess.Popen(
                command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, cwd=self.directory
            )

    def _healthy(self, member: int) -> bool:
        with suppress(OSError, ValueError), urllib.request.urlopen(self._url(member, "/health"), timeout=1) as answer:
            return bool(json.load(answer)["health"] == "true")
        return False

    def compact(self) -> None:
        """Forget all history but the newest."""
        newest = int(self._post("/v3/kv/range", {"key": "AA=="})["header"]["revision"])
        self._post("/v3/kv/compaction", {"revision": newest, "physical": True})

    def _post(self, path: str, body: dict[str, object]) -> dict[str, dict[str, str]]:
        with urllib.request.urlopen(self._url(0, path), data=json.dumps(body).encode(), timeout=5) as answer:
            told: dict[str, dict[str, str]] = json.load(answer)
            return told

    def _url(self, member: int, path: str) -> str:
        return f"http://127.0.0.1:{self.clients[member]}{path}"

    def kill(self, *members: int) -> None:
        """kill -9 these members, or all that run, and wait until they are gone."""
        for member in members or list(self._processes):
            process = self._processes.pop(member)
            process.kill()
            process.wait()

    def signal(self, member: int, number: signal.Signals) -> None:
        self._processes[member].send_signal(number)

    def log(self, member: int) -> str:
        return self._log_file(member).read_text()

    def _log_file(self, member: int) -> Path:
        return self.directory / f"m{member}.log"


@contextmanager
def etcd_world(directory: Path, members: int = 1) -> Iterator[EtcdWorld]:
    """A running etcd; the test is skipped where there is none to run."""
    if shutil.which("etcd") is None:
        pytest.skip("etcd is not installed; on Debian: apt install etcd-server")
    directory.mkdir(parents=True, exist_ok=True)
    world = EtcdWorld(directory, members)
    try:
        world.start()
        yield world
    finally:
        world.kill()
