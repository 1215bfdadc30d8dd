"""run_cluster.sh with every Python a machine may have: none, an old one, one without venv, one that works."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "run_cluster.sh"
NEEDED = ("sh", "dirname", "cksum", "cat", "tee", "mkdir", "chmod", "cp")

NEW_PYTHON = """#!/bin/sh
echo "python3 $*" >> "{log}"
case "$1 $2" in
    "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
    "-m pip") printf '#!/bin/sh\\necho "shardkv $*"\\n' > "{root}/.venv/bin/shardkv"
              chmod +x "{root}/.venv/bin/shardkv" ;;
esac
"""


class Machine:
    """A checkout, and a PATH with a few basic tools and a python3 of the test's choice."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "check out"
        self.path = directory / "bin"
        self.log = directory / "python.log"
        for made in (self.root, self.path):
            made.mkdir()
        shutil.copy(SCRIPT, self.root)
        (self.root / "pyproject.toml").write_text("first")
        for tool in NEEDED:
            found = shutil.which(tool)
            assert found
            (self.path / tool).symlink_to(found)

    def python(self, script: str) -> None:
        (self.path / "python3").write_text(script.format(log=self.log, root=self.root))
        (self.path / "python3").chmod(0o755)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": str(self.path)}
        command = [str(self.path / "sh"), str(self.root / "run_cluster.sh"), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20, check=False)

    def installs(self) -> int:
        return self.log.read_text().count("-m pip install")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize(
    ("python", "said"),
    [
        (None, "python3 was not found. Install Python 3.11 or newer; on Debian: apt install python3 python3-venv"),
        ('#!/bin/sh\ncase "$1" in -V) echo Python 3.9.2 ;; *) exit 1 ;; esac\n', "Python 3.9.2 is too old"),
        ('#!/bin/sh\ncase "$2" in *ensurepip*) exit 1 ;; esac\n', "On Debian: apt install python3-venv"),
        ('#!/bin/sh\ncase "$2" in venv) exit 1 ;; esac\n', "The environment could not be made"),
    ],
)
def test_a_python_that_will_not_do_is_one_sentence(machine: Machine, python: str | None, said: str) -> None:
    if python is not None:
        machine.python(python)
    done = machine.run()
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1]
    assert done.stdout == ""


def test_the_second_run_is_quiet_and_installs_nothing(machine: Machine) -> None:
    machine.python(NEW_PYTHON)
    first = machine.run("--nodes", "1")
    assert (first.returncode, first.stdout) == (0, "shardkv cluster up --nodes 1\n")
    second = machine.run("--port", "7500")
    assert (second.stdout, second.stderr) == ("shardkv cluster up --port 7500\n", "")
    assert machine.installs() == 1


def test_changed_dependencies_are_installed(machine: Machine) -> None:
    machine.python(NEW_PYTHON)
    machine.run()
    (machine.root / "pyproject.toml").write_text("second")
    machine.run()
    assert machine.installs() == 2
