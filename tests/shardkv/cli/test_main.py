"""The command line as a whole: finding commands, help, options, exit codes."""

from __future__ import annotations

import subprocess
import sys

import click
import pytest

from shardkv.cli.main import COMMANDS, cli


def tree(command: click.Command, path: tuple[str, ...] = ()):
    yield path
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            yield from tree(command.get_command(context, name), (*path, name))


@pytest.mark.parametrize("path", list(tree(cli)), ids=" ".join)
def test_every_help_has_an_example_and_ends_well(path, run):
    done = run(*path, "--help")
    assert done.code == 0
    assert "Example" in done.out.decode()
    assert "shardkv" in done.out.decode()


def test_help_lists_every_command(run):
    lines = run("--help").lines
    for name in COMMANDS:
        assert any(line.strip().startswith(name) for line in lines), name


def test_help_and_lookup_load_nothing_heavy():
    code = (
        "import sys; from shardkv.cli.main import main; main(['--help'])\n"
        "heavy = {'asyncio', 'msgspec', 'rich', 'prompt_toolkit', 'psutil', 'uvloop', 'sqlite3'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=30)


def test_a_command_loads_no_other():
    code = (
        "import sys; from shardkv.cli.main import main\n"
        "main(['--router', '127.0.0.1:1', 'get', 'k', '--timeout', '0.01'])\n"
        "heavy = {'asyncio', 'rich', 'prompt_toolkit', 'psutil', 'uvloop', 'sqlite3'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.PIPE, timeout=30)


def test_python_m_shardkv_is_the_command():
    done = subprocess.run([sys.executable, "-m", "shardkv", "--version"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0
    assert done.stdout.startswith("shardkv")


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["get"], ["get", "a", "b"], ["scan", "--limit", "-1"], ["scan", "--nonsense"], ["put", "", "v"],
     ["scan", "b", "a"], ["get", "k", "--router", "nonsense"], ["get", "k", "--timeout", "0"],
     ["get", "k", "--keyspace", "orders"], ["import", "/does/not/exist"], ["bench", "--workload", "ycsb-z"]],
)  # fmt: skip
def test_usage_is_exit_code_2_and_one_sentence(arguments, run, router):
    done = run(*arguments)
    assert done.code == 2
    assert not done.out
    assert "Error" in done.err
    assert "Traceback" not in done.err


def test_unavailable_is_exit_code_3(run):
    done = run("--router", "127.0.0.1:1", "get", "k", "--timeout", "0.1")
    assert done.code == 3
    assert "127.0.0.1:1" in done.err
    assert done.err.count("\n") == 1


def test_an_option_of_the_command_wins_over_one_before_it_and_that_over_the_environment(run, router, monkeypatch):
    router.store = {b"k": b"v"}
    here, nowhere = router.address, "127.0.0.1:1"
    assert run("get", "k").out == b"v"
    assert run("--router", nowhere, "get", "k", "--router", here).out == b"v"
    monkeypatch.setenv("SHARDKV_ROUTER", nowhere)
    assert run("--router", here, "get", "k").out == b"v"
    assert run("get", "k", "--timeout", "0.05").code == 3
    assert run("--keyspace", "orders", "get", "k", "--router", here).code == 2
    assert run("--keyspace", "orders", "get", "k", "--router", here, "--keyspace", "default").out == b"v"


def test_what_was_probably_meant_is_named(run, router):
    assert "Did you mean 'export'?" in run("exprot").err
    assert "START b is after STOP a. Write the lower one first; --reverse" in run("scan", "b", "a").err
    assert "outside the shell takes options" in run("shell", stdin=b"scan --prefix user: --reverse").err
