"""Bad input from users: one clear sentence, nothing lost, nothing crashed, and an end in time."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import pytest

from shardkv import Client, WriteBatch
from shardkv.errors import (
    BatchTooLarge,
    InvalidArgument,
    InvalidKey,
    InvalidRange,
    KeyTooLarge,
    RequestError,
    RouterUnavailable,
    ShardKVError,
    UnknownKeyspace,
    ValueTooLarge,
)
from shardkv.limits import Limits
from tests.cluster.test_hostile_peers import unharmed
from tests.worlds.cluster import ClusterWorld, cluster_world, shardkv
from tests.worlds.ports import free_port

KIB, MIB = 1024, 1024 * 1024
KEY_MAX, VALUE_MAX = 64 * KIB, 16 * MIB
OPERATIONS_MAX = 10_000
SMALL_LIMITS = """
[limits]
key_bytes_max = 100
value_bytes_max = 1000
operations_max = 50
"""
SMALL = Limits(key_bytes_max=100, value_bytes_max=1000, operations_max=50)
LARGE = Limits(key_bytes_max=100 * KIB, value_bytes_max=17 * MIB, frame_bytes_max=40 * MIB)
LARGE_LIMITS = f"""
[limits]
key_bytes_max = {LARGE.key_bytes_max}
value_bytes_max = {LARGE.value_bytes_max}
frame_bytes_max = {LARGE.frame_bytes_max}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterWorld]:
    directory = tmp_path_factory.mktemp("input")
    with cluster_world(directory, "--partition", "range", "--nodes", "2", "--shards", "4") as found:
        yield found


@pytest.fixture(scope="module", autouse=True)
def waiting() -> Iterator[subprocess.Popen[str]]:
    """A command that looks for a router that is not there, meanwhile."""
    found = subprocess.Popen(
        shardkv("--router", f"127.0.0.1:{free_port()}", "get", "a"), stderr=subprocess.PIPE, text=True
    )
    with found:
        yield found


@pytest.fixture
def db(world: ClusterWorld) -> Iterator[Client[bytes]]:
    with unharmed(world), world.client(timeout=20) as client:
        yield client


def is_sentence(message: str) -> bool:
    return message.endswith(".") and len(message) > 20 and "Error(" not in message and "Traceback" not in message


def refusal(call: Callable[[], object], expected: type[ShardKVError] = InvalidArgument) -> str:
    """The message of the error that `call` must raise."""
    with pytest.raises(expected) as caught:
        call()
    assert type(caught.value) is expected
    assert isinstance(caught.value, RequestError)
    assert is_sentence(str(caught.value)), str(caught.value)
    return str(caught.value)


# Keys, values, batches


def test_an_empty_key_is_refused_wherever_it_comes(db: Client[bytes]) -> None:
    batch = WriteBatch()
    bad: dict[str, Any] = {"beside": "value", "": "value"}
    for call in (
        lambda: db.put("", "value"),
        lambda: db.get(b""),
        lambda: db.delete(""),
        lambda: db.put_many(bad),
        lambda: db.get_many(["beside", ""]),
        lambda: db.delete_many(["before", ""]),
        lambda: batch.put("", "value") or db.write(batch),  # type: ignore[func-returns-value]
    ):
        assert "A key is empty" in refusal(call, InvalidKey)
    assert db.get("beside") is None


def test_keys_and_values_up_to_the_limit_are_stored_and_past_it_refused(db: Client[bytes]) -> None:
    rng = random.Random(1)
    key, value = b"limit:" + b"\xff" * (KEY_MAX - 6), rng.randbytes(VALUE_MAX)
    db.put(key, value)
    db.put("limit:0", "small")
    assert db.get(key) == value
    assert str(KEY_MAX) in refusal(lambda: db.put(key + b"x", b"lost"), KeyTooLarge)
    assert str(KEY_MAX) in refusal(lambda: db.get(key + b"x"), KeyTooLarge)
    assert str(VALUE_MAX) in refusal(lambda: db.put(key, value + b"x"), ValueTooLarge)
    assert str(VALUE_MAX) in refusal(lambda: db.put_many({b"limit:1": b"lost", key: value + b"x"}), ValueTooLarge)
    assert list(db.scan(prefix="limit:")) == [(b"limit:0", b"small"), (key, value)]
    assert list(db.scan(prefix="limit:", reverse=True, keys_only=True)) == [key, b"limit:0"]
    assert list(db.get_range(key, key)) == [(key, value)]
    assert db.delete_many([key, "limit:0"]) == 2


def test_a_batch_over_the_limits_is_refused_whole(db: Client[bytes]) -> None:
    many, large = WriteBatch(), WriteBatch()
    for number in range(OPERATIONS_MAX + 1):
        many.put(f"whole:{number}", "x")
    for number in range(3):
        large.put(f"whole:{number}", bytes(15 * MIB))
    for batch in (many, large):
        message = refusal(lambda batch=batch: db.write(batch), BatchTooLarge)  # type: ignore[misc]
        assert "put_many" in message
    assert list(db.scan(prefix="whole:")) == []


def test_many_pairs_are_split_and_all_arrive(db: Client[bytes]) -> None:
    pairs = {f"split:{number:05}".encode(): b"%d" % number for number in range(50_000)}
    db.put_many(pairs)
    assert db.get_many(pairs) == pairs
    assert dict(db.scan(prefix="split:")) == pairs
    assert db.delete_many([*pairs, b"split:none"]) == len(pairs)
    assert list(db.scan(prefix="split:", limit=1)) == []


def test_a_reply_larger_than_a_frame_arrives_in_parts(db: Client[bytes]) -> None:
    pairs = {b"large:%d" % number: bytes([number]) * (12 * MIB) for number in range(4)}
    db.put_many(pairs)
    assert db.get_many(pairs) == pairs
    assert dict(db.scan(prefix="large:")) == pairs
    assert [key for key, _ in db.scan(prefix="large:", reverse=True)] == sorted(pairs, reverse=True)
    db.delete_many(pairs)


def test_nothing_at_all_is_fine(db: Client[bytes]) -> None:
    db.put_many({})
    db.batch_put([], [])
    with db.batch():
        pass
    assert db.get_many([]) == {}
    assert db.delete_many([]) == 0
    assert db.delete_many(["nobody", "nobody", "none"]) == 0
    assert list(db.scan("b", "b")) == list(db.scan("b", "b", reverse=True)) == list(db.scan(limit=0)) == []


def test_a_batch_that_ends_in_an_exception_applies_nothing(db: Client[bytes]) -> None:
    with pytest.raises(ZeroDivisionError), db.batch() as batch:
        batch.put("never", "x")
        raise ZeroDivisionError
    assert db.get("never") is None


NO_TEXT = [None, 1, 1.5, True, [], {}, ("a",), pytest.param(object(), id="object"), "\ud800"]


@pytest.mark.parametrize("bad", NO_TEXT, ids=repr)
def test_wrong_types_are_refused(db: Client[bytes], bad: Any) -> None:
    for call in (
        lambda: db.put(bad, "value"),
        lambda: db.put("wrong", bad),
        lambda: db.get(bad),
        lambda: db.delete(bad),
        lambda: db.get_many([bad]),
        lambda: db.delete_many([bad]),
        lambda: db.batch_put(["wrong"], [bad]),
        lambda: list(db.scan(bad)),
        lambda: list(db.get_range("a", bad)),
    ):
        refusal(call)
    assert db.get("wrong") is None


def test_wrong_collections_numbers_and_bounds_are_refused(db: Client[bytes]) -> None:
    anything: Any = db
    for call in (
        lambda: anything.put_many([("wrong", "x")]),
        lambda: anything.put_many(None),
        lambda: anything.get_many("several"),
        lambda: anything.get_many(None),
        lambda: anything.delete_many(b"several"),
        lambda: anything.batch_put("ab", "cd"),
        lambda: anything.batch_put(["wrong", "b"], ["x"]),
        lambda: anything.write({"wrong": "x"}),
        *[lambda limit=limit: list(anything.scan(limit=limit)) for limit in (-1, 1.5, "1")],
        *[
            lambda timeout=timeout: anything.get("a", timeout=timeout)
            for timeout in (0, -1, "5", float("nan"), float("inf"), True)
        ],
    ):
        refusal(call)
    for reverse in (False, True):
        refusal(lambda reverse=reverse: list(db.scan("b", "a", reverse=reverse)), InvalidRange)  # type: ignore[misc]
    assert db.get("wrong") is None


def test_a_generator_is_as_good_as_a_list(db: Client[bytes]) -> None:
    db.put_many({"many:1": "1", "many:2": "2"})
    assert db.get_many(f"many:{number}" for number in (2, 1)) == {"many:2": b"2", "many:1": b"1"}
    assert db.get_many(["many:1", "many:0", "many:1"]) == {"many:1": b"1", "many:0": None}
    assert db.delete_many(f"many:{number}" for number in (1, 2, 1)) == 2


def test_odd_keys_keep_their_order(db: Client[bytes]) -> None:
    long = b"odd:" + b"p" * 60_000
    keys = [b"odd:\x00", b"odd:\x00\x00", b"odd:", b"odd:\xff", b"odd:\xff\xff", b"odd:{tag}", b"odd:{tag}:1", b"odd:{"]
    keys += [
        b"odd:}{",
        b"odd:{}",
        "odd:ключ".encode(),
        "odd:\u00e9".encode(),
        "odd:e\u0301".encode(),
        b"odd:\n\t '\"\\",
    ]
    keys += [long, long + b"\x00", long + b"a", long + b"b", long[:-1]]
    pairs = {key: b"%d" % number for number, key in enumerate(keys)}
    db.put_many(pairs)
    assert db.get_many(keys) == pairs
    assert list(db.scan(prefix="odd:")) == sorted(pairs.items())
    assert list(db.scan(prefix="odd:", reverse=True)) == sorted(pairs.items(), reverse=True)
    found, start = [], b"odd:"
    while page := list(db.scan(start, b"odd;", limit=1, keys_only=True)):
        found += page
        start = page[0] + b"\x00"
    assert found == sorted(keys)
    assert [key for key, _ in db.get_range(long, long + b"a")] == [long, long + b"\x00", long + b"a"]
    assert db.delete_many(keys) == len(keys)


def test_an_unknown_keyspace_is_named(world: ClusterWorld) -> None:
    for name in ("nowhere", "a\0b", "ключ", "k" * 255):
        with unharmed(world), world.client(timeout=5, keyspace=name) as db:
            for call in (lambda: db.get("a"), lambda: db.put("a", "x"), lambda: list(db.scan())):
                assert "default" in refusal(call, UnknownKeyspace)
    for bad in ("", None, 5, "k" * 256):
        refusal(lambda bad=bad: world.client(keyspace=bad))  # type: ignore[misc]


@pytest.mark.parametrize("bad", ["", None, 5, "here", "127.0.0.1", "127.0.0.1:", "127.0.0.1:99999", ":7400", []])
def test_an_address_that_is_none_is_refused_at_once(bad: Any) -> None:
    assert "127.0.0.1:7400" in refusal(lambda: Client(bad))


def test_a_router_that_is_not_there_is_named_in_time() -> None:
    address = f"127.0.0.1:{free_port()}"
    with Client(address, timeout=0.2) as db:
        for call in (lambda: db.get("a"), lambda: db.put("a", "x"), lambda: list(db.scan()), lambda: db.ping()):
            with pytest.raises(RouterUnavailable, match=address):
                call()


def test_bytes_that_are_no_text_are_kept_when_text_was_wanted(world: ClusterWorld) -> None:
    with unharmed(world), world.client(decode_responses=True) as db, world.client() as raw:
        db.put("binary", b"\xff\xfe")
        assert "decode_responses" in refusal(lambda: db.get("binary"))
        assert raw.get("binary") == b"\xff\xfe"


# Limits of a configuration file


@pytest.fixture(scope="module")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterWorld]:
    directory = tmp_path_factory.mktemp("small")
    with cluster_world(directory, "--nodes", "1", "--shards", "2", config=SMALL_LIMITS) as found:
        yield found


def test_smaller_limits_of_a_file_hold(small_world: ClusterWorld) -> None:
    with unharmed(small_world), small_world.client(timeout=5) as db:
        db.put("k" * 100, "v" * 1000)
        assert "100" in refusal(lambda: db.put("k" * 101, "x"), KeyTooLarge)
        assert "100" in refusal(lambda: db.get("k" * 101), KeyTooLarge)
        assert "1000" in refusal(lambda: db.put("k", "v" * 1001), ValueTooLarge)
        assert db.get("k" * 100) == b"v" * 1000
        assert db.get("k") is None
        batch = WriteBatch()
        for number in range(51):
            batch.put(f"b{number}", "x")
        assert "50" in refusal(lambda: db.write(batch), BatchTooLarge)
        assert list(db.scan(prefix="b")) == []


def test_a_client_told_of_smaller_limits_splits_by_them(small_world: ClusterWorld) -> None:
    with unharmed(small_world), small_world.client(timeout=5, limits=SMALL) as db:
        split_and_gather(db)


def test_a_client_not_told_of_smaller_limits_splits_too(small_world: ClusterWorld) -> None:
    with unharmed(small_world), small_world.client(timeout=5) as db:
        split_and_gather(db)


def split_and_gather(db: Client[bytes]) -> None:
    pairs = {b"many%d" % number: b"x" for number in range(120)}
    db.put_many(pairs)
    assert db.get_many(pairs) == pairs
    assert db.delete_many(pairs) == 120


def test_larger_limits_of_a_file_hold(tmp_path: Path) -> None:
    with (
        cluster_world(tmp_path, "--nodes", "1", "--shards", "2", config=LARGE_LIMITS) as world,
        unharmed(world),
        world.client(timeout=10, limits=LARGE) as db,
    ):
        key, value = b"k" * LARGE.key_bytes_max, bytes(LARGE.value_bytes_max)
        db.put(key, value)
        assert db.get(key) == value
        assert list(db.scan("k", "l")) == [(key, value)]
        refusal(lambda: db.put(key + b"k", "x"), KeyTooLarge)
        refusal(lambda: db.put(key, value + b"x"), ValueTooLarge)


# The command line


def command(*arguments: str, timeout_s: float = 30) -> tuple[int, str]:
    """Exit code and what was printed to standard error, which must be no traceback."""
    done = subprocess.run(shardkv(*arguments), capture_output=True, text=True, timeout=timeout_s, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr + done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["put", "", "x"], 2, "A key is empty"),
        (["put", "a"], 2, "VALUE"),
        (["get", "nobody"], 1, "nobody"),
        (["delete", "nobody"], 1, "nobody"),
        (["scan", "b", "a"], 2, "after STOP a"),
        (["scan", "--limit", "-1"], 2, "--limit"),
        (["frob"], 2, "frob"),
        (["--keyspace", "nowhere", "get", "a"], 2, "nowhere"),
        (["import", "/no/such/file"], 2, "/no/such/file"),
    ],
)
def test_commands_say_what_is_wrong(world: ClusterWorld, arguments: list[str], code: int, said: str) -> None:
    with unharmed(world):
        got, printed = command("--router", world.address, *arguments)
        assert (got, said in printed) == (code, True), printed


def test_an_export_that_cannot_be_written_says_so(world: ClusterWorld) -> None:
    code, printed = command("--router", world.address, "export", "/proc/no-such-file")
    assert code == 2, printed


def test_a_router_that_is_none_is_refused_by_commands() -> None:
    assert command("--router", "here", "get", "a")[0] == 2


def test_a_command_without_a_router_ends_by_itself(waiting: subprocess.Popen[str]) -> None:
    _, said = waiting.communicate(timeout=30)
    assert waiting.returncode == 3
    assert "shardkv cluster up" in said
    assert "Traceback" not in said


# Starting


def up(*arguments: str) -> tuple[int, str]:
    """`shardkv cluster up`, which must refuse."""
    return command("cluster", "up", "--port", str(free_port()), *arguments)


def test_a_config_with_three_mistakes_reports_all_three(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('[cluster]\nnodes = "three"\npartition = "rnage"\n[engine]\nmemtable_bytez = 5\n')
    for command_line in (
        ["cluster", "up"],
        ["meta", "run"],
        ["node", "run", "--name", "n", "--meta", "127.0.0.1:1"],
    ):
        code, printed = command(*command_line, "--data-dir", str(tmp_path / "data"), "--config", str(config))
        assert code == 2, printed
        assert "3 problems" in printed
        assert all(word in printed for word in ("nodes", "rnage", "memtable_bytez", "memtable_bytes_max"))
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("content", [b"[cluster\n", b"\xff\xfe", b"[cluster]\nnodes = 1\nnodes = 2\n", b"[nothing]\n"])
def test_a_config_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    config = tmp_path / "config.toml"
    config.write_bytes(content)
    code, printed = up("--data-dir", str(tmp_path / "data"), "--config", str(config))
    assert (code, "1 problem in" in printed) == (2, True), printed


@pytest.mark.parametrize(
    "options",
    [["--nodes", "0"], ["--shards", "1000000"], ["--routers", "-1"], ["--bind", "0.0.0.0"], ["--durability", "never"]],
)
def test_options_that_cannot_be_are_refused(tmp_path: Path, options: list[str]) -> None:
    code, printed = up("--data-dir", str(tmp_path / "data"), *options)
    assert code == 2, printed
    assert not (tmp_path / "data").exists()


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for directory in ("/proc/no-such-directory", "/proc", str(tmp_path / "file"), str(tmp_path / "file" / "below")):
        code, printed = up("--data-dir", directory)
        assert code == 3, printed
        assert f"{directory} cannot be used as a data directory" in printed
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("name", ["meta", "node-1", "logs", "run"])
def test_a_file_in_the_way_of_a_part_is_named_and_kept(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("in the way")
    code, printed = up("--data-dir", str(tmp_path), "--nodes", "1")
    assert code == 3, printed
    assert str(tmp_path) in printed
    assert (tmp_path / name).read_text() == "in the way"


def test_a_second_start_and_a_taken_port_are_refused(world: ClusterWorld, tmp_path: Path) -> None:
    with unharmed(world):
        code, printed = up("--data-dir", str(world.data_dir))
        assert (code, "already up" in printed) == (3, True), printed
        for detach in ([], ["--detach"]):
            code, printed = command(
                "cluster", "up", "--port", str(world.port), "--data-dir", str(tmp_path / "data"), *detach
            )
            assert (code, f"Port {world.port}" in printed) == (3, True), printed
        assert not (tmp_path / "data" / "node-1").exists()


def test_directories_in_use_are_refused(world: ClusterWorld, tmp_path: Path) -> None:
    meta = world.records()["meta"]["address"]
    with unharmed(world):
        code, printed = command(
            "node", "run", "--name", "node-1", "--meta", meta, "--data-dir", str(world.data_dir / "node-1")
        )
        assert (code, "in use" in printed) == (4, True), printed
        code, printed = command("meta", "run", "--port", "0", "--data-dir", str(world.data_dir / "meta"))
        assert (code, "in use" in printed) == (4, True), printed
        code, printed = command("node", "run", "--name", "node-1", "--meta", meta, "--data-dir", str(tmp_path / "new"))
        assert (code, "an empty one cannot take its place" in printed) == (4, True), printed


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterWorld]:
    """A cluster that holds `kept` and was stopped; tests leave its directory as they found it."""
    with cluster_world(tmp_path_factory.mktemp("stopped"), "--nodes", "1", "--shards", "2") as found:
        with found.client(timeout=5) as db:
            db.put("kept", "value")
        assert found.stop() == 0
        yield found


def newer_json(content: bytes) -> bytes:
    return json.dumps({**json.loads(content), "format": 99}).encode()


def newer_identity(content: bytes) -> bytes:
    checked = content.rsplit(b" ", 1)[0].replace(b"store 1", b"store 99")
    return checked + b" %08x\n" % google_crc32c.value(checked)


def garbage(content: bytes) -> bytes:
    return b"\x00\xff" + content[2:]


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("run/cluster.json", newer_json, "newer"),
        ("run/cluster.json", garbage, "cluster.json"),
        ("node-1/node.json", newer_json, "newer"),
        ("node-1/node.json", garbage, "node.json"),
        ("node-1/store/IDENTITY", newer_identity, "newer"),
        ("node-1/store/IDENTITY", garbage, "IDENTITY"),
        ("node-1/store/CURRENT", garbage, "CURRENT"),
        ("meta/meta.sqlite3", garbage, "meta.sqlite3"),
    ],
)
def test_data_of_a_newer_version_and_damage_are_named_and_kept(
    stopped: ClusterWorld, file: str, change: Callable[[bytes], bytes], said: str
) -> None:
    path = stopped.data_dir / file
    original = path.read_bytes()
    changed = change(original)
    path.write_bytes(changed)
    part = file.split("/")[0]
    directory = ["--data-dir", str(stopped.data_dir / part)]
    try:
        if part == "run":
            code, printed = up("--data-dir", str(stopped.data_dir))
        elif part == "meta":
            code, printed = command("meta", "run", "--port", "0", *directory)
        else:
            code, printed = command("node", "run", "--name", part, "--meta", f"127.0.0.1:{free_port()}", *directory)
        assert path.read_bytes() == changed
    finally:
        path.write_bytes(original)
    assert code == (3 if part == "run" else 4), printed
    assert str(path.parent) in printed
    assert said in printed


def test_the_data_of_another_cluster_is_refused(stopped: ClusterWorld, world: ClusterWorld, tmp_path: Path) -> None:
    meta = world.records()["meta"]["address"]
    with unharmed(world):
        code, printed = command(
            "node", "run", "--name", "node-1", "--meta", meta, "--data-dir", str(stopped.data_dir / "node-1")
        )
        assert (code, "cluster" in printed) == (4, True), printed
    shutil.copytree(stopped.data_dir, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "node-1")
    shutil.copytree(world.data_dir / "node-1", tmp_path / "data" / "node-1")
    code, printed = up("--data-dir", str(tmp_path / "data"))
    assert (code, "cluster" in printed) == (3, True), printed


def test_what_is_fixed_when_a_cluster_is_made_cannot_be_changed(stopped: ClusterWorld) -> None:
    for option, value in (("--shards", "3"), ("--partition", "range")):
        code, printed = up("--data-dir", str(stopped.data_dir), option, value)
        assert code in {2, 3}, printed
        assert "fixed when a cluster is made" in printed


def test_start_after_stop_brings_everything_back(stopped: ClusterWorld) -> None:
    stopped.start()
    with stopped.client(timeout=5) as db:
        assert dict(db.scan()) == {b"kept": b"value"}
