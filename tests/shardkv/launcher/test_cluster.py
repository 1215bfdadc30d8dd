"""`shardkv cluster` on real processes: up, status, logs, down, and everything that may die on the way."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardkv.launcher.state import birth_of
from tests.worlds.cluster import ClusterWorld, cluster_world, shardkv, until
from tests.worlds.ports import free_port

CONFIG = """
[launcher]
restart_first_ms = 20
restart_most_ms = 100
crash_loop_starts = 3
stop_grace_ms = 5000
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterWorld]:
    """One cluster with two nodes and two routers for all tests that leave it whole."""
    options = ("--nodes", "2", "--routers", "2")
    with cluster_world(tmp_path_factory.mktemp("cluster"), *options, config=CONFIG) as started:
        until(lambda: "Try this" in started.output)
        yield started


def command(*arguments: str | Path, timeout: float = 30) -> subprocess.CompletedProcess[str]:
    return subprocess.run(shardkv(*map(str, arguments)), capture_output=True, text=True, timeout=timeout, check=False)


def serving(world: ClusterWorld) -> bool:
    done = command("cluster", "status", "--data-dir", world.data_dir, "--json")
    return done.returncode == 0


def test_up_prints_address_directory_processes_and_what_to_try(world: ClusterWorld) -> None:
    lines = world.output.splitlines()
    assert any(line.split() == ["address", world.address] for line in lines)
    assert any(line.split() == ["data", "directory", str(world.data_dir)] for line in lines)
    for name in ("meta", "node-1", "node-2", "router-1", "router-2"):
        (row,) = [line.split() for line in lines if line.split()[:1] == [name]]
        assert row[1] == str(world.pid(name))
        assert (world.data_dir / row[3]).exists()
    tried = next(line for line in lines if line.startswith("Try this: "))
    done = subprocess.run(tried.removeprefix("Try this: "), shell=True, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "world"


def test_status_tells_every_process_as_text_and_as_json(world: ClusterWorld) -> None:
    found = world.status()
    assert found["state"] == "serving"
    assert found["address"] == world.address
    assert found["keyspaces"] == {"default": {"partition": "hash", "shards": 16}}
    assert {p["name"]: (p["state"], p["pid"]) for p in found["processes"]} == {
        name: ("serving", world.pid(name)) for name in ("meta", "node-1", "node-2", "router-1", "router-2")
    }
    text = world.run("cluster", "status", "--data-dir", str(world.data_dir))
    assert "The cluster is serving" in text
    assert f"process {found['launcher_pid']}" in text


def test_logs_of_one_process_and_of_a_process_that_is_not(world: ClusterWorld) -> None:
    assert "node_registered" in world.run("cluster", "logs", "node-1", "--data-dir", str(world.data_dir))
    wrong = command("cluster", "logs", "node-7", "--data-dir", world.data_dir)
    assert wrong.returncode == 2
    assert "known are meta, node-1" in wrong.stderr


def test_a_second_up_names_the_launcher_that_is_there(world: ClusterWorld) -> None:
    done = command("cluster", "up", "--data-dir", world.data_dir)
    assert done.returncode == 3
    assert f"its launcher is process {world.status()['launcher_pid']}" in done.stderr
    assert serving(world)


@pytest.mark.parametrize("name", ["meta", "node-1", "router-1"])
def test_a_killed_process_is_started_again(world: ClusterWorld, name: str) -> None:
    before = world.pid(name)
    world.kill(name)
    until(lambda: world.pid(name) != before and serving(world))
    assert f"{name} is started again: it was killed by signal 9." in world.output
    (told,) = [p for p in world.status()["processes"] if p["name"] == name]
    assert told["restarts"] >= 1


def test_a_paused_process_is_told_as_not_answering(world: ClusterWorld) -> None:
    world.kill("node-2", number=signal.SIGSTOP)
    try:
        done = command("cluster", "status", "--data-dir", world.data_dir, "--json")
        states = {p["name"]: p["state"] for p in json.loads(done.stdout)["processes"]}
        assert done.returncode == 3
        assert states == {**dict.fromkeys(states, "serving"), "node-2": "not answering"}
    finally:
        world.kill("node-2", number=signal.SIGCONT)


def test_a_crash_loop_is_reported_with_its_reason_and_ends_when_the_reason_goes(tmp_path: Path) -> None:
    with cluster_world(tmp_path, "--nodes", "1", config=CONFIG) as world:
        until(lambda: "Try this" in world.output)
        port = json.loads((world.data_dir / "run" / "cluster.json").read_text())["meta_port"]
        world.kill("launcher", number=signal.SIGSTOP)
        world.kill("meta")
        with socket.socket() as stranger:
            stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                until(lambda: listens(stranger, port))
            finally:
                world.kill("launcher", number=signal.SIGCONT)
            until(lambda: "meta keeps dying" in world.output)
            assert f"Port {port} on 127.0.0.1 is taken by another program" in world.output
            assert world.records()["meta"]["state"] in ("crash loop", "starting")
            with world.client() as db:
                db.put("k", "the cluster goes on without its metadata process")
        until(lambda: serving(world))
        assert world.stop() == 0


def test_what_cannot_run_ends_the_start_with_its_own_sentence(tmp_path: Path) -> None:
    port = str(free_port())
    data = tmp_path / "data"
    options = ("--data-dir", data, "--port", port, "--nodes", "1")
    assert command("cluster", "up", "--detach", *options).returncode == 0
    assert command("cluster", "down", "--data-dir", data).returncode == 0
    (data / "node-1").rename(tmp_path / "kept")
    (data / "node-1").mkdir()
    for detach in ([], ["--detach"]):
        done = command("cluster", "up", *options, *detach)
        assert done.returncode == 3
        assert "Start the node on its own directory; an empty one cannot take its place." in done.stderr
    (data / "node-1").rename(tmp_path / "emptied")
    (tmp_path / "kept").rename(data / "node-1")
    assert command("cluster", "up", "--detach", *options).returncode == 0
    assert command("cluster", "down", "--data-dir", data).returncode == 0
    status = command("cluster", "status", "--data-dir", data, "--json")
    assert status.returncode == 3
    assert json.loads(status.stdout)["state"] == "stopped"
    assert "was running" in command("cluster", "down", "--data-dir", data).stdout


def test_a_second_ctrl_c_kills_what_will_not_stop(tmp_path: Path) -> None:
    with cluster_world(tmp_path, "--nodes", "1", config=CONFIG.replace("5000", "60000")) as world:
        until(lambda: "Try this" in world.output)
        pids = [world.pid(name) for name in world.records()]
        world.kill("node-1", number=signal.SIGSTOP)
        world.kill("launcher", number=signal.SIGINT)
        until(lambda: "Stopping" in world.output)
        assert world.stop() == 0
        assert "node-1 had not stopped yet and was killed." in world.output
        assert not any(birth_of(pid) for pid in pids)


def test_a_new_launcher_takes_over_what_the_killed_one_left(tmp_path: Path) -> None:
    with cluster_world(tmp_path, "--nodes", "2", config=CONFIG) as world:
        until(lambda: "Try this" in world.output)
        before = {name: world.pid(name) for name in world.records()}
        world.kill("launcher")
        world.kill("node-2")
        told = command("cluster", "status", "--data-dir", world.data_dir).stdout
        assert "none: nothing is restarted; `shardkv cluster up` takes over again" in told
        process, node = [line.split() for line in told.splitlines() if line.strip().startswith("node-2 ")]
        assert process[1] == "ended"
        assert "not answering" in " ".join(node)
        world.start()
        until(lambda: world.output.count("Try this") == 2)
        after = {name: world.pid(name) for name in world.records()}
        assert after.pop("node-2") != before.pop("node-2")
        assert after == before
        assert "Found still running: meta, node-1, router-1." in world.output
        assert world.stop() == 0
        assert not any(birth_of(pid) for pid in after.values())


def test_processes_are_found_without_any_record_and_stopped_without_a_launcher(tmp_path: Path) -> None:
    with cluster_world(tmp_path, "--nodes", "1", config=CONFIG) as world:
        until(lambda: "Try this" in world.output)
        before = {name: world.pid(name) for name in world.records()}
        world.kill("launcher")
        (world.data_dir / "run" / "processes.json").unlink()
        world.start()
        until(lambda: world.output.count("Try this") == 2)
        assert {name: world.pid(name) for name in world.records()} == before
        world.kill("launcher")
        done = command("cluster", "down", "--data-dir", world.data_dir)
        assert done.stdout.startswith("Stopped meta, node-1, router-1.")
        told = command("cluster", "status", "--data-dir", world.data_dir, "--json").stdout
        assert {p["state"] for p in json.loads(told)["processes"]} == {"stopped"}
        assert not any(birth_of(pid) for pid in before.values())


def test_the_files_of_a_dead_machine_hold_no_one_up(tmp_path: Path) -> None:
    """Stale pids that now belong to others are left alone."""
    with cluster_world(tmp_path, "--nodes", "1", config=CONFIG) as world:
        until(lambda: "Try this" in world.output)
        assert world.stop() == 0
        path = world.data_dir / "run" / "processes.json"
        records = json.loads(path.read_text())
        for record in records["processes"]:
            record["pid"], record["birth"] = os.getpid(), "another-boot/1"
        path.write_text(json.dumps(records))
        world.start()
        with world.client() as db:
            db.put("a", "b")


def test_a_taken_port_is_named_before_anything_is_started(tmp_path: Path) -> None:
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        port = stranger.getsockname()[1]
        done = command("cluster", "up", "--data-dir", tmp_path / "data", "--port", str(port))
    assert done.returncode == 3
    assert done.stderr == (
        f"Error: Port {port} on 127.0.0.1 is taken by another program. "
        "Stop that program, or choose another port with --port.\n"
    )
    assert not (tmp_path / "data" / "meta").exists()


def test_a_port_taken_by_another_cluster_names_that_cluster(world: ClusterWorld, tmp_path: Path) -> None:
    port = world.address.rpartition(":")[2]
    done = command("cluster", "up", "--data-dir", tmp_path / "data", "--port", port)
    assert done.returncode == 3
    assert f"the one in {world.data_dir}." in done.stderr
    assert f"`shardkv cluster down --data-dir {world.data_dir}` stops it" in done.stderr


def test_a_stopped_cluster_accuses_nobody(tmp_path: Path) -> None:
    with cluster_world(tmp_path, "--nodes", "1", config=CONFIG) as world:
        until(lambda: "Try this" in world.output)
        world.kill("node-1")
        until(lambda: "node-1 is started again" in world.output and serving(world))
        assert world.stop() == 0
        assert f"Stopped. The data stays in {world.data_dir}." in world.output
        told = command("cluster", "status", "--data-dir", world.data_dir).stdout
        assert "The cluster is stopped" in told
        assert "signal" not in told


def test_two_clusters_side_by_side_keep_their_data_apart(world: ClusterWorld, tmp_path: Path) -> None:
    with cluster_world(tmp_path, "--nodes", "1", "--partition", "range", "--split-at", "m") as other:
        with world.client() as db, other.client() as other_db:
            db.put("who", "first")
            other_db.put("who", "second")
            assert (db.get("who"), other_db.get("who")) == (b"first", b"second")
        assert other.stop() == 0
    assert serving(world)


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--bind", "0.0.0.0"], 2, "there is no authentication yet"),
        (["--nodes", "0", "--port", "70000"], 2, "2 problems in the options"),
        (["--config", "/nowhere.toml"], 2, "The file cannot be read"),
        (["--split-at", "m"], 2, "partition is 'hash'"),
        (["--data-dir", "/proc/nowhere"], 3, "/proc/nowhere cannot be used as a data directory"),
        (["--data-dir", "/proc/nowhere", "--detach"], 3, "/proc/nowhere cannot be used as a data directory"),
    ],
)
def test_bad_options_are_one_clear_answer(tmp_path: Path, options: list[str], code: int, said: str) -> None:
    done = command("cluster", "up", "--data-dir", tmp_path, *options)
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def listens(sock: socket.socket, port: int) -> bool:
    """Take `port` as soon as its owner has let go of it."""
    try:
        sock.bind(("127.0.0.1", port))
    except OSError:
        return False
    sock.listen()
    return True
