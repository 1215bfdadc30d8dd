"""Machines with addresses of their own, in network namespaces: any number of hosts around one router, and links that
can be cut.

    hub         forwards between all; nothing else runs there
    NAME        a host, with the address 10.77.<number>.2 and a way to all others through the hub

Namespaces carry the number of this process in their names and everything else is inside them, so any number of tests
may run at the same time. Each host has its name, and knows those of the others.

Invariants: nothing outside the namespaces is changed; `close` removes them. Only root can make them, with `ip`:
otherwise the test is skipped with a sentence.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

CLONE_NEWNET = 0x40000000
HUB = "hub"
NOT_ALLOWED = ("Operation not permitted", "Permission denied", "Read-only file system")
"""What `ip` and `sysctl` say where root is not allowed everything, in many containers."""

_numbers = itertools.count(1)
"""Of the networks of this process."""
_libc = ctypes.CDLL(None, use_errno=True)


class Network:
    """Use `network`."""

    def __init__(self, directory: Path, hosts: Sequence[str]) -> None:
        self._prefix = f"shardkv-{os.getpid()}-{next(_numbers)}-"
        self._made: list[str] = []
        self.addresses = {host: f"10.77.{number}.2" for number, host in enumerate(hosts, 1)}
        self._etc_hosts = directory / "hosts"
        names = [f"{address} {host}" for host, address in self.addresses.items()]
        self._etc_hosts.write_text("\n".join(["127.0.0.1 localhost", *names, ""]))

    def make(self) -> None:
        self._add_namespace(HUB)
        _ip("netns", "exec", self._prefix + HUB, "sysctl", "-q", "-w", "net.ipv4.ip_forward=1")
        for number, host in enumerate(self.addresses, 1):
            self._add_namespace(host)
            hub, there = self._prefix + HUB, self._prefix + host
            _ip("-n", hub, "link", "add", _link(number), "type", "veth", "peer", "name", "eth0", "netns", there)
            _ip("-n", hub, "address", "add", f"10.77.{number}.1/24", "dev", _link(number))
            _ip("-n", hub, "link", "set", _link(number), "up")
            _ip("-n", there, "address", "add", f"{self.addresses[host]}/24", "dev", "eth0")
            _ip("-n", there, "link", "set", "eth0", "up")
            _ip("-n", there, "route", "add", "default", "via", f"10.77.{number}.1")

    def _add_namespace(self, name: str) -> None:
        self._made.append(name)
        _ip("netns", "add", self._prefix + name)
        _ip("-n", self._prefix + name, "link", "set", "lo", "up")

    def close(self) -> None:
        """Remove all of it. Requires: what ran in it has ended."""
        while self._made:
            subprocess.run(["ip", "netns", "delete", self._prefix + self._made.pop()], check=False, capture_output=True)

    # Being there

    def command(self, host: str, *arguments: str) -> list[str]:
        """The command line that runs `arguments` on a host; the process it becomes is the one that was started."""
        named = f'echo {host} >/proc/sys/kernel/hostname && mount --bind {self._etc_hosts} /etc/hosts && exec "$@"'
        return [
            "nsenter",
            f"--net={self._path(host)}",
            "unshare",
            "--mount",
            "--uts",
            "sh",
            "-c",
            named,
            "sh",
            *arguments,
        ]

    @contextmanager
    def inside(self, host: str) -> Iterator[None]:
        """Sockets that this thread makes meanwhile, and threads it starts, are on that host."""
        home, there = (os.open(path, os.O_RDONLY) for path in ("/proc/thread-self/ns/net", self._path(host)))
        try:
            _enter(there)
            try:
                yield
            finally:
                _enter(home)
        finally:
            os.close(home)
            os.close(there)

    def _path(self, host: str) -> str:
        return f"/run/netns/{self._prefix}{host}"

    # Cutting

    def cut(self, host: str) -> None:
        """From now on nothing reaches the host or comes from it, and nobody is told."""
        self._rule("add", "iif", _link(self._number(host)))
        self._rule("add", "to", self.addresses[host])

    def mend(self, host: str) -> None:
        self._rule("delete", "iif", _link(self._number(host)))
        self._rule("delete", "to", self.addresses[host])

    def part(self, one: str, other: str) -> None:
        """From now on these two do not reach each other; all others reach both."""
        self._rule("add", "from", self.addresses[one], "to", self.addresses[other])
        self._rule("add", "from", self.addresses[other], "to", self.addresses[one])

    def join(self, one: str, other: str) -> None:
        self._rule("delete", "from", self.addresses[one], "to", self.addresses[other])
        self._rule("delete", "from", self.addresses[other], "to", self.addresses[one])

    def unplug(self, host: str) -> None:
        """As a cable that is pulled: the hub tells whoever sends to the host that there is no way."""
        _ip("-n", self._prefix + HUB, "link", "set", _link(self._number(host)), "down")

    def plug(self, host: str) -> None:
        _ip("-n", self._prefix + HUB, "link", "set", _link(self._number(host)), "up")

    def _rule(self, what: str, *which: str) -> None:
        _ip("-n", self._prefix + HUB, "rule", what, "priority", "10", *which, "type", "blackhole")

    def _number(self, host: str) -> int:
        return list(self.addresses).index(host) + 1


def _link(number: int) -> str:
    """The hub's end of the cable to host `number`."""
    return f"host{number}"


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


def _enter(namespace: int) -> None:
    if _libc.setns(namespace, CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def need_namespaces() -> None:
    """Skip the test where network namespaces cannot be made."""
    if os.geteuid() != 0:
        pytest.skip("hosts are network namespaces, and only root can make them")
    missing = [tool for tool in ("ip", "nsenter", "unshare", "sysctl") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"hosts are network namespaces, and {', '.join(missing)} is not installed; on Debian: iproute2")


@contextmanager
def network(directory: Path, hosts: Sequence[str]) -> Iterator[Network]:
    """Hosts that reach each other; removed afterwards. Skips the test where that cannot be."""
    need_namespaces()
    made = Network(directory, hosts)
    try:
        try:
            made.make()
        except AssertionError as error:
            if any(problem in str(error) for problem in NOT_ALLOWED):
                pytest.skip(f"hosts are network namespaces, and they cannot be made here: {error}")
            raise
        yield made
    finally:
        made.close()
