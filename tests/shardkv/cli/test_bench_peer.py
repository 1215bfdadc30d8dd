"""`shardkv bench --peer` beside a real redis server, where there is one, and its refusals."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardkv.cli.bench_peer import peer_server
from shardkv.errors import InvalidArgument
from tests.worlds.ports import free_port

REDIS = shutil.which("redis-server")


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[str]:
    """The address of a redis server with the password "secret"."""
    if REDIS is None:
        pytest.skip("redis-server is not installed")
    port = free_port()
    command = [REDIS, "--port", str(port), "--dir", str(tmp_path), "--save", "", "--requirepass", "secret"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            assert any(b"Ready to accept connections" in line for line in server.stdout)
            yield f"127.0.0.1:{port}"
        finally:
            server.terminate()


def test_both_are_measured(run, router, redis):
    done = run("bench", "--peer", f"redis://:secret@{redis}/2", "--keys", "200", "--clients", "2", "--pipeline", "3",
               "--seconds", "0.1", "--rounds", "2", "--json")  # fmt: skip
    results = json.loads(done.out)
    assert [result["operation"] for result in results] == ["set", "get"]
    assert done.code == (3 if any(result["void"] for result in results) else 0)
    for result in results:
        assert (result["connections"], result["depth"], result["keys"]) == (2, 3, 200)
        assert len(result["ratios"]) == 2
        assert result["shardkv"]["per_s"] > 0 < result["redis"]["per_s"]
        assert all("busy" in reason for reason in result["void"].values())
    assert len(router.store) == 200
    assert all(key.startswith(b"bench:") for key in router.store)


def test_one_workload_as_text(run, router, redis):
    done = run("bench", "--peer", f"redis://:secret@{redis}", "--keys", "50", "--seconds", "0.1", "--rounds", "1",
               "--workload", "fill")  # fmt: skip
    assert done.lines[0] == "set, 8 connections x 8, 50 keys, values of 100 B, medians of 1"
    assert [line.split()[0] for line in done.lines[1:4]] in (
        ["shardkv", "redis", "ratio"],
        ["shardkv", "redis", "void"],
    )


def test_a_refused_password_is_told_and_sets_no_ratio(run, router, redis):
    done = run("bench", "--peer", f"redis://{redis}", "--keys", "50", "--seconds", "0.1", "--rounds", "1")
    assert done.code == 3
    assert sum("void     redis: The server answered b'-NOAUTH" in line for line in done.lines) == 2
    assert not any("ratio" in line for line in done.lines)


def test_a_peer_that_is_not_there(run, router):
    done = run("bench", "--peer", f"redis://127.0.0.1:{free_port()}", "--keys", "50", "--seconds", "0.1", "--json")
    assert done.code == 3
    assert "Connection refused" in json.loads(done.out)[0]["void"]["redis"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--workload", "mixed"],
        ["--operations", "5"],
    ],
)
def test_what_cannot_be_compared_is_refused(arguments, run):
    done = run("bench", "--peer", "redis://127.0.0.1:1", *arguments)
    assert done.code == 2
    assert "--peer compares the workloads fill and read" in done.err


def test_urls():
    server = peer_server("redis://me:p%40ss@localhost:1234/5")
    assert (server.host, server.port, server.user, server.password, server.database) == (
        "localhost", 1234, "me", "p@ss", 5
    )  # fmt: skip
    plain = peer_server("redis://10.0.0.1")
    assert (plain.host, plain.port, plain.user, plain.password, plain.database) == ("10.0.0.1", 6379, None, None, 0)
    for wrong in ("127.0.0.1:6379", "http://127.0.0.1", "redis://", "redis://h:99999", "redis://h/x", "redis://[::1"):
        with pytest.raises(InvalidArgument, match="redis://HOST:PORT"):
            peer_server(wrong)
