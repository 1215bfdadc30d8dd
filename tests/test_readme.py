"""The README's tutorial, run command by command: what it shows is what is printed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.worlds.cluster import ClusterWorld, cluster_world

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "shardkv/wire/PROTOCOL.md"]

TUTORIAL = ROOT / "docs" / "tutorial"
PYTHON_BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)

NOT_RUN = ("$ . .venv/bin/activate", "$ pip install")
"""The environment of the test run is used as it is."""


def steps() -> Iterator[tuple[str, str]]:
    """(command, output) of every console block: `$ ` starts a command, `> ` continues it."""
    for block in re.findall(r"^```console\n(.*?)^```", README, re.M | re.S):
        for part in re.split(r"^(?=\$ )", block, flags=re.M):
            if part and not part.startswith(NOT_RUN):
                lines = part.splitlines()
                command = [line[2:] for line in lines if line.startswith(("$ ", "> ")) or line == ">"]
                output = [line for line in lines if not line.startswith(("$ ", "> ")) and line != ">"]
                yield "\n".join(command), "\n".join(output)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterWorld]:
    with cluster_world(tmp_path_factory.mktemp("readme")) as running:
        yield running


def test_the_tutorial_prints_what_it_shows(world: ClusterWorld, tmp_path: Path) -> None:
    binaries = Path(sys.executable).parent
    scripts = tmp_path / "docs" / "tutorial"
    shutil.copytree(TUTORIAL, scripts)
    for script in scripts.glob("*.py"):
        script.write_text(script.read_text().replace("127.0.0.1:7400", world.address))
    environment = {**os.environ, "SHARDKV_ROUTER": world.address, "PATH": f"{binaries}:{os.environ['PATH']}"}
    seen = 0
    for command, output in steps():
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.stdout.strip() == output.strip(), command
        seen += 1
    assert seen >= 10


def test_the_embedded_example_runs(tmp_path: Path) -> None:
    (code,) = (block for block in PYTHON_BLOCKS if "Engine" in block)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[(b'key', b'value')]"


@pytest.mark.parametrize("script", sorted(TUTORIAL.glob("*.py")), ids=lambda path: path.name)
def test_the_scripts_shown_are_the_scripts_shipped(script: Path) -> None:
    assert script.read_text(encoding="utf-8") in PYTHON_BLOCKS


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), f"{document.name} links to {target}, which is not there"
