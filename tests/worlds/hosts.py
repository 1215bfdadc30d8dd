"""A cluster on several machines (network namespaces), started as docs/several-machines.md says: by the units of
configs/systemd/several-machines, with configs/several-machines.toml, on etcd.

Hosts are called host-1, host-2 and so on, and `client`, where the test itself is while the world lasts. Processes are
called as their units' instances: etcd-1, meta-2, node-3, router-1; each runs on the host of its number, unless it was
started on another. Each host has a directory that stands for its disk; no other host looks into it.

Invariant: as of Network; only processes started here are signalled, and `close` ends them all.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from shardkv import Admin, Client
from shardkv.errors import ShardKVError
from shardkv.launcher.readiness import ask
from shardkv.wire.messages import NOTHING, Op, decode_any
from tests.worlds.cluster import until
from tests.worlds.network import Network, network

CONFIGS = Path(__file__).parents[2] / "configs"
CLIENT = "client"
ROUTER_PORT, META_PORT, NODE_PORT, ETCD_PORT = 7400, 7401, 7402, 2379
SERVING_TIMEOUT_S = 40
MORE_CONFIG = """
[engine]
memtable_bytes_max = 262144
block_cache_bytes = 1048576
table_bytes_max = 131072
"""
"""A few thousand rows already flush and compact."""


class Hosts:
    """Use `hosts_world`."""

    def __init__(
        self, directory: Path, net: Network, *, etcds: int, metas: int, nodes: int, routers: Sequence[int]
    ) -> None:
        self.directory = directory
        self.net = net
        self.hosts = [host for host in net.addresses if host != CLIENT]
        self.etcds = [f"etcd-{number}" for number in range(1, etcds + 1)]
        self.metas = [f"meta-{number}" for number in range(1, metas + 1)]
        self.nodes = [f"node-{number}" for number in range(1, nodes + 1)]
        self.routers = [f"router-{number}" for number in routers]
        self.meta_names: list[str] = []
        """What --meta says; empty: their addresses."""
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._commands: dict[str, tuple[str, list[str], dict[str, str]]] = {}
        """Host, command line and variables of each process, for `restart`."""
        self._stop_at: dict[str, str] = {}
        for host in self.hosts:
            (directory / host / "etc").mkdir(parents=True)
            (directory / host / "etc" / "shardkv.toml").write_text(self._config() + MORE_CONFIG)

    def _config(self) -> str:
        """The configuration of the guide, with this world's addresses and number of etcd members."""
        text = (CONFIGS / "several-machines.toml").read_text()
        known = text.split('"etcd://')[1].split("/")[0]
        ours = [f"{self.address(etcd)}:{ETCD_PORT}" for etcd in self.etcds]
        return text.replace(known, ",".join(ours)).replace("lease_ms = 5_000", "lease_ms = 2_000")

    # Where things are

    def host_of(self, name: str) -> str:
        if name in self._commands:
            return self._commands[name][0]
        return f"host-{name.rpartition('-')[2]}"

    def address(self, name: str) -> str:
        """Of the host that a process is on."""
        return self.net.addresses[self.host_of(name)]

    @property
    def addresses(self) -> list[str]:
        """Of the routers."""
        return [f"{self.address(name)}:{ROUTER_PORT}" for name in self.routers]

    @property
    def meta_addresses(self) -> list[str]:
        return [f"{self.address(name)}:{META_PORT}" for name in self.metas]

    def client(self, **options: Any) -> Client[bytes]:
        return Client(self.addresses, **options)

    def admin(self, **options: Any) -> Admin:
        return Admin(self.addresses, **options)

    # Starting

    def start(self, *, stop_at: Mapping[str, str] | None = None) -> None:
        """etcd first, then the others in any order: they wait for each other. `stop_at`: the step at which a node
        stops by itself (shardkv_node.changes.stops), by name."""
        self._stop_at = dict(stop_at or {})
        for name in self.etcds:
            self.start_etcd(name)
        for name in [*self.routers, *self.nodes, *self.metas]:
            self.start_unit(name)
        self.wait_serving()

    def start_unit(self, name: str, *more: str, host: str | None = None, **changed: str) -> None:
        """As `systemctl start shardkv-<role>@<name>` does. `changed`: options that stand differently in the unit;
        `more`: what stands there besides."""
        host = host or self.host_of(name)
        variables = {"ADDRESS": self.net.addresses[host], "META": ",".join(self.meta_names or self.meta_addresses)}
        words = shlex.split(exec_start(name.partition("-")[0]).replace("%i", name))
        for variable, value in variables.items():
            words = [word.replace(f"${{{variable}}}", value) for word in words]
        for option, value in changed.items():
            words[words.index(f"--{option}") + 1] = value
        assert not [word for word in words if "$" in word], words
        self.start_command(name, [*words, *more], host=host)

    def start_command(self, name: str, words: Sequence[str], *, host: str) -> None:
        """Run a `shardkv` command on a host, as a process called `name`; its paths are that host's."""
        assert words[0].rpartition("/")[2] == "shardkv", words
        there = [self._path(host, word) for word in words[1:]]
        variables = {"SHARDKV_STOP_AT": self._stop_at[name]} if name in self._stop_at else {}
        self._commands[name] = (host, [sys.executable, "-P", "-m", "shardkv", *there], variables)
        self.restart(name)

    def start_etcd(self, name: str) -> None:
        host = self.host_of(name)
        settings = etcd_settings(name, {f"10.0.0.{etcd[-1]}": self.address(etcd) for etcd in self.etcds})
        settings["ETCD_DATA_DIR"] = str(self.directory / host / "etcd")
        settings["ETCD_LOG_LEVEL"] = "warn"
        self._commands[name] = (host, ["etcd", "--logger", "zap"], settings)
        self.restart(name)

    def _path(self, host: str, word: str) -> str:
        disk = self.directory / host
        return word.replace("/var/lib/shardkv", str(disk / "data")).replace("/etc/shardkv", str(disk / "etc"))

    def restart(self, name: str) -> None:
        """Start a process that does not run, as it was started before."""
        assert name not in self._processes or self._processes[name].poll() is not None
        host, command, variables = self._commands[name]
        with (self.directory / f"{name}.out").open("ab") as output:
            self._processes[name] = subprocess.Popen(
                self.net.command(host, *command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **variables},
                cwd=self.directory,
            )

    def carry_disk(self, old: str, new: str) -> None:
        """Put one host's disk into another. Requires: nothing uses either."""
        shutil.move(self.directory / old / "data", self.directory / new / "data")

    # Ending

    def kill(self, *names: str) -> None:
        """kill -9, and wait for the end."""
        for name in names:
            self._processes[name].kill()
        for name in names:
            self._processes[name].wait(10)

    def stop(self, name: str) -> int:
        """As `systemctl stop`; the exit code."""
        self._processes[name].send_signal(signal.SIGTERM)
        return self._processes[name].wait(30)

    def signal(self, name: str, number: signal.Signals) -> None:
        self._processes[name].send_signal(number)

    def runs(self, name: str) -> bool:
        return self._processes[name].poll() is None

    def is_stopped(self, name: str) -> bool:
        return psutil.Process(self._processes[name].pid).status() == psutil.STATUS_STOPPED

    def exit_code(self, name: str) -> int:
        """Of a process that ends by itself."""
        return self._processes[name].wait(20)

    def on(self, host: str) -> list[str]:
        """The processes that run on a host."""
        return [name for name in self._processes if self.host_of(name) == host and self.runs(name)]

    def close(self) -> None:
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        for process in self._processes.values():
            process.wait(10)

    # Asking

    def run(self, *arguments: str, check: bool = True) -> str:
        """Run a `shardkv` command where the client is, and return what it printed."""
        return self._python("-m", "shardkv", *arguments, check=check)

    def python(self, program: str) -> None:
        """Run a program where the client is. The test's own process is there, too, but knows no host by its name."""
        self._python("-c", program)

    def _python(self, *arguments: str, check: bool = True) -> str:
        done = subprocess.run(
            self.net.command(CLIENT, sys.executable, *arguments),
            env={**os.environ, "SHARDKV_ROUTER": ",".join(self.addresses)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert not check or done.returncode == 0, f"exit code {done.returncode}: {done.stdout}\n{done.stderr}"
        return done.stdout

    def wait_serving(self, *routers: str, timeout_s: float = SERVING_TIMEOUT_S) -> None:
        """Until every shard answers a read through each of these routers, or all."""
        end = time.monotonic() + timeout_s
        for name in routers or self.routers:
            while True:
                try:
                    with Client(f"{self.address(name)}:{ROUTER_PORT}", timeout=2) as db:
                        db.get_many([b"%d" % number for number in range(400)])
                        break
                except ShardKVError as error:
                    assert time.monotonic() < end, f"not serving: {error}"
                    time.sleep(0.05)

    def leader(self) -> str | None:
        """The metadata process that controls the cluster, as the first one that answers knows it."""
        for address in self.meta_addresses:
            with contextlib.suppress(ShardKVError):
                status: dict[str, Any] = decode_any(ask(address, [(Op.STATUS, NOTHING)], timeout_s=1)[0])
                return status["leader"]["name"] if status["leader"] else None
        return None

    def etcd_leader(self) -> str:
        """The member that leads, as its metrics say."""
        found: list[str] = []

        def look() -> bool:
            for name in self.etcds:
                with contextlib.suppress(OSError):
                    url = f"http://{self.address(name)}:{ETCD_PORT}/metrics"
                    if "\netcd_server_is_leader 1\n" in urllib.request.urlopen(url, timeout=1).read().decode():
                        found.append(name)
            return bool(found)

        until(look, what="an etcd that leads")
        return found[0]

    def logs(self) -> str:
        """The ends of what all processes printed, for a failure's message."""
        files = sorted(self.directory.glob("*.out"))
        return "\n".join(f"--- {file.name}\n" + "\n".join(file.read_text().splitlines()[-15:]) for file in files)


def exec_start(role: str) -> str:
    """The command line of a role's unit."""
    lines = (CONFIGS / "systemd" / "several-machines" / f"shardkv-{role}@.service").read_text().splitlines()
    (found,) = [line.removeprefix("ExecStart=") for line in lines if line.startswith("ExecStart=")]
    return found


def etcd_settings(name: str, addresses: Mapping[str, str]) -> dict[str, str]:
    """What the guide puts into /etc/default/etcd, for member `name`; `addresses`: of the guide's members, ours."""
    own = addresses[f"10.0.0.{name[-1]}"]
    found = {}
    for line in (CONFIGS / "systemd" / "several-machines" / "etcd.env").read_text().splitlines():
        key, equals, value = line.partition("=")
        if key == "ETCD_INITIAL_CLUSTER":
            members = dict(member.split("=") for member in value.split(","))
            ours = [f"etcd-{guide[-1]}=http://{address}:2380" for guide, address in addresses.items()]
            assert {f"etcd-{guide[-1]}" for guide in addresses} <= members.keys()
            found[key] = ",".join(ours)
        elif equals and not key.startswith("#"):
            found[key] = value.replace("10.0.0.1", own).replace("etcd-1", name)
    return found


@contextlib.contextmanager
def hosts_world(
    directory: Path, *, hosts: int = 3, etcds: int = 1, metas: int = 2, nodes: int = 3, routers: Sequence[int] = (1, 2)
) -> Iterator[Hosts]:
    """A cluster of which nothing runs yet, the test being on host `client`; everything is removed afterwards."""
    if shutil.which("etcd") is None:
        pytest.skip("etcd is not installed; on Debian: apt install etcd-server")
    with network(directory, [*(f"host-{number}" for number in range(1, hosts + 1)), CLIENT]) as net:
        world = Hosts(directory, net, etcds=etcds, metas=metas, nodes=nodes, routers=routers)
        try:
            with net.inside(CLIENT):
                yield world
        except BaseException as error:
            error.add_note(world.logs())
            raise
        finally:
            world.close()
