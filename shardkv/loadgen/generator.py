"""Runs one load: encode, connect, warm up, measure, and let everything that was asked be answered."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import closing
from itertools import cycle

from shardkv.loadgen.cpu import cpu_s_of
from shardkv.loadgen.driver import Driver, clock, connect
from shardkv.loadgen.exchange import Exchange, WrongReply
from shardkv.loadgen.load import Figures, Load
from shardkv.transport.address import format_address, problem_of

SHARES = (0.5, 0.99, 0.999)


def generate(load: Load) -> Figures:
    """What came of the load; a server that cannot be reached or answers wrongly is told as the figures' `problem`."""
    if load.cores is not None:
        os.sched_setaffinity(0, load.cores)
    exchanges = list(load.exchanges())
    server, dialect = load.server, load.server.dialect()
    lanes = []
    try:
        for _ in range(load.connections):
            lanes.append(connect(server.host, server.port, dialect))
        with closing(Driver(lanes, max(exchange.reply_bytes for exchange in exchanges))) as driver:
            return _measured(load, driver, exchanges)
    except WrongReply as error:
        return Figures(problem=str(error))
    except OSError as error:
        where = format_address(server.host, server.port)
        return Figures(problem=f"The connection to {where} failed: {problem_of(error)}.")
    finally:
        for lane in lanes:
            lane.sock.close()


def _measured(load: Load, driver: Driver, exchanges: list[Exchange]) -> Figures:
    following: Callable[[], Exchange | None]
    if load.seconds is None:
        every = iter(exchanges)
        following = lambda: next(every, None)  # noqa: E731 - a plain function would be slower
    else:
        following = cycle(exchanges).__next__
    driver.start(following)
    if load.seconds is not None:
        driver.drive(following, clock() + int(load.warm_up_s * 1e9))
        driver.reset()
    used_before, mine_before, began = cpu_s_of(load.watch), time.process_time(), clock()
    driver.drive(following, None if load.seconds is None else began + int(load.seconds * 1e9))
    seconds, mine = (clock() - began) / 1e9, time.process_time() - mine_before
    used = {name: after - used_before[name] for name, after in cpu_s_of(load.watch).items()}
    answered, latencies = driver.answered, driver.latencies
    driver.drive(lambda: None)
    operations = answered * load.depth
    p50, p99, p999 = latencies.percentiles_us(SHARES)
    return Figures(
        operations=operations,
        seconds=seconds,
        busy=mine / seconds,
        p50_us=p50,
        p99_us=p99,
        p999_us=p999,
        cpu_us={name: one * 1e6 / max(1, operations) for name, one in used.items()},
    )
