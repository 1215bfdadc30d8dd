"""The blocking client: threads, forks, and its pool of connections."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from shardkv import Client, ClientClosed, DeadlineExceeded
from shardkv.errors import Draining, Overloaded
from shardkv.wire.messages import Op


def test_threads_share_a_client_and_each_gets_its_own_answers(router):
    with Client(router.address) as db, ThreadPoolExecutor(16) as threads:

        def use(name: str) -> None:
            for number in range(50):
                db.put(f"{name}:{number}", f"{name}-{number}")
                assert db.get(f"{name}:{number}") == f"{name}-{number}".encode()

        list(threads.map(use, [f"t{number}" for number in range(16)]))
        assert len(router.store) == 800
        assert router.connections <= 16


def test_threads_wait_for_a_connection_instead_of_failing(router):
    router.delay_s = lambda op: 0.02
    with Client(router.address, connections_max=2) as db, ThreadPoolExecutor(10) as threads:
        list(threads.map(lambda number: db.put(str(number), "v"), range(20)))
        assert len(router.store) == 20
        assert router.connections <= 2


def test_of_many_threads_on_few_connections_none_is_left_behind(router):
    """The fastest stops them all; without turns the slowest made one call in a thousand of the fastest's."""
    with Client(router.address, connections_max=2) as db, ThreadPoolExecutor(24) as threads:
        done = [0] * 24

        def use(number: int) -> None:
            while max(done) < 1000:
                db.get("k")
                done[number] += 1

        list(threads.map(use, range(24)))
        assert min(done) > 20, done


def test_waiting_for_a_connection_ends_at_the_deadline(router):
    router.delay_s = lambda op: 0.5
    with Client(router.address, connections_max=1) as db:
        busy = threading.Thread(target=db.get, args=("k",))
        busy.start()
        while not router.requests:
            time.sleep(0.001)
        with pytest.raises(DeadlineExceeded, match="1 connections"):
            db.get("k", timeout=0.1)
        busy.join()
        router.delay_s = lambda op: 0.0
        assert db.get("k") is None


def test_one_thread_uses_one_connection(router):
    with Client(router.address) as db:
        for number in range(20):
            db.put(str(number), "v")
            next(db.scan())
        assert router.connections == 1


def test_a_forked_child_opens_its_own_connection(router):
    with Client(router.address) as db:
        db.put("parent", "1")
        child = os.fork()
        if child == 0:
            status = 1
            try:
                db.put("child", "2")
                status = 0 if db.get("parent") == b"1" else 2
            finally:
                os._exit(status)
        for number in range(50):
            db.put(f"parent:{number}", "1")
            assert db.get(f"parent:{number}") == b"1"
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert router.store[b"child"] == b"2"
        assert db.get("child") == b"2"
        assert len(router.used_connections) == 2


def test_a_fork_while_another_thread_uses_the_client(router):
    """The lock may be held in the moment of the fork; the child must not wait for it forever."""
    stop = threading.Event()
    with Client(router.address, timeout=2) as db:

        def keep_busy() -> None:
            while not stop.is_set():
                db.get("k")

        threads = [threading.Thread(target=keep_busy) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(10):
                child = os.fork()
                if child == 0:
                    status = 1
                    try:
                        status = 0 if db.get("k") is None else 2
                    finally:
                        os._exit(status)
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def test_a_stale_connection_is_noticed_before_a_write_is_risked(router):
    with Client(router.address) as db:
        for round_number in range(5):
            db.put("k", str(round_number))
            router.stop()
            router.listen()
        assert router.requests == [Op.WRITE] * 5


def test_closing_wakes_those_who_wait_for_a_connection(router):
    router.delay_s = lambda op: 0.3
    db = Client(router.address, connections_max=1, timeout=5)
    errors = []

    def use() -> None:
        try:
            db.get("k")
        except ClientClosed as error:
            errors.append(error)

    threads = [threading.Thread(target=use) for _ in range(3)]
    for thread in threads:
        thread.start()
    while not router.requests:
        time.sleep(0.001)
    db.close()
    for thread in threads:
        thread.join()
    assert len(errors) == 2


def test_a_closed_client_keeps_no_connection(router):
    db = Client(router.address)
    db.put("k", "v")
    assert router.connections == 1
    db.close()
    deadline = time.monotonic() + 2
    while router.connections and time.monotonic() < deadline:
        time.sleep(0.001)
    assert router.connections == 0


ROWS = [(b"%03d" % number, b"v") for number in range(60)]


@pytest.fixture
def paged(router):
    """A router with rows of six pages."""
    router.store |= dict(ROWS)
    router.page_rows = 10
    return router


def scans_of(router, count):
    """Wait until so many pages were asked for."""
    while router.requests.count(Op.SCAN) < count:
        time.sleep(0.001)


def test_from_the_second_page_on_the_next_one_is_asked_for_while_one_is_used(paged):
    with Client(paged.address) as db:
        rows = db.scan()
        assert [next(rows) for _ in range(10)] == ROWS[:10]
        db.ping()
        assert paged.requests.count(Op.SCAN) == 1
        next(rows)
        scans_of(paged, 3)
        assert list(rows) == ROWS[11:]
        assert paged.requests.count(Op.SCAN) == 6
        assert paged.connections == 1


def test_scans_that_nobody_goes_on_with_hold_nothing_that_others_need(paged):
    with Client(paged.address, connections_max=2, timeout=5) as db:
        scans = [db.scan() for _ in range(5)]
        for rows in scans:
            assert [next(rows) for _ in range(15)] == ROWS[:15]
        db.put("other", "v")
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda number: db.put("other", str(number)), range(20)))
        assert paged.connections <= 2
        del paged.store[b"other"]
        for rows in scans:
            assert list(rows) == ROWS[15:]
        assert paged.connections <= 2


def test_a_scan_that_is_dropped_leaves_no_page_for_another_call(paged):
    with Client(paged.address, connections_max=2) as db:
        for _ in range(5):
            rows = db.scan()
            assert [next(rows) for _ in range(15)] == ROWS[:15]
            del rows
            assert db.get(b"007") == b"v"
        while paged.connections > 1:
            time.sleep(0.001)


def test_a_page_asked_for_ahead_whose_connection_breaks_is_asked_for_again(paged):
    with Client(paged.address) as db:
        rows = []
        for number, row in enumerate(db.scan()):
            rows.append(row)
            if number % 10 == 3:
                paged.cut_after = Op.SCAN
        assert rows == ROWS


def test_a_page_asked_for_ahead_that_is_refused_is_asked_for_again(paged):
    with Client(paged.address) as db:
        rows = []
        for number, row in enumerate(db.scan()):
            rows.append(row)
            if number % 10 == 3:
                paged.refusals = [Overloaded("Too much at once."), Draining("This process is shutting down.")]
        assert rows == ROWS


def test_the_timeout_of_a_page_begins_when_it_is_needed_and_covers_it(paged):
    with Client(paged.address) as db:
        rows = db.scan(timeout=0.2)
        next(rows)
        paged.delay_s = lambda op: 0.0 if paged.requests.count(Op.SCAN) < 4 else 60.0
        assert [next(rows) for _ in range(29)] == ROWS[1:30]
        time.sleep(0.25)
        with pytest.raises(DeadlineExceeded):
            next(rows)


def test_a_scan_goes_on_in_parent_and_child_after_a_fork(paged):
    with Client(paged.address) as db:
        rows = db.scan()
        assert [next(rows) for _ in range(15)] == ROWS[:15]
        child = os.fork()
        if child == 0:
            os._exit(0 if list(rows) == ROWS[15:] else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert list(rows) == ROWS[15:]


def test_a_scan_of_a_closed_client_says_so(paged):
    with Client(paged.address) as db:
        rows = db.scan()
        assert [next(rows) for _ in range(15)] == ROWS[:15]
    assert [next(rows) for _ in range(5)] == ROWS[15:20]
    with pytest.raises(ClientClosed):
        next(rows)
    while paged.connections:
        time.sleep(0.001)
