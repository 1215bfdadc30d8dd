"""`shardkv.Admin` against a real cluster: keyspaces, settings, jobs and how they are steered, nodes wanted."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardkv import Admin, ClientClosed, InvalidArgument, OutcomeUnknown, RouterUnavailable, UnknownKeyspace
from tests.worlds.cluster import ClusterWorld, cluster_world, until
from tests.worlds.ports import free_port


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterWorld]:
    options = ("--nodes", "2", "--routers", "2", "--shards", "4")
    with cluster_world(tmp_path_factory.mktemp("admin"), *options) as started:
        yield started


@pytest.fixture
def admin(world: ClusterWorld) -> Iterator[Admin]:
    with Admin(world.address) as found:
        yield found


@pytest.mark.parametrize("partition", ["hash", "range"])
def test_a_keyspace_is_made_used_and_dropped(world: ClusterWorld, admin: Admin, partition: str) -> None:
    name = f"people-{partition}"
    cuts = {"split_at": ["h", b"p"]} if partition == "range" else {"shards": 5}
    made = admin.create_keyspace(name, partition=partition, **cuts)  # type: ignore[arg-type]
    assert (made.state, made.shards) == ("serving", 3 if partition == "range" else 5)
    with world.client(keyspace=name) as people, world.client() as default:
        people.put_many({f"k{n}": f"{name}-{n}" for n in range(50)})
        assert default.get("k7") is None
        assert [value.decode() for value in people.get_many(["k7", "k9"]).values()] == [f"{name}-7", f"{name}-9"]
        admin.drop_keyspace(name)
        with pytest.raises(UnknownKeyspace):
            people.get("k7", timeout=2)
    assert name not in [each.name for each in admin.keyspaces()]
    with pytest.raises(UnknownKeyspace):
        admin.shards(name)
    admin.create_keyspace(name, partition=partition, **cuts)  # type: ignore[arg-type]
    with world.client(keyspace=name) as people:
        assert people.get("k7") is None
    admin.drop_keyspace(name)


def test_shards_tell_their_interval_owner_and_size(admin: Admin) -> None:
    shards = admin.shards("default")
    assert [shard.start for shard in shards] == [2**62 * n for n in range(4)]
    assert {shard.node for shard in shards} == {"node-1", "node-2"}
    assert all(shard.bytes is not None for shard in shards)


def test_asked_again_with_the_same_token_there_is_one_job(admin: Admin) -> None:
    before = len(admin.jobs())
    ids = []

    def ask() -> None:
        ids.append(admin.rebalance(token="the-same-one").id)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ask()
    assert len(ids) == 5
    assert len(set(ids)) == 1
    assert len(admin.jobs()) == before + 1
    assert admin.wait_job(ids[0]).state == "done"


def test_a_node_is_added_once_though_asked_for_again(admin: Admin) -> None:
    first = admin.add_node(host="10.9.9.9", token="one-more-node")
    assert admin.add_node(host="10.9.9.9", token="one-more-node") == first
    assert [node.state for node in admin.nodes() if node.name == first.node] == ["not joined"]
    assert admin.job(first.job).kind == "add"
    until(lambda: admin.job(first.job).problem == f"Node {first.node} has not joined yet.")
    assert any(first.node in line for line in admin.status().advice)
    assert admin.cancel_job(first.job).state in ("cancelling", "cancelled")
    assert admin.wait_job(first.job).state == "cancelled"
    assert admin.wait_job(admin.remove_node(first.node).id).state == "done"
    assert [node.state for node in admin.nodes() if node.name == first.node] == ["removed"]
    with pytest.raises(InvalidArgument, match="names are not used again"):
        admin.add_node(first.node)


def test_a_job_that_waits_is_paused_goes_on_and_is_cancelled(admin: Admin) -> None:
    added = admin.add_node(started_by="operator")
    until(lambda: admin.job(added.job).problem)
    assert admin.pause_job(added.job).state == "paused"
    with pytest.raises(InvalidArgument, match="is paused"):
        admin.pause_job(added.job)
    assert any("job resume" in line for line in admin.status().advice)
    assert admin.resume_job(added.job).state == "planned"
    assert admin.set_job_rate(added.job, 7_000_000).rate_bytes_s == 7_000_000
    states: list[str] = []

    def watch() -> None:
        states.extend(job.state for job in admin.watch_job(added.job, poll_s=0.01))

    watching = threading.Thread(target=watch)
    watching.start()
    until(lambda: states)
    admin.cancel_job(added.job)
    watching.join(20)
    assert states[0] == "planned"
    assert states[-1] == "cancelled"
    with pytest.raises(InvalidArgument, match="is cancelled"):
        admin.resume_job(added.job)
    admin.wait_job(admin.remove_node(added.node).id)


def test_settings_are_changed_and_stay(admin: Admin) -> None:
    assert admin.settings().auto_merge
    assert not admin.change_settings(auto_merge=False).auto_merge
    assert not admin.settings().auto_merge
    admin.change_settings(auto_merge=True)
    with pytest.raises(InvalidArgument, match="There is no setting"):
        admin.change_settings(autosplit=False)


def test_what_cannot_be_is_refused_by_whoever_is_asked(world: ClusterWorld, admin: Admin) -> None:
    with pytest.raises(InvalidArgument, match="There is no job 999"):
        admin.job(999)
    with pytest.raises(InvalidArgument, match="There is no node node-77"):
        admin.remove_node("node-77")
    host, port = world.address_of("meta")
    with Admin(f"{host}:{port}") as direct, pytest.raises(InvalidArgument, match="There is no shard 999"):
        direct.move_shard(999, "node-1")


def test_status_is_of_the_whole_cluster(world: ClusterWorld, admin: Admin) -> None:
    told = admin.status()
    assert told.cluster_id == world.status()["cluster_id"]
    assert [(node.name, node.state) for node in told.nodes if node.wish == "active"] == [
        ("node-1", "serving"),
        ("node-2", "serving"),
    ]
    assert [keyspace.name for keyspace in told.keyspaces] == ["default"]


def test_a_router_that_dies_is_left_for_another(world: ClusterWorld) -> None:
    addresses = [f"{host}:{port}" for host, port in map(world.address_of, ("router-1", "router-2"))]
    with Admin(addresses) as admin:
        for _ in addresses:
            admin.status()
        world.kill("router-2")
        for _ in addresses:
            assert admin.status().revision > 0
            admin._asker._drop()  # so that the next question goes to the next router
    world.wait_serving()


def test_nobody_there_and_closed_are_told_apart() -> None:
    with Admin(f"127.0.0.1:{free_port()}", timeout=0.3) as admin:
        with pytest.raises(RouterUnavailable, match="was not reached"):
            admin.jobs()
        with pytest.raises(RouterUnavailable):
            admin.rebalance()
    with pytest.raises(ClientClosed):
        admin.jobs()


def test_without_the_metadata_process_a_question_waits_and_a_change_tells_its_token(tmp_path: Path) -> None:
    with cluster_world(tmp_path, "--nodes", "1", "--shards", "2") as world, Admin(world.address, timeout=1) as admin:
        assert admin.jobs() == []
        world.kill("meta", number=signal.SIGSTOP)
        try:
            with pytest.raises(OutcomeUnknown) as caught:
                admin.rebalance()
        finally:
            world.kill("meta", number=signal.SIGCONT)
        with Admin(world.address) as again:
            job = again.rebalance(token=caught.value.detail["token"])
            assert [each.id for each in again.jobs()] == [job.id]
