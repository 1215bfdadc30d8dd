"""Peers that take for ever on purpose, at all three kinds of process: let go, and nobody else waits for them."""

from __future__ import annotations

import contextlib
import random
import select
from collections.abc import Iterator

import pytest

from shardkv.wire.messages import Op, Read
from tests.cluster.test_hostile_peers import (
    FRAME_BYTES_MAX,
    MIB,
    PROCESSES,
    Stranger,
    frame,
    hello,
    unharmed,
)
from tests.worlds.cluster import ClusterWorld, cluster_world, until

CONFIG = """
[limits]
hello_timeout_ms = 500
frame_timeout_ms = 500
output_timeout_ms = 500
"""
PACE_S = 0.02


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterWorld]:
    options = ("--partition", "range", "--nodes", "1", "--shards", "2")
    with cluster_world(tmp_path_factory.mktemp("slow"), *options, config=CONFIG) as found:
        yield found


@pytest.fixture(autouse=True)
def nobody_suffers(world: ClusterWorld) -> Iterator[None]:
    with unharmed(world):
        yield


def drip(strangers: list[Stranger], data: bytes) -> None:
    """Send the same bytes to all, one at a time, until each has answered."""
    waiting = list(strangers)
    for number in data:
        for stranger in waiting:
            stranger.socket.sendall(bytes([number]))
        heard, _, _ = select.select([stranger.socket for stranger in waiting], [], [], PACE_S)
        waiting = [stranger for stranger in waiting if stranger.socket not in heard]
        if not waiting:
            return
    raise AssertionError(f"{len(waiting)} connections still wait for the rest")


@pytest.mark.parametrize("greet", [False, True], ids=["hello", "frame"])
def test_a_hello_or_a_frame_in_drops_ends_in_one_error(world: ClusterWorld, greet: bool) -> None:
    data = frame(bytes(4000))
    with contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(Stranger(world, name, greet=greet)) for name in PROCESSES]
        drip(strangers, data)
        for stranger in strangers:
            request_id, status, error = stranger.answer()
            assert (request_id, status, error[0]) == (0, 1, "protocol_remote")
            assert "No hello came" in error[1] or "not complete within 500 ms" in error[1]
            assert stranger.closed()


def test_two_hundred_unfinished_frames_at_once_are_all_let_go(world: ClusterWorld) -> None:
    with contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(Stranger(world, "router-1", greet=True)) for _ in range(200)]
        for stranger in strangers:
            stranger.socket.sendall(FRAME_BYTES_MAX.to_bytes(4, "big") + bytes(10_000))
        with world.client(timeout=5) as db:
            assert db.get("0-before")
        for stranger in strangers:
            assert "not complete within 500 ms" in stranger.answer()[2][1]
            assert stranger.closed()


@pytest.mark.parametrize("name", ["router-1", "node-1"])
def test_a_reader_that_never_reads_is_cut_off(world: ClusterWorld, name: str) -> None:
    with world.client(timeout=10) as db:
        db.put("0-megabyte", random.Random(2).randbytes(MIB))
    with Stranger(world, name, greet=True) as greedy:
        for number in range(1, 41):
            greedy.send(Op.READ, Read([b"0-megabyte"]), request_id=number, node=name == "node-1")
        log = world.data_dir / "logs" / f"{name}.log"
        until(lambda: "stuck_reader_closed" in log.read_text(), what="the connection is still open")
        heard = 0
        with contextlib.suppress(ConnectionError):
            while data := greedy.socket.recv(1 << 20):
                heard += len(data)
        assert heard < 40 * MIB


def test_a_connection_with_nothing_to_say_is_kept(world: ClusterWorld) -> None:
    """The other way round: idle is not slow."""
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(Stranger(world, name, greet=True)) for name in PROCESSES]
        slow = stack.enter_context(Stranger(world, "router-1", greet=True))
        slow.socket.sendall(hello()[:7])
        assert "not complete" in slow.answer()[2][1]
        assert all(stranger.ask(Op.PING, None)[1] == 0 for stranger in idle)
