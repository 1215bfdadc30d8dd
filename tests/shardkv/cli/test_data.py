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
    quit
    put never reached
    """
    done = run("shell", stdin=script)
    assert done.code == 0
    assert done.lines == [
        "ok", "ok", "John Smith", "(not found)", "user:1000\tJohn Smith", "user:1001\tAnn", "(2 rows)", "ok, 2 written",
        "deleted", "(not found)", "user:1000\tJohn Smith", "(1 row)",
    ]  # fmt: skip
    assert set(router.store) == {b"user:1000", b"p", b"q"}


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
