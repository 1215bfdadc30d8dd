"""put, get, delete, ping, scan, shell and bench, as their output and exit codes."""

from __future__ import annotations

import json
import os

import pytest

from shardkv.cli.bench import percentiles_ms
from shardkv.cli.options import printable


def test_put_get_delete(run, router):
    assert run("put", "user:1000", "John").code == 0
    done = run("get", "user:1000")
    assert (done.code, done.out) == (0, b"John")
    assert run("delete", "user:1000").code == 0
    for verb in ("get", "delete"):
        done = run(verb, "user:1000")
        assert (done.code, done.out) == (1, b"")
        assert "user:1000" in done.err


def test_bytes_that_are_not_text_survive(run, router):
    value = os.fsdecode(b"\xff\xfe")
    run("put", "raw", value)
    assert router.store == {b"raw": b"\xff\xfe"}
    assert run("get", "raw").out == b"\xff\xfe"


def test_a_value_may_look_like_an_option(run, router):
    assert run("put", "k", "-5").code == 0
    assert router.store == {b"k": b"-5"}


def test_compare_and_set(run, router):
    first = json.loads(run("put", "k", "1", "--if-absent", "--json").out)["version"]
    assert run("get", "k", "--with-version").out == b"%d\t1" % first
    assert json.loads(run("get", "k", "--json").out) == {"key": "k", "value": "1", "version": first}
    for condition in (["--if-absent"], ["--if-version", "77"]):
        done = run("put", "k", "2", *condition)
        assert (done.code, done.out) == (1, b"")
        assert "It is not so." in done.err
    assert run("put", "k", "2", "--if-version", str(first)).code == 0
    assert router.store == {b"k": b"2"}
    assert run("put", "k", "2", "--if-version", "1", "--if-absent").code == 2
    assert run("get", "none", "--with-version").code == 1


def test_a_time_to_live_is_in_seconds(run, router):
    assert run("put", "k", "v", "--ttl", "1.5").code == 0
    assert run("incr", "n", "--ttl", "60").out == b"1\n"
    assert [write.ttl_ms for write in router.writes] == [1500, 60_000]
    assert run("put", "k", "v", "--ttl", "0").code == 2


def test_incr(run, router):
    assert run("incr", "n").out == b"1\n"
    assert run("incr", "n", "--by", "-5").out == b"-4\n"
    assert run("incr", "n", "--by", "x").code == 2
    assert router.store == {b"n": b"-4"}


def test_count(run, router):
    router.store = {b"a": b"1", b"b1": b"2", b"b2": b"3"}
    assert run("count").out == b"3\n"
    assert run("count", "b", "b2").out == b"1\n"
    assert run("count", "--prefix", "b", "--json").out == b'{"count":2}\n'
    assert run("count", "b", "a").code == 2


def test_delete_range_wants_to_be_told_what_and_that_it_may(run, router):
    router.store = {b"a": b"1", b"b1": b"2", b"b2": b"3", b"c": b"4"}
    for arguments in ([], ["--yes"], ["--all", "a"], ["--all", "--prefix", "b"]):
        done = run("delete-range", *arguments)
        assert (done.code, "Say what to delete" in done.err) == (2, True)
    done = run("delete-range", "--prefix", "b")
    assert (done.code, done.out) == (2, b"")
    assert "Delete 2 keys beginning with b in keyspace default? There is no terminal to ask on" in done.err
    assert len(router.store) == 4
    assert run("delete-range", "b", "b2", "--yes").lines == ["1 key deleted."]
    assert run("delete-range", "--prefix", "b", "--yes", "--json").out == b'{"deleted":1}\n'
    assert run("delete-range", "--all", "--limit", "1", "--yes").lines == ["1 key deleted."]
    assert router.store == {b"c": b"4"}
    assert run("delete-range", "--all", "--yes").lines == ["1 key deleted."]


def test_delete_range_goes_on_as_long_as_it_gets_on(run, router):
    router.store = {b"%03d" % number: b"v" for number in range(60)}
    router.page_rows = 10
    router.delay_s = lambda op: 0.3
    done = run("delete-range", "--all", "--yes", "--timeout", "1")
    assert done.code == 0, done.err
    assert done.lines[0].endswith("keys deleted.")
    assert len(router.requests) > 3
    assert not router.store
    router.store = {b"k": b"v"}
    router.delay_s = lambda op: 10
    assert run("delete-range", "--all", "--yes", "--timeout", "0.2").code == 3


def test_ping(run, router):
    assert router.address in run("ping").lines[0]
    assert json.loads(run("ping", "--json").out)["round_trip_ms"] > 0


def test_scan(run, router):
    router.store = {b"a": b"1", b"b": b"two\nlines", b"\xff": b"\x00"}
    assert run("scan").lines == ["a\t1", "b\ttwo\\nlines", "\\xff\t\\x00"]
    assert run("scan", "a", "b").lines == ["a\t1"]
    assert run("scan", "b", "--keys-only", "--reverse").lines == ["\\xff", "b"]
    assert run("scan", "--limit", "1").lines == ["a\t1"]
    assert run("scan", "--prefix", "b", "--json").lines == ['{"key":"b","value":"two\\nlines"}']
    assert run("scan", "--keys-only", "--json", "--limit", "1").lines == ['{"key":"a"}']
    assert run("scan", "--prefix", "nothing").code == 0


def test_a_scan_goes_on_by_its_cursor(run, router):
    router.store = {b"k%d" % n: b"v" for n in range(5)}
    first = run("scan", "--keys-only", "--limit", "3", "--show-cursor")
    assert first.lines == ["k0", "k1", "k2"]
    cursor = first.err.removeprefix("cursor: ").strip()
    rest = run("scan", "--cursor", cursor, "--show-cursor")
    assert rest.lines == ["k3\tv", "k4\tv"]
    assert rest.err == "cursor: nothing is left\n"
    refused = run("scan", "k1", "--cursor", cursor)
    assert refused.code != 0
    assert "Leave out start" in refused.err


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (b"plain text", "plain text"),
        ("å".encode(), "å"),
        (b"\\n", "\\n"),
        (b"a\tb", "a\\tb"),
        (b"\x1b[31m", "\\x1b[31m"),
    ],
)
def test_what_cannot_be_printed_is_escaped(value, text):
    assert printable(value) == text


def test_shell_from_a_pipe(run, router):
    script = b"""
    put user:1000 'John Smith'   # a comment
    put user:1001 Ann
    get user:1000
    get nobody
    range user:1000 user:1001
    batch p 1 q 2
    delete user:1001
    delete user:1001
    scan user: 1
    incr n --by 5
    incr n
    put --if-absent --ttl 60 user:1002 --ttl 5 is part of it
    get user:1002
    put --if-version 99 user:1002 x
    get --with-version user:1000
    count user:1000 user:1002
    count --prefix p
    delete-range --prefix user:
    delete-range --prefix user: --yes
    delete-range a o --limit 5 --yes
    put --ttl 5
    put --ttl 5 k
    put "--ttl" 5 k
    delete-range --yes
    incr
    get
    get --with-version
    incr n --by x
    quit
    put never reached
    """
    done = run("shell", stdin=script)
    assert done.code == 2
    assert done.lines == [
        "ok", "ok", "John Smith", "(not found)", "user:1000\tJohn Smith", "user:1001\tAnn", "(2 rows)", "ok, 2 written",
        "deleted", "(not found)", "user:1000\tJohn Smith", "(1 row)", "5", "6", "ok", "--ttl 5 is part of it",
        "1\tJohn Smith", "1", "1", "2 keys deleted", "1 key deleted", "ok",
    ]  # fmt: skip
    assert router.store == {b"p": b"1", b"q": b"2", b"--ttl": b"5 k"}
    assert done.err.count("Error: ") == 9
    assert "Nothing was deleted: the range has 2 keys. Add --yes to delete." in done.err
    assert "Quote a KEY that begins with --." in done.err
    assert [write.ttl_ms for write in router.writes if write.ttl_ms] == [60_000]


def test_an_error_ends_its_line_and_not_the_shell(run, router):
    done = run("shell", stdin=b"nonsense\nget\nput 'k\nput '' v\nbatch a\nput k v\nping\nhelp\n")
    assert done.code == 2
    assert router.store == {b"k": b"v"}
    assert done.err.count("Error: ") == 5
    assert "Write: get KEY" in done.err
    assert any(line.startswith("range START END") for line in done.lines)


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ('put k {"a":1}', "k", '{"a":1}'),
        ('put "two words" [1, "x"]  ', "two words", '[1, "x"]'),
        ("put k it's #1 \\ here", "k", "it's #1 \\ here"),
        ("PUT k 'John Smith'  # quoted as a whole", "k", "John Smith"),
        ('put k "a" "b"', "k", '"a" "b"'),
        ("put k ''", "k", ""),
    ],
)
def test_the_shell_stores_a_value_as_it_is_typed(line, key, value, run, router):
    done = run("shell", stdin=line.encode())
    assert (done.code, done.lines) == (0, ["ok"]), done.err
    assert router.store == {key.encode(): value.encode()}


def test_the_shell_helps_with_one_command_and_with_a_word_too_many(run, router):
    assert run("shell", stdin=b"help get").lines[0].startswith("get KEY")
    assert len(run("shell", stdin=b"?").lines) > 5
    assert "Leave the first word out." in run("shell", stdin=b"shardkv get a").err


WORKLOADS = ["fill", "read", "mixed", "scan", *(f"ycsb-{letter}" for letter in "abcdef")]


@pytest.mark.parametrize("workload", WORKLOADS)
def test_bench_runs_every_workload(workload, run, router):
    done = run("bench", "--workload", workload, "--keys", "300", "--operations", "200", "--clients", "2",
               "--pipeline", "3", "--value-bytes", "10", "--json")  # fmt: skip
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert told["operations"] == 200
    assert told["errors"] == {}
    assert told["operations_per_second"] > 0
    assert set(told["latency_ms"]) == {"p50", "p99", "p99.9", "max"}
    assert sum(part["operations"] for part in told["by_operation"].values()) == 200
    assert len(router.store) == (
        200 if workload == "fill" else 300 + told["by_operation"].get("insert", {}).get("operations", 0)
    )
    assert all(len(value) == 10 for value in router.store.values())
    if workload in ("scan", "ycsb-e"):
        assert told["rows_scanned"] > 200


def test_bench_counts_errors(run, router):
    from shardkv.errors import InvalidArgument

    run("bench", "--workload", "fill", "--keys", "50")
    router.refusals = [InvalidArgument("No.") for _ in range(7)]
    router.refusals.insert(0, InvalidArgument("No."))
    done = run("bench", "--workload", "fill", "--keys", "50", "--json")
    assert json.loads(done.out)["errors"] == {"invalid_argument": 8}
    assert json.loads(done.out)["operations"] == 42


def test_percentiles():
    assert percentiles_ms([]) == {}
    took = [number / 1000 for number in range(1, 1001)]
    assert percentiles_ms(took) == {"p50": 501.0, "p99": 991.0, "p99.9": 1000.0, "max": 1000.0}
