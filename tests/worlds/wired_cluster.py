"""A cluster whose every link runs through a proxy: client to router, router to node, both to the metadata process.

Each process is started by itself, as with systemd, and advertises its proxy's address. Nothing is started again but
by `restart`.

Invariant: only processes started here are signalled, and `close` ends them all, also stopped ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

from shardkv import Client
from shardkv.errors import ShardKVError
from shardkv.launcher.ports import free_port
from tests.worlds.proxy import Proxy

T = TypeVar("T")
HOST = "127.0.0.1"
PORTS = (20_000, 32_000)
"""Below those that the system gives to connecting sockets: a proxy that keeps trying a dead port must not meet
itself."""
SERVING_TIMEOUT_S = 30


class Wires:
    """Proxies on an event loop of their own, in a thread; to be used from any other thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._proxies: list[Proxy] = []

    def add(self, port: int) -> Proxy:
        """A proxy of 127.0.0.1:`port`."""
        proxy = Proxy((HOST, port))
        self._await(proxy.start())
        self._proxies.append(proxy)
        return proxy

    def do(self, command: Callable[[], T]) -> T:
        """Run a proxy's command where it belongs."""

        async def run() -> T:
            return command()

        return self._await(run())

    def close(self) -> None:
        for proxy in self._proxies:
            self._await(proxy.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _await(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)


class WiredCluster:
    """Use `wired_cluster`. Processes, and their proxies, are called `meta`, `router-1`, `node-1` and so on."""

    def __init__(self, directory: Path, *, partition: str, nodes: int, routers: int, config: str) -> None:
        self.directory = directory
        self.wires = Wires()
        self.nodes = [f"node-{number}" for number in range(1, nodes + 1)]
        self.routers = [f"router-{number}" for number in range(1, routers + 1)]
        self._config = directory / "config.toml"
        self._config.write_text(config)
        ports = {name: _port() for name in ["meta", *self.nodes, *self.routers]}
        self.proxies = {name: self.wires.add(port) for name, port in ports.items()}
        self.meta_links: dict[str, list[Proxy]] = {}
        """By node or router, if `split_meta_links`: its links to the metadata processes."""
        self._metas_known = self.proxies["meta"].address
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        meta = ["shardkv", "meta", "run", "--nodes", str(nodes), "--partition", partition, "--shards", str(2 * nodes)]
        self._commands = {"meta": [*meta, "--data-dir", str(directory / "meta"), "--port", str(ports["meta"])]}
        for name in self.nodes:
            kept = ["--data-dir", str(directory / name)]
            self._commands[name] = self._command("shardkv_node", name, ports, kept)
        for name in self.routers:
            self._commands[name] = self._command("shardkv_router", name, ports, [])

    def _command(self, program: str, name: str, ports: dict[str, int], more: list[str]) -> list[str]:
        where = ["--port", str(ports[name]), "--advertise", self.proxies[name].address]
        return [program, "run", "--name", name, "--meta", self.proxies["meta"].address, *where, *more]

    def split_meta_links(self) -> None:
        """Give every node and router links of its own to the metadata processes, in `meta_links`. Before `start`."""
        for name in [*self.nodes, *self.routers]:
            self._split_meta_links(name)

    def _split_meta_links(self, name: str) -> None:
        command = self._commands[name]
        at = command.index("--meta") + 1
        links = [self.wires.add(int(address.rpartition(":")[2])) for address in command[at].split(",")]
        command[at] = ",".join(link.address for link in links)
        self.meta_links[name] = links

    def run_instead(self, program: str, *other: str) -> None:
        """Start another program, given these arguments first, where this one would be. Before `start`."""
        for command in self._commands.values():
            if command[0] == program:
                command[:1] = other

    def add_node(self, name: str) -> None:
        """Start one more node, as its operator would."""
        port = _port()
        self.proxies[name] = self.wires.add(port)
        command = self._command("shardkv_node", name, {name: port}, ["--data-dir", str(self.directory / name)])
        command[command.index("--meta") + 1] = self._metas_known
        self._commands[name] = command
        if self.meta_links:
            self._split_meta_links(name)
        self.restart(name)
        self.nodes.append(name)

    def add_process(self, name: str, *, like: str, data_dir: Path) -> None:
        """Start a second process of a node's name, on another directory and port."""
        command = list(self._commands[like])
        command[command.index("--data-dir") + 1] = str(data_dir)
        command[command.index("--port") + 1] = str(_port())
        self._commands[name] = command
        self.restart(name)

    def retire_node(self, name: str) -> None:
        """End a node for good."""
        self.nodes.remove(name)
        self.signal(name, signal.SIGTERM)
        self._processes[name].wait(30)

    @property
    def addresses(self) -> list[str]:
        """Of the routers, as clients reach them."""
        return [self.proxies[name].address for name in self.routers]

    def client(self, **options: Any) -> Client[bytes]:
        return Client(self.addresses, **options)

    def start(self) -> None:
        for name in self._commands:
            self.restart(name)
        self.wait_serving()

    def restart(self, name: str, **environment: str) -> None:
        """Start a process that does not run, with these variables besides those of this process."""
        assert name not in self._processes or self._processes[name].poll() is not None
        command = [sys.executable, "-P", "-m", *self._commands[name], "--config", str(self._config)]
        with (self.directory / f"{name}.out").open("ab") as output:
            self._processes[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env={**os.environ, **environment}
            )

    def pid(self, name: str) -> int:
        return self._processes[name].pid

    def runs(self, name: str) -> bool:
        return self._processes[name].poll() is None

    def signal(self, name: str, number: signal.Signals) -> None:
        self._processes[name].send_signal(number)

    def kill(self, name: str) -> None:
        """kill -9, and wait for the end."""
        self._processes[name].kill()
        self._processes[name].wait(10)

    def heal(self) -> None:
        """No more faults on any link; links that lost bytes stay mute until `cut`."""
        for proxy in self.links:
            self.wires.do(proxy.heal)

    @property
    def links(self) -> list[Proxy]:
        return [*self.proxies.values(), *(link for links in self.meta_links.values() for link in links)]

    def wait_serving(self, timeout_s: float = SERVING_TIMEOUT_S) -> None:
        """Until every shard answers a read through every router."""
        end = time.monotonic() + timeout_s
        for name in self.routers:
            while True:
                try:
                    with Client(self.proxies[name].address, timeout=2) as db:
                        db.get_many([b"%c-%d" % (byte, number) for byte in b"0aeimquy" for number in range(20)])
                        break
                except ShardKVError as error:
                    assert time.monotonic() < end, f"not serving: {error}\n{self.logs()}"
                    time.sleep(0.02)

    def logs(self) -> str:
        """The ends of what all processes printed, for a failure's message."""
        files = sorted(self.directory.glob("*.out"))
        return "\n".join(f"--- {file.name}\n" + "\n".join(file.read_text().splitlines()[-12:]) for file in files)

    def close(self) -> None:
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        for process in self._processes.values():
            process.wait(10)
        self.wires.close()


def _port() -> int:
    return free_port(HOST, near=random.randint(*PORTS))


@contextlib.contextmanager
def wired_cluster(
    directory: Path, *, partition: str, nodes: int = 3, routers: int = 2, config: str = ""
) -> Iterator[WiredCluster]:
    """A running cluster; everything is stopped afterwards."""
    world = WiredCluster(directory, partition=partition, nodes=nodes, routers=routers, config=config)
    try:
        world.start()
        yield world
    finally:
        world.close()
