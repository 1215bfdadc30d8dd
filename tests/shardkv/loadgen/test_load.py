"""The records of a load, the percentiles, and whole runs of the generator against a server in this process."""

from __future__ import annotations

import socket
from random import Random

import pytest

from shardkv.errors import Overloaded
from shardkv.loadgen.apart import run_load
from shardkv.loadgen.generator import generate
from shardkv.loadgen.histogram import STEP_BITS, STEPS, Histogram
from shardkv.loadgen.load import Figures, Load, Server
from shardkv.wire.messages import Op
from tests.shardkv.client.dict_router import DictRouter

SHARES = (0.5, 0.99, 0.999)


def noted(latencies_ns: list[int]) -> Histogram:
    histogram = Histogram()
    for took in latencies_ns:
        try:
            histogram.counts[took >> STEP_BITS] += 1
        except IndexError:
            histogram.note_long(took)
    return histogram


@pytest.mark.parametrize("longest_ns", [1, 50_000, 5_000_000, 3 * (STEPS << STEP_BITS)])
@pytest.mark.parametrize("count", [1, 2, 999, 20_000])
def test_percentiles_are_those_of_the_sorted_latencies(longest_ns, count):
    random = Random(count)
    latencies = [int(longest_ns * random.random() ** 3) for _ in range(count)]
    exact = [sorted(latencies)[min(count - 1, int(share * count))] / 1000 for share in SHARES]
    step_us = (1 << STEP_BITS) / 1000
    for told, right in zip(noted(latencies).percentiles_us(SHARES), exact, strict=True):
        assert right <= told <= right + step_us


def test_percentiles_of_nothing():
    assert Histogram().percentiles_us(SHARES) == [0.0, 0.0, 0.0]


def server_of(router: DictRouter) -> Server:
    return Server(protocol="shardkv", host="127.0.0.1", port=router.port)


def load_of(server: Server, **options) -> Load:
    return Load(server=server, **{"operation": "set", "connections": 3, "keys": 100, "seconds": None, **options})


def test_every_record_is_asked_for_and_the_last_exchange_is_full():
    server = Server(protocol="redis", host="", port=0)
    exchanges = list(load_of(server, keys=100, depth=32, operation="get").exchanges())
    keys = [word for one in exchanges for word in one.request.split(b"\r\n") if word.startswith(b"bench:")]
    assert len(exchanges) == 4
    assert len(keys) == 128
    assert set(keys) == {b"bench:%010d" % number for number in range(100)}
    assert {len(key) for key in keys} == {16}


def test_large_values_mean_fewer_records_but_the_same_for_every_depth():
    server = Server(protocol="redis", host="", port=0)
    loads = [load_of(server, keys=100_000, value_bytes=16_384, depth=depth) for depth in (1, 32)]
    assert loads[0].records == loads[1].records == 4071


@pytest.mark.parametrize("depth", [1, 7])
def test_what_was_set_is_got(depth):
    with DictRouter() as router:
        written = generate(load_of(server_of(router), depth=depth))
        assert written.problem is None
        assert written.operations == 105 if depth == 7 else 100
        assert len(router.store) == 100
        read = generate(load_of(server_of(router), operation="get", depth=depth, seconds=0.2, warm_up_s=0.05))
        assert read.problem is None
        assert read.operations > 100
        assert 0 < read.p50_us <= read.p99_us <= read.p999_us
        assert read.busy > 0


def test_requests_larger_than_the_socket_takes():
    with DictRouter() as router:
        load = load_of(server_of(router), value_bytes=200_000, keys=60, depth=20)
        assert generate(load).problem is None
        assert sum(map(len, router.store.values())) == 60 * 200_000
        assert generate(Load(**{**load_fields(load), "operation": "get"})).problem is None


def load_fields(load: Load) -> dict[str, object]:
    return {name: getattr(load, name) for name in load.__struct_fields__}


def test_an_error_voids_the_run():
    with DictRouter() as router:
        router.refusals = [Overloaded("Not now.")]
        assert "Not now." in str(generate(load_of(server_of(router))).void)


def test_values_that_are_not_there_void_the_run():
    with DictRouter() as router:
        assert "None" in str(generate(load_of(server_of(router), operation="get")).void)


def test_a_connection_that_breaks_voids_the_run():
    with DictRouter() as router:
        router.cut_after = Op.WRITE
        assert "closed the connection" in str(generate(load_of(server_of(router))).void)


def test_a_server_that_is_not_there():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        figures = run_load(load_of(Server(protocol="redis", host="127.0.0.1", port=probe.getsockname()[1])))
    assert "Connection refused" in str(figures.void)


def test_a_generator_with_no_time_to_spare_voids_the_run():
    assert Figures(busy=0.79).void is None
    assert "81% busy" in str(Figures(busy=0.81).void)
    assert Figures(busy=0.9, problem="It broke.").void == "It broke."
