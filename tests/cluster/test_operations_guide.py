"""The operations guide's sessions, typed in one after the other: every command works, and prints what is shown.

`...` stands for anything, also for whole lines. The units for systemd call the programs with options they have.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

import click
import pytest

from shardkv.cli.main import cli
from shardkv.topology.documents import ControllerSettings
from tests.worlds.cluster import cluster_world

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
UNITS = sorted((ROOT / "configs" / "systemd").rglob("*.service"))


def steps() -> Iterator[tuple[str, str]]:
    """(command, what it is shown to print)."""
    for block in re.findall(r"^```console\n(.*?)^```", GUIDE, re.M | re.S):
        for part in re.split(r"^(?=\$ )", block, flags=re.M):
            if part:
                command, _, output = part.partition("\n")
                yield command.removeprefix("$ "), output


def matches(shown: str, printed: str) -> bool:
    """Whether what was printed is as shown, spaces aside."""
    pattern = r"\s+".join(map(re.escape, shown.split())).replace(r"\.\.\.", ".*?")
    pattern = re.sub(r"(\\s\+)?\.\*\?(\\s\+)?", r"\\s*.*?\\s*", pattern)
    return re.fullmatch(pattern, printed.strip(), re.S) is not None


def test_the_sessions_of_the_guide_are_true(tmp_path: Path) -> None:
    binaries = Path(sys.executable).parent
    with cluster_world(tmp_path, "--nodes", "3") as world:
        with world.client(timeout=30) as db:
            db.put_many({f"user:{number}": "x" * 500 for number in range(2000)})
        environment = {**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}", "SHARDKV_ROUTER": world.address}
        (tmp_path / "shardkv-data").symlink_to(world.data_dir)
        seen = 0
        for command, shown in steps():
            done = subprocess.run(
                ["bash", "-c", command],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                timeout=100,
                check=False,
            )
            assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
            assert matches(shown, done.stdout), f"{command} printed\n{done.stdout}"
            seen += 1
        assert seen >= 15
        with world.client(timeout=30) as db:
            assert db.count(prefix="user:") == 2000


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_the_units_call_programs_with_options_they_have(unit: Path) -> None:
    parser = ConfigParser(interpolation=None, strict=False)
    parser.read(unit)
    program, *arguments = shlex.split(parser["Service"]["ExecStart"].replace("%i", "node-1"))
    assert program == "/opt/shardkv/bin/shardkv"
    command: click.Command = cli
    context = click.Context(cli)
    while isinstance(command, click.Group):
        found = command.get_command(context, arguments.pop(0))
        assert found is not None
        command = found
    command.make_context("run", arguments)


def test_every_setting_is_explained() -> None:
    for field in ControllerSettings.__struct_fields__:
        assert f"`{field}`" in GUIDE, field
