"""The servers that are compared, each started for the run and stopped by pid at its end, come what may.

What "equal" means here:
  durability    redis: AOF with everysec or always, no snapshots. Ours: `interval` of 1 s, or `always`
  sharding      twemproxy (nutcracker) over two redis-servers; a router over two nodes, each with 8 shards
  processors    all processes of a contender may use the same cores, see `cluster.py`
Everything else is what each one has by default.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil

from shardkv.loadgen.cpu import cpu_s
from shardkv.loadgen.load import Server
from shardkv.metadata.client import MetaClient
from shardkv.topology.view import Topology
from shardkv.transport.address import parse_address
from shardkv.wire.hello import Identity
from tests.worlds.cluster import ClusterWorld
from tests.worlds.ports import free_port

HOST = "127.0.0.1"
REDIS, NUTCRACKER = "redis-server", "nutcracker"
START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 10.0
SYNC_INTERVAL_MS = 1000
QUIET_SHARE = 0.05
QUIET_STEP_S = 0.2
QUIET_TIMEOUT_S = 20.0
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Contender:
    """Running processes, and where they take requests."""

    server: Server
    pids: dict[str, int]
    """By name."""

    def pin(self, cores: Sequence[int]) -> None:
        """Keep every thread of every process, children included, on these cores."""
        for pid in self.pids.values():
            for one in [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]:
                for thread in os.listdir(f"/proc/{one}/task"):
                    with contextlib.suppress(ProcessLookupError):
                        os.sched_setaffinity(int(thread), cores)

    def settle(self) -> None:
        """Wait until its processes do next to nothing: what one run left to do must not slow down the next."""
        end = time.monotonic() + QUIET_TIMEOUT_S
        before, at = sum(map(cpu_s, self.pids.values())), time.monotonic()
        while time.monotonic() < end:
            time.sleep(QUIET_STEP_S)
            after, now = sum(map(cpu_s, self.pids.values())), time.monotonic()
            if after - before <= QUIET_SHARE * (now - at):
                return
            before, at = after, now


def missing(programs: Sequence[str]) -> str | None:
    """What to install before `programs` can take part; None when they are there."""
    for program in programs:
        if program == "redis-py" and importlib.util.find_spec("redis") is None:
            return "the redis client is not installed: pip install 'shardkv[bench]'"
        if program != "redis-py" and shutil.which(program) is None:
            return f"{program} is not installed: apt-get install {program}"
    return None


def versions() -> dict[str, str]:
    """Of what is installed, by name."""
    found = {}
    for name, command in ((REDIS, [REDIS, "--version"]), (NUTCRACKER, [NUTCRACKER, "--version"])):
        if shutil.which(name):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            words = (done.stdout + done.stderr).replace("v=", "").replace("nutcracker-", "").split()
            found[name] = next((word for word in words if word[0].isdigit()), "?")
    for module in ("redis", "hiredis"):
        if importlib.util.find_spec(module):
            found[f"{module} (PyPI)"] = importlib.import_module(module).__version__
    return found


@contextlib.contextmanager
def redis(directory: Path, appendfsync: str) -> Iterator[Contender]:
    """A redis-server with an append-only file."""
    with _redis(directory, appendfsync) as (port, pid):
        yield Contender(Server(protocol="redis", host=HOST, port=port), {REDIS: pid})


@contextlib.contextmanager
def twemproxy(directory: Path, appendfsync: str, servers: int) -> Iterator[Contender]:
    """nutcracker in front of so many redis-servers."""
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(_redis(directory / f"redis-{n}", appendfsync)) for n in range(1, servers + 1)]
        port, config = free_port(), directory / "nutcracker.yml"
        lines = [f"  listen: {HOST}:{port}", "  hash: fnv1a_64", "  distribution: ketama", "  redis: true"]
        lines += ["  preconnect: true", "  servers:", *(f"   - {HOST}:{one}:1" for one, _ in started)]
        config.write_text("\n".join(["bench:", *lines, ""]))
        command = [NUTCRACKER, "-c", str(config), "-o", str(directory / "nutcracker.log"), "-a", HOST]
        command += ["-s", str(free_port()), "-p", str(directory / "nutcracker.pid")]
        pid = stack.enter_context(_running(command, directory, port))
        pids = {"twemproxy": pid} | {f"redis-{n}": one for n, (_, one) in enumerate(started, 1)}
        yield Contender(Server(protocol="redis", host=HOST, port=port), pids)


@contextlib.contextmanager
def ours(
    directory: Path, durability: str, *, nodes: int, routers: int = 1, direct: bool = False
) -> Iterator[Contender]:
    """A cluster. `direct`: of one node, which is spoken to without the router."""
    directory.mkdir(parents=True)
    config = f'[engine]\ndurability = "{durability}"\nsync_interval_ms = {SYNC_INTERVAL_MS}\n'
    world = ClusterWorld(directory, "--nodes", str(nodes), "--routers", str(routers), config=config)
    try:
        world.start()
        records = world.records()
        pids = {name: record["pid"] for name, record in records.items() if record["role"] in ("router", "node")}
        server = Server(protocol="shardkv", host=HOST, port=world.port)
        if direct:
            meta = dict(pairwise(records["node-1"]["command"]))["--meta"]
            server, pids = asyncio.run(_node(meta)), {"node-1": pids["node-1"]}
        yield Contender(server, pids)
    finally:
        world.close()


async def _node(meta: str) -> Server:
    """The only node of the cluster with this metadata process."""
    client = MetaClient([meta], me=lambda: Identity("client", "bench"))
    client.start()
    try:
        entries = await client.read("")
    finally:
        await client.close()
    topology = Topology().with_entries(entries.revision, [(entry.key, entry.value) for entry in entries.entries])
    host, port = parse_address(topology.nodes["node-1"].address)
    shards = [shard for shard in topology.shards.values() if shard.keyspace == "default"]
    return Server(protocol="shardkv", host=host, port=port, shards=shards)


@contextlib.contextmanager
def _redis(directory: Path, appendfsync: str) -> Iterator[tuple[int, int]]:
    """Port and pid."""
    directory.mkdir(parents=True)
    port = free_port()
    command = [REDIS, "--port", str(port), "--bind", HOST, "--dir", str(directory), "--save", ""]
    command += ["--appendonly", "yes", "--appendfsync", appendfsync, "--logfile", str(directory / "log")]
    with _running(command, directory, port) as pid:
        yield port, pid


@contextlib.contextmanager
def _running(command: Sequence[str], directory: Path, port: int) -> Iterator[int]:
    """The pid of a program that takes connections; it ends with this block, at the latest with this process."""
    with (directory / f"{Path(command[0]).name}.out").open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
    try:
        _wait_listening(process, port, directory)
        yield process.pid
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait_listening(process: subprocess.Popen[bytes], port: int, directory: Path) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            socket.create_connection((HOST, port), timeout=1).close()
            return
        except OSError as error:
            if process.poll() is not None or time.monotonic() > end:
                logs = "\n".join(file.read_text(errors="replace")[-500:] for file in directory.glob("*[tg]"))
                raise SystemExit(f"{process.args} does not take connections: {error}.\n{logs}") from error
            time.sleep(0.02)
