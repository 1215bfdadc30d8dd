"""A cluster on several machines, started as docs/several-machines.md says: machines that join, leave and are cut off.

What was acknowledged is there, every key is linearizable, and all serves again by itself.
"""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shardkv import Client
from shardkv.admin import Job
from shardkv.errors import ShardKVError
from tests.worlds.cluster import until
from tests.worlds.history import Writer, check_scan
from tests.worlds.hosts import CLIENT, NODE_PORT, Hosts, exec_start, hosts_world
from tests.worlds.hot_keys import HotKeys, check_versions
from tests.worlds.linearizability import Register, check

KEYS = [b"0hot", b"a hot", b"hot", b"last hot", b"very hot", b"~"]
ROWS = {b"still-%05d" % number: b"%d" % number * 20 for number in range(2_000)}
"""What nobody changes."""
CUT_S = 4.0
ENDED_S = 60.0


@contextmanager
def load(world: Hosts, *, seed: int) -> Iterator[HotKeys]:
    """Reads and writes of few keys all the time, and writers of many; afterwards what they were told is checked."""
    with world.client(timeout=20) as db:
        db.put_many(ROWS)
    hot = HotKeys(world.addresses, KEYS, seed=seed, threads=3, tasks=3)
    writers = [Writer(number, world.addresses, seed=seed) for number in range(2)]
    for one in (*writers, hot):
        one.start()
    try:
        yield hot
    finally:
        for writer in writers:
            writer.stop()
        for writer in writers:
            writer.join(30)
        hot.stop()
    assert not [*hot.surprises, *(surprise for writer in writers for surprise in writer.surprises)]
    check_versions(hot.versions)
    check(hot.operations, Register())
    assert all(diary.counts["acknowledged"] for diary in hot.diaries), "a client never got through"
    with world.client(timeout=20) as db:
        assert sum(writer.check(db) for writer in writers)
        assert db.get_many(list(ROWS)) == ROWS
        for key in [*KEYS, *ROWS]:
            db.delete(key)
        check_scan(db, writers)


def acknowledged(hot: HotKeys) -> int:
    return hot.counts["acknowledged"]


def goes_on(hot: HotKeys) -> None:
    """Wait until a good deal more was acknowledged."""
    before = acknowledged(hot)
    until(lambda: acknowledged(hot) > before + 100, what="calls are answered")


def owned(world: Hosts) -> dict[str, int]:
    """How many shards each node owns."""
    with world.admin(timeout=20) as admin:
        return {node.name: node.shards for node in admin.nodes()}


def ended(world: Hosts, job: int) -> Job:
    with world.admin(timeout=ENDED_S) as admin:
        return admin.wait_job(job)


def status_is_well(world: Hosts) -> bool:
    """Whether `shardkv cluster status` says that all serve."""
    try:
        with world.admin(timeout=2) as admin:
            status = admin.status()
    except ShardKVError:
        return False
    return all(node.state == "serving" for node in status.nodes) and not status.advice


def test_three_machines_come_up_and_a_fourth_joins_by_the_command_that_is_printed(tmp_path: Path) -> None:
    with hosts_world(tmp_path, hosts=4) as world:
        world.start()
        with load(world, seed=1) as hot:
            told = subprocess.run(
                world.net.command(
                    CLIENT, sys.executable, "-m", "shardkv", "--router", world.addresses[1],
                    "cluster", "add-node", "--host", world.net.addresses["host-4"], "--no-wait", "--json",
                ),
                capture_output=True, text=True, check=True, timeout=30,
            )  # fmt: skip
            (line,) = re.findall("^ *(shardkv node run .*)$", told.stderr, re.MULTILINE)
            words = shlex.split(line)
            assert words[words.index("--meta") + 1].split(",") == world.meta_addresses
            assert words[words.index("--port") + 1] == str(NODE_PORT)
            world.start_command("node-4", words, host="host-4")
            with world.admin(timeout=30) as admin:
                assert admin.wait_joined("node-4").host == "host-4"
                job = admin.wait_job(max(each.id for each in admin.jobs()))
            assert (job.kind, job.state) == ("add", "done")
            goes_on(hot)
        assert owned(world)["node-4"] == len(job.moves) >= 3
        assert '"serving"' in world.run("cluster", "status", "--router", world.addresses[0], "--json")


def test_a_machine_that_was_cut_off_is_one_of_them_again(tmp_path: Path) -> None:
    with hosts_world(tmp_path, metas=3, etcds=3) as world:
        world.start()
        with load(world, seed=2) as hot:
            world.net.cut("host-2")
            until_passed(CUT_S)
            goes_on(hot)
            world.net.mend("host-2")
            world.wait_serving()
            until(lambda: status_is_well(world), timeout_s=30, what="all is well again")
            goes_on(hot)
        assert hot.counts["unknown"] or hot.counts["refused"] or hot.counts["failed"], "nobody noticed the cut"
        assert all(world.runs(name) for name in [*world.metas, *world.nodes, *world.routers])


@pytest.mark.long
@pytest.mark.timeout(300)
def test_each_machine_in_turn_is_unplugged(tmp_path: Path) -> None:
    with hosts_world(tmp_path, metas=3, etcds=3) as world:
        world.start()
        with load(world, seed=3) as hot:
            for host in world.hosts:
                world.net.unplug(host)
                until_passed(CUT_S)
                goes_on(hot)
                world.net.plug(host)
                world.wait_serving()
                until(lambda: status_is_well(world), timeout_s=30, what="all is well again")


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_machine_that_was_lost_has_its_shards_when_it_is_back(tmp_path: Path) -> None:
    with hosts_world(tmp_path, metas=3, etcds=3) as world:
        world.start()
        with load(world, seed=8) as hot:
            lost = world.on("host-2")
            assert {"etcd-2", "meta-2", "node-2", "router-2"} == {*lost}
            world.kill(*lost)
            goes_on(hot)
            until(lambda: says_what_to_do(world), timeout_s=30, what="status says what is lost")
            with world.client(timeout=2) as db:
                outcomes = {outcome(db, key) for key in list(ROWS)[:40]}
            assert outcomes == {"served", "ShardUnavailable"}
            for name in lost:
                world.restart(name)
            world.wait_serving()
            until(lambda: status_is_well(world), timeout_s=30, what="all is well again")


def says_what_to_do(world: Hosts) -> bool:
    with world.admin(timeout=20) as admin:
        advice = " ".join(admin.status().advice)
    return "node-2 does not answer" in advice and "see on host-2 that it runs" in advice


def outcome(db: Client[bytes], key: bytes) -> str:
    """Whether a key is served, or the name of the error."""
    try:
        assert db.get(key) == ROWS[key]
    except ShardKVError as error:
        return type(error).__name__
    return "served"


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_machine_is_drained_and_taken_away(tmp_path: Path) -> None:
    with hosts_world(tmp_path, hosts=4, nodes=4, routers=(1, 4)) as world:
        world.start()
        with load(world, seed=4) as hot:
            told = world.run("cluster", "remove-node", "node-4", "--router", world.addresses[0])
            assert "stop it on host-4, and delete its directory" in told
            assert owned(world)["node-4"] == 0
            assert world.stop("router-4") == world.stop("node-4") == 0
            world.net.unplug("host-4")
            goes_on(hot)
        world.routers.remove("router-4")
        until(lambda: removed_is_well(world), timeout_s=30, what="the rest is well")


def removed_is_well(world: Hosts) -> bool:
    with world.admin(timeout=20) as admin:
        status = admin.status()
    states = {node.name: node.state for node in status.nodes}
    return states.pop("node-4") == "removed" and {*states.values()} == {"serving"} and not status.advice


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("step", ["target.ship", "target.fence", "target.commit", "source.fenced"])
def test_a_move_between_machines_that_are_cut_off_from_each_other_ends_well(tmp_path: Path, step: str) -> None:
    """Both reach the metadata process all the time, and the router reaches both."""
    source, target = "node-2", "node-3"
    stopping = target if step.startswith("target") else source
    with hosts_world(tmp_path, metas=1, routers=[1]) as world:
        world.start(stop_at={stopping: f"{step}:STOP"})
        with load(world, seed=5) as hot:
            with world.admin(timeout=20) as admin:
                admin.change_settings(stuck_ms=8_000)
                shard = next(each for each in admin.shards() if each.node == source)
                job = admin.move_shard(shard.id, target)
            until(lambda: world.is_stopped(stopping), what=f"{stopping} is at {step}")
            world.net.part(world.host_of(source), world.host_of(target))
            world.signal(stopping, signal.SIGCONT)
            until(lambda: over_or_tried_again(world, job.id, shard.id), timeout_s=90, what="the first attempt is over")
            world.wait_serving()
            goes_on(hot)
            world.net.join(world.host_of(source), world.host_of(target))
            assert ended(world, job.id).state == "done"
            world.wait_serving()
        until(lambda: status_is_well(world), timeout_s=30, what="all is well again")


def over_or_tried_again(world: Hosts, job: int, shard: int) -> bool:
    """Whether the move was committed, or given up for now."""
    with world.admin(timeout=20) as admin:
        moved = {each.id: each for each in admin.shards()}[shard]
        return admin.job(job).ended or bool(moved.problem)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_losing_the_etcd_leader_and_most_metadata_processes(tmp_path: Path) -> None:
    with hosts_world(tmp_path, metas=3, etcds=3) as world:
        world.start()
        with load(world, seed=6) as hot:
            leader = world.etcd_leader()
            world.kill(leader)
            lost = [world.leader() or "meta-1"]
            lost.append(next(name for name in world.metas if name not in lost))
            world.kill(*lost)
            goes_on(hot)
            with world.admin(timeout=60) as admin:
                moved = next(each for each in admin.shards() if each.node == "node-1")
                assert admin.wait_job(admin.move_shard(moved.id, "node-3").id, timeout=60).state == "done"
            for name in (leader, *lost):
                world.restart(name)
            until(lambda: status_is_well(world), timeout_s=30, what="all is well again")


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_node_and_a_router_that_come_back_elsewhere_are_found(tmp_path: Path) -> None:
    with hosts_world(tmp_path, hosts=4, metas=2) as world:
        world.start()
        with load(world, seed=7) as hot:
            world.stop("node-2")
            world.start_unit("node-2", port="7444")
            world.wait_serving()
            world.stop("node-2")
            world.carry_disk("host-2", "host-4")
            world.start_unit("node-2", host="host-4")
            world.wait_serving()
            world.stop("router-2")
            world.start_unit("router-2", host="host-4", port="7500")
            with Client(f"{world.net.addresses['host-4']}:7500", timeout=20) as db:
                assert db.get_many(list(ROWS)) == ROWS
            goes_on(hot)
        with world.admin(timeout=20) as admin:
            assert {node.name: node.host for node in admin.nodes()}["node-2"] == "host-4"


@pytest.mark.long
def test_names_and_wildcards_do_where_addresses_do(tmp_path: Path) -> None:
    with hosts_world(tmp_path, metas=2) as world:
        world.meta_names = [f"{world.host_of(name)}:7401" for name in world.metas]
        for name in world.etcds:
            world.start_etcd(name)
        for name in [*world.metas, *world.nodes, *world.routers]:
            world.start_unit(name, "--advertise", world.host_of(name), bind="0.0.0.0")
        world.wait_serving()
        assert "meta-1" in str(world.leader()) or "meta-2" in str(world.leader())
        told = world.run("cluster", "status", "--router", "host-1:7400", "--json")
        assert json.loads(told)["cluster"]["meta"] == world.meta_names
        world.python(
            "from shardkv import Client\n"
            "with Client('host-2:7400', direct=True, timeout=20) as db:\n"
            "    rows = {b'%d' % number: b'value' for number in range(200)}\n"
            "    db.put_many(rows)\n"
            "    assert db.get_many(list(rows)) == rows\n"
        )


@pytest.mark.long
@pytest.mark.parametrize("name", ["meta-1", "node-1", "router-1"])
def test_a_wildcard_without_an_address_for_others_is_refused_at_once(tmp_path: Path, name: str) -> None:
    with hosts_world(tmp_path, etcds=1) as world:
        world.start_unit(name, bind="0.0.0.0")
        assert world.exit_code(name) == 2
        assert "Say with --advertise under which name or address" in world.logs()


def until_passed(seconds: float) -> None:
    """A fault of the network lasts so long: nothing tells of its end."""
    time.sleep(seconds)


@pytest.mark.parametrize("role", ["meta", "node", "router"])
def test_the_guide_shows_what_the_units_run(role: str) -> None:
    shown = exec_start(role).removeprefix("/opt/shardkv/bin/").replace("%i", f"{role}-1")
    shown = shown.replace("${ADDRESS}", "ADDRESS").replace("${META}", "META")
    guide = (Path(__file__).parents[2] / "docs" / "several-machines.md").read_text()
    assert shown in [" ".join(line.split()) for line in guide.splitlines()]
