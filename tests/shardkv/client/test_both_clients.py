"""What holds for the blocking and the asyncio client alike: names, results, faults, deadlines."""

from __future__ import annotations

import inspect
import pickle
import re
import socket
import time

import pytest

from shardkv import (
    AsyncClient,
    Client,
    ClientClosed,
    ConditionFailed,
    DeadlineExceeded,
    InvalidArgument,
    InvalidRange,
    OutcomeUnknown,
    Overloaded,
    RouterUnavailable,
    ShardUnavailable,
    UnknownKeyspace,
    VersionMismatch,
    WriteBatch,
)
from shardkv.wire.messages import Hello, Op, ShardProblem
from tests.shardkv.client.dict_router import DictRouter
from tests.shardkv.client.faces import FACES, open_face


def public(kind):
    return {name: member for name, member in inspect.getmembers(kind) if not name.startswith("_")}


def test_both_have_the_same_names_and_arguments():
    blocking, awaitable = public(Client), public(AsyncClient)
    assert blocking.keys() == awaitable.keys()
    for name, member in blocking.items():
        assert list(inspect.signature(member).parameters) == list(inspect.signature(awaitable[name]).parameters), name


def test_one_key(db):
    assert db.get("k") is None
    assert db.put("k", "v1") < db.put("k", "v2")
    db.put(b"k", b"v2")
    assert db.get("k") == b"v2"
    assert db.delete("k") is True
    assert db.delete("k") is False
    assert db.get(b"k") is None


def test_many_keys(db):
    db.put_many({"user:1001": "Alice", "user:1002": b"Bob"})
    db.batch_put(["user:1003", "user:1004"], ["Carol", "Dave"])
    assert list(db.get_many(["user:1002", "nope", "user:1001"]).items()) == [
        ("user:1002", b"Bob"),
        ("nope", None),
        ("user:1001", b"Alice"),
    ]
    assert db.get_many([b"user:1004"]) == {b"user:1004": b"Dave"}
    assert db.delete_many(["user:1001", "user:1003", "user:1001", "nope"]) == 2
    assert db.get_many([]) == {}
    assert db.delete_many(iter([])) == 0


AWAY = ShardProblem(7, "shard_unavailable", "Shard 7 is away.", {"start": 2**40, "stop": None}, "")


def test_a_partial_read_has_what_could_be_read_and_says_what_it_lacks(db, router):
    version = db.put("a", "1")
    db.put_many({"lost": "2", "c": "3"})
    router.lost_keys = {b"lost": AWAY}
    found = db.get_many(["c", "lost", "none", "a"], on_shard_error="partial")
    assert list(found.items()) == [("c", b"3"), ("none", None), ("a", b"1")]
    (missing,) = found.missing
    assert (missing.shard, missing.start, missing.stop, missing.tokens) == (7, b"", None, (2**40, 2**64))
    assert isinstance(missing.error, ShardUnavailable)
    both = db.get_many([b"lost", b"a"], on_shard_error="partial", with_version=True)
    assert both == {b"a": (b"1", version)}
    assert [one.shard for one in both.missing] == [7]
    whole = db.get_many(["a"], on_shard_error="partial")
    assert (whole, whole.missing) == ({"a": b"1"}, [])
    assert db.get_many(["lost"]) == {"lost": b"2"}


def test_a_partial_read_of_many_requests_names_a_shard_once(db, router):
    keys = [f"k{number:04}" for number in range(2500)]
    db.put_many(dict.fromkeys(keys, "v"))
    router.lost_keys = {key.encode(): AWAY for key in keys[::1000]}
    found = db.get_many(keys, on_shard_error="partial")
    assert list(found) == [key for number, key in enumerate(keys) if number % 1000]
    assert [missing.shard for missing in found.missing] == [7]


def test_a_partial_count_is_a_number_that_says_what_it_lacks(db, router):
    db.put_many({"a": "1", "b": "2", "c": "3"})
    router.lost_keys = {b"b": AWAY}
    found = db.count("a", "c", on_shard_error="partial")
    assert found == 1
    assert [(missing.shard, missing.start, missing.stop) for missing in found.missing] == [(7, b"a", b"c")]
    assert db.count("c", on_shard_error="partial").missing == []
    assert db.count("d", "d", on_shard_error="partial") == 0
    assert db.count() == 3


def test_what_to_do_without_a_shard_is_checked(db, router):
    with pytest.raises(InvalidArgument, match="on_shard_error"):
        db.get_many(["k"], on_shard_error="ignore")
    with pytest.raises(InvalidArgument, match="on_shard_error"):
        db.count(on_shard_error="ignore")
    assert router.requests == []


def test_compare_and_set(db, router):
    first = db.put("k", "1", if_absent=True)
    assert db.get("k", with_version=True) == (b"1", first)
    assert db.get("none", with_version=True) is None
    second = db.put("k", "2", if_version=first)
    with pytest.raises(ConditionFailed) as caught:
        db.put("k", "3", if_version=first)
    detail = {"key": b"k", "expected": first, "found": second}
    assert {name: caught.value.detail[name] for name in detail} == detail
    with pytest.raises(ConditionFailed):
        db.put("k", "3", if_absent=True)
    with pytest.raises(ConditionFailed):
        db.delete("k", if_version=first)
    assert db.get_many(["none", "k"], with_version=True) == {"none": None, "k": (b"2", second)}
    assert db.delete("k", if_version=second) is True
    assert db.put("k", "4", if_version=0) > second
    assert len(router.requests) == 10


def test_a_batch_under_conditions(db, router):
    seen = db.put("a", "1")

    def fill(batch):
        batch.put("b", "2")
        batch.delete("a")

    with pytest.raises(ConditionFailed):
        db.write_in_batch(fill, if_versions={"a": seen, "b": 5})
    assert router.store == {b"a": b"1"}
    db.write_in_batch(fill, if_versions={b"a": seen, b"b": 0})
    assert router.store == {b"b": b"2"}
    batch = WriteBatch()
    assert db.write(batch, if_versions={"a": 5}) is None
    batch.put("c", "3")
    assert db.write(batch, if_versions={}) == router.version
    assert router.writes[-1].conditions is None


def test_counting_with_incr(db, router):
    assert db.incr("n") == 1
    assert db.incr("n", 41) == 42
    assert db.incr("n", by=-2, ttl=1.5) == 40
    assert db.get("n") == b"40"
    assert [(write.values, write.ttl_ms) for write in router.writes] == [
        ([b"1"], None),
        ([b"41"], None),
        ([b"-2"], 1500),
    ]


def test_a_time_to_live_is_sent_in_milliseconds(db, router):
    db.put("k", "v", ttl=2)
    db.put("k", "v", ttl=0.0001)
    db.put_many({"a": "1", "b": "2"}, ttl=0.25)
    db.batch_put(["a"], ["1"], ttl=60)
    db.put("k", "v")
    assert [write.ttl_ms for write in router.writes] == [2000, 1, 250, 60_000, None]


def test_ranges_are_counted_and_deleted(db, router):
    router.store = {f"user:{number}".encode(): b"v" for number in range(1000, 1010)} | {b"other": b"v"}
    router.page_rows = 3
    assert db.count() == 11
    assert db.count(prefix="user:") == 10
    assert db.count("user:1002", "user:1005") == 3
    assert db.count("x") == db.count("a", "a") == 0
    assert db.delete_range("user:1002", "user:1006") == 4
    assert db.delete_range(prefix="user:", limit=2) == 2
    assert sorted(router.store) == [b"other", *[b"user:%d" % number for number in range(1006, 1010)]]
    asked = len(router.requests)
    assert db.delete_range(limit=0) == db.delete_range("a", "a") == db.count("b", prefix="a") == 0
    assert len(router.requests) == asked
    assert db.delete_range() == 5
    assert not router.store


def test_a_range_goes_on_over_another_connection(db, router):
    router.store = {b"%d" % number: b"v" for number in range(10)}
    router.page_rows = 4
    router.cut_after = Op.DELETE_RANGE
    assert db.delete_range() == 6, "what the lost answer told is not counted"
    assert not router.store
    router.store = {b"%d" % number: b"v" for number in range(10)}
    router.cut_after = Op.COUNT
    assert db.count() == 10
    router.cut_after = Op.DELETE_RANGE
    with pytest.raises(OutcomeUnknown) as caught:
        db.delete_range(limit=5)
    assert caught.value.detail["deleted"] == 0
    assert len(router.store) == 6


@pytest.mark.parametrize(
    "call",
    [
        lambda db: db.put("k", "v", if_absent=True, if_version=1),
        lambda db: db.put("k", "v", if_version=-1),
        lambda db: db.put("k", "v", if_version="1"),
        lambda db: db.put("k", "v", if_version=2**64),
        lambda db: db.delete("k", if_version=True),
        lambda db: db.put("k", "v", ttl=0),
        lambda db: db.put("k", "v", ttl=-1),
        lambda db: db.put("k", "v", ttl=True),
        lambda db: db.put("k", "v", ttl="1"),
        lambda db: db.put("k", "v", ttl=float("nan")),
        lambda db: db.put("k", "v", ttl=float("inf")),
        lambda db: db.put_many({"k": "v"}, ttl=0),
        lambda db: db.incr("n", 1.0),
        lambda db: db.incr("n", "1"),
        lambda db: db.incr("n", True),
        lambda db: db.incr("n", 2**63),
        lambda db: db.incr("n", ttl=0),
        lambda db: db.write_in_batch(lambda batch: batch.put("a", "1"), if_versions=["a"]),
        lambda db: db.write_in_batch(lambda batch: batch.put("a", "1"), if_versions={"a": None}),
        lambda db: db.delete_range(limit=-1),
        lambda db: db.delete_range(limit=1.5),
        lambda db: db.count(5),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_sent(call, db, router):
    with pytest.raises(InvalidArgument):
        call(db)
    assert not router.requests


def test_a_range_the_wrong_way_round_is_neither_counted_nor_deleted(db, router):
    for call in (db.count, db.delete_range):
        with pytest.raises(InvalidRange):
            call("b", "a")
    assert not router.requests


def test_more_keys_than_a_request_holds(db, router):
    pairs = {f"k{number:05}": str(number).encode() for number in range(12_345)}
    db.put_many(pairs)
    assert len(router.store) == 12_345
    assert router.requests.count(Op.WRITE) == 13
    assert db.get_many(pairs) == pairs
    assert db.delete_many(pairs) == 12_345


def test_a_batch_is_written_at_its_end(db, router):
    router.store[b"gone"] = b"1"

    def fill(batch):
        batch.put("a", "1")
        batch.delete("gone")
        assert not router.requests

    db.write_in_batch(fill)
    assert router.store == {b"a": b"1"}
    assert router.requests == [Op.WRITE]


def test_a_batch_that_raises_writes_nothing(db, router):
    def fill(batch):
        batch.put("a", "1")
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        db.write_in_batch(fill)
    assert not router.requests
    assert not router.store


def test_a_batch_can_be_used_again(db, router):
    batch = WriteBatch()
    batch.put("a", "1")
    db.write(batch)
    db.write(batch)
    assert router.requests == [Op.WRITE, Op.WRITE]


def test_scans(db, router):
    router.store = {f"user:{number}".encode(): b"v%d" % number for number in range(1000, 1010)}
    router.page_rows = 3
    assert list(db.scan("user:1000", "user:1003")) == [(b"user:100%d" % n, b"v100%d" % n) for n in range(3)]
    assert [key for key, _ in db.get_range("user:1000", "user:1003")] == [b"user:100%d" % n for n in range(4)]
    assert list(db.scan(prefix="user:", keys_only=True)) == sorted(router.store)
    assert list(db.scan(keys_only=True, reverse=True, limit=4)) == sorted(router.store, reverse=True)[:4]
    assert list(db.scan("x")) == list(db.scan(limit=0)) == list(db.scan("a", "a")) == []
    assert len(list(db.get_range("user:1000", "user:1009", reverse=True, limit=7))) == 7


def test_a_scan_goes_on_by_its_cursor(db, router):
    router.page_rows = 4
    router.store.update({b"k%02d" % n: b"v%d" % n for n in range(10)})
    scan = db.scan(prefix="k")
    got = [next(scan) for _ in range(6)]
    assert scan.cursor is not None
    later = db.scan(cursor=scan.cursor, limit=3)
    got += list(later)
    rest = db.scan(cursor=later.cursor)
    got += list(rest)
    assert got == [(b"k%02d" % n, b"v%d" % n) for n in range(10)]
    assert rest.cursor is None
    down = db.scan(prefix="k", reverse=True, limit=2)
    assert list(down) == [(b"k09", b"v9"), (b"k08", b"v8")]
    assert list(db.scan(cursor=down.cursor, keys_only=True)) == [b"k%02d" % n for n in range(7, -1, -1)]


def test_bad_arguments_of_a_scan_are_told_at_the_call(db, router):
    with pytest.raises(InvalidRange):
        db.scan("b", "a")
    with pytest.raises(InvalidArgument):
        db.get_range("a", None)
    assert not router.requests


@pytest.mark.parametrize("face", FACES)
def test_decoded_responses(face, router):
    with open_face(face, router.address, decode_responses=True) as db:
        db.put_many({"å": "ä", b"b": "c"})
        assert db.get("å") == "ä"
        assert db.get_many(["å", "x"]) == {"å": "ä", "x": None}
        assert list(db.scan()) == [("b", "c"), ("å", "ä")]
        assert list(db.scan(keys_only=True, reverse=True)) == ["å", "b"]
        db.put("raw", b"\xff")
        with pytest.raises(InvalidArgument, match="not UTF-8"):
            db.get("raw")


def test_ping_and_status(db):
    assert 0 < db.ping() < 1000
    assert db.status() == {"nodes": []}


def test_bad_input_sends_nothing(db, router):
    for call in (
        lambda: db.put("", "v"),
        lambda: db.put(1, "v"),
        lambda: db.get_many("abc"),
        lambda: db.put("k", None),
    ):
        with pytest.raises(Exception, match=r"\.$|\. "):
            call()
    for timeout in (0, -1, "1", True, float("nan"), float("inf")):
        with pytest.raises(InvalidArgument, match="timeout"):
            db.get("k", timeout=timeout)
    assert not router.requests


@pytest.mark.parametrize("face", FACES)
def test_an_unknown_keyspace_is_named(face, router):
    with open_face(face, router.address, keyspace="orders") as db, pytest.raises(UnknownKeyspace, match="orders"):
        db.get("k")


# Faults


def test_an_overloaded_process_is_left_alone_for_as_long_as_it_asks(db, router):
    router.refusals = [Overloaded("Busy.", detail={"retry_after_ms": 300})]
    began = time.monotonic()
    db.put("k", "v", timeout=10)
    assert time.monotonic() - began >= 0.3
    assert router.store == {b"k": b"v"}


def test_a_retriable_refusal_is_tried_again(db, router):
    router.refusals = [Overloaded("Busy."), ShardUnavailable("Away.")]
    db.put("k", "v")
    assert router.requests == [Op.WRITE] * 3
    assert router.store == {b"k": b"v"}


def test_a_lasting_refusal_names_its_reason_at_the_deadline(db, router):
    router.refusals = [ShardUnavailable("Shard 3 is away.", detail={"shard": 3}) for _ in range(1000)]
    began = time.monotonic()
    with pytest.raises(ShardUnavailable, match="Shard 3") as caught:
        db.get("k", timeout=0.3)
    assert time.monotonic() - began < 0.6
    assert caught.value.detail["shard"] == 3
    assert len(router.requests) < 60


def test_a_read_survives_a_cut_connection(db, router):
    router.store[b"k"] = b"v"
    router.cut_after = Op.READ
    assert db.get("k") == b"v"
    assert router.requests == [Op.READ, Op.READ]


def test_a_scan_survives_cut_connections_between_and_within_pages(db, router):
    router.store = {b"%03d" % number: b"v" for number in range(100)}
    router.page_rows = 10
    router.cut_after = Op.SCAN
    assert list(db.scan(keys_only=True)) == sorted(router.store)


def test_a_cut_write_is_sent_again_with_its_token_and_made_once(db, router):
    for expected in range(1, 6):
        router.cut_after = Op.WRITE
        assert db.incr("n") == expected
    assert router.store == {b"n": b"5"} and router.requests == [Op.WRITE] * 10
    first, again = (write.token for write in router.writes[:2])
    assert (first.lane, first.number) == (again.lane, again.number) and (first.again, again.again) == (False, True)
    assert [write.token.number for write in router.writes[::2]] == [1, 2, 3, 4, 5]
    router.cut_after = Op.WRITE
    assert db.delete_many(["n", "nothing"]) == 1


def test_a_write_that_was_cut_and_is_refused_ever_after_is_still_unknown(db, router):
    router.cut_after = Op.WRITE
    before = router.on_request

    def refuse_after_the_first(connection, request, deadline):
        if router.writes:
            raise Overloaded("Not now.")
        before(connection, request, deadline)

    router.on_request = refuse_after_the_first
    with pytest.raises(OutcomeUnknown, match="may or may not"):
        db.put("k", "v", timeout=0.5)
    assert router.store == {b"k": b"v"}


def test_a_refusal_for_good_after_a_cut_is_told_as_it_is(db, router):
    router.lost_keys[b"k"] = ShardProblem(7, "outcome_unknown", "The node went away.", {}, "")
    told = []

    def look(op):
        told.append(op)
        router.lost_keys.clear()
        router.versions[b"k"] = 77
        return 0.0

    router.delay_s = look
    with pytest.raises(ConditionFailed) as caught:
        db.put("k", "v", if_absent=True)
    assert caught.value.detail["found"] == 77 and len(router.writes) == 2


@pytest.mark.parametrize("face", FACES)
def test_without_retries_a_cut_write_is_told_as_unknown_and_not_sent_again(router, face):
    with open_face(face, router.address, retry_writes=False) as db:
        router.cut_after = Op.WRITE
        with pytest.raises(OutcomeUnknown, match="may or may not"):
            db.put("k", "v")
    assert router.requests == [Op.WRITE] and router.writes[0].token is None
    assert router.store == {b"k": b"v"}


def test_a_late_answer_reaches_nobody_else(db, router):
    router.store = {b"a": b"1", b"b": b"2"}
    router.delay_s = lambda op: 0.3
    with pytest.raises(DeadlineExceeded, match=r"0\.1 s"):
        db.get("a", timeout=0.1)
    router.delay_s = lambda op: 0.0
    for _ in range(10):
        assert db.get("b") == b"2"


def test_a_write_without_answer_by_its_deadline_is_unknown(db, router):
    router.delay_s = lambda op: 0.5
    with pytest.raises(OutcomeUnknown):
        db.put("k", "v", timeout=0.1)


def test_a_shard_that_is_lost_for_part_of_a_write(db, router):
    router.lost_keys[b"k2"] = ShardProblem(7, "store_poisoned", "The disk failed.", {}, "")
    with pytest.raises(Exception, match="Of 3 operations 2 were applied") as caught:
        db.put_many({"k1": "v", "k2": "v", "k3": "v"})
    assert caught.value.detail["shards"] == [7]
    assert set(router.store) == {b"k1", b"k3"}


def test_a_shard_that_comes_back_within_the_deadline(db, router):
    class ComesBack(dict):
        def get(self, key, default=None):
            return self.pop(key, default)

    router.lost_keys = ComesBack({b"k2": ShardProblem(7, "shard_unavailable", "Away.", {}, "")})
    db.put_many({"k1": "v", "k2": "v"})
    assert set(router.store) == {b"k1", b"k2"}
    assert router.requests == [Op.WRITE, Op.WRITE]


def test_a_router_that_restarts_is_found_again(db, router):
    db.put("k", "v")
    router.stop()
    router.listen()
    assert db.get("k") == b"v"
    router.stop()
    router.listen()
    db.ping()
    db.put("k", "w")
    assert router.store == {b"k": b"w"}


@pytest.mark.parametrize("face", FACES)
def test_the_other_router_is_used_when_one_is_gone(face, router):
    with DictRouter() as other, open_face(face, [router.address, other.address], timeout=2) as db:
        for running in (router, other):
            running.store = {b"k": b"v"}
        assert db.get("k") == b"v"
        router.stop()
        assert db.get("k") == b"v"
        router.listen()
        other.stop()
        assert db.get("k") == b"v"


@pytest.mark.parametrize("face", FACES)
def test_no_router_at_all(face):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
        with open_face(face, address, timeout=0.3) as db:
            began = time.monotonic()
            with pytest.raises(RouterUnavailable, match=address) as caught:
                db.put("k", "v")
            assert re.search(r"refused|connect call failed", str(caught.value), re.IGNORECASE)
            assert 0.2 < time.monotonic() - began < 0.8


@pytest.mark.parametrize("face", FACES)
def test_something_that_never_answers(face):
    silent = socket.create_server(("127.0.0.1", 0))
    with silent, open_face(face, f"127.0.0.1:{silent.getsockname()[1]}", timeout=0.3) as db:
        began = time.monotonic()
        with pytest.raises(RouterUnavailable):
            db.get("k")
        assert time.monotonic() - began < 0.8


@pytest.mark.parametrize("face", FACES)
def test_a_router_of_another_version_is_named(face, router, monkeypatch):
    def old_hello(me):
        return Hello("shardkv", 1, me.role, me.name, None, 0, None, False)

    monkeypatch.setattr("shardkv.wire.hello.PROTOCOL_VERSION", 2)
    monkeypatch.setattr("shardkv.wire.hello.Identity.hello", old_hello)
    with open_face(face, router.address, timeout=0.5) as db, pytest.raises(VersionMismatch, match="version 1"):
        db.get("k")


def test_use_after_close(db, router):
    db.put("k", "v")
    db.close()
    db.close()
    for call in (lambda: db.get("k"), lambda: db.scan(), lambda: db.put("k", "v"), lambda: db.ping()):
        with pytest.raises(ClientClosed):
            call()
    assert router.requests == [Op.WRITE]


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_pickling_is_refused_with_a_reason(kind):
    with pytest.raises(TypeError, match="Create one in each process"):
        pickle.dumps(kind("127.0.0.1:1"))


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("address", ["", "localhost", "host:port", [], 7, [7], "127.0.0.1:99999"])
def test_bad_addresses_are_refused(kind, address):
    with pytest.raises(InvalidArgument):
        kind(address)
    with pytest.raises(InvalidArgument):
        kind("127.0.0.1:1", keyspace="")
