"""Arguments become requests: types, sizes, cutting, and what is refused before anything is sent."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from shardkv.client import requests
from shardkv.client.calls import settle
from shardkv.errors import (
    BatchTooLarge,
    InvalidArgument,
    InvalidKey,
    KeyTooLarge,
    RemoteProtocolError,
    ValueTooLarge,
)
from shardkv.limits import DEFAULT_LIMITS, KIB, MIB
from shardkv.wire.messages import OK, RawReply, Read, Write, WriteReply, raw
from shardkv.write_batch import WriteBatch

LIMITS = DEFAULT_LIMITS


def written(calls: list[requests.WriteCall]) -> list[Write]:
    return [msgspec.msgpack.decode(call.payload(), type=Write) for call in calls]


def test_text_and_bytes_are_the_same_key():
    assert requests.put("å", "v", LIMITS).payload() == requests.put("å".encode(), b"v", LIMITS).payload()
    assert (
        requests.put(bytearray(b"k"), memoryview(b"v"), LIMITS).payload() == requests.put(b"k", b"v", LIMITS).payload()
    )


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: requests.put(1, "v", LIMITS), InvalidArgument, "key must be str or bytes, not int"),
        (lambda: requests.put("k", None, LIMITS), InvalidArgument, "value must be str or bytes, not NoneType"),
        (lambda: requests.put("\ud800", "v", LIMITS), InvalidArgument, "not valid text"),
        (lambda: requests.put("", "v", LIMITS), InvalidKey, "empty"),
        (lambda: requests.get(b"k" * (64 * KIB + 1), LIMITS), KeyTooLarge, "65537"),
        (lambda: requests.put("k", bytes(16 * MIB + 1), LIMITS), ValueTooLarge, "16777217"),
        (lambda: requests.put_many([("k", "v")], LIMITS), InvalidArgument, "mapping"),
        (lambda: requests.batch_put(["a", "b"], ["1"], LIMITS), InvalidArgument, "2 keys and 1 values"),
        (lambda: requests.listed("abc"), InvalidArgument, "Several keys"),
        (lambda: requests.listed(7), InvalidArgument, "Several keys"),
        (lambda: requests.delete_many("abc", LIMITS), InvalidArgument, "Several keys"),
        (lambda: requests.delete_many(["a", 1], LIMITS), InvalidArgument, "not int"),
        (lambda: requests.write({"k": "v"}, LIMITS), InvalidArgument, "WriteBatch"),
    ],
)
def test_bad_arguments_are_refused_with_a_sentence(make, error, says):
    with pytest.raises(error, match=says):
        make()


def test_a_bad_key_anywhere_sends_nothing():
    mapping = {f"k{number}": "v" for number in range(15_000)} | {"": "v"}
    with pytest.raises(InvalidKey) as caught:
        requests.put_many(mapping, LIMITS)
    assert caught.value.detail["index"] == 15_000


def test_many_small_writes_are_cut_by_count_and_keep_their_order():
    mapping = {f"k{number:05}": f"v{number}" for number in range(2_500)}
    parts = written(requests.put_many(mapping, LIMITS))
    assert [len(part.keys) for part in parts] == [1000, 1000, 500]
    together = {key: value for part in parts for key, value in zip(part.keys, part.values, strict=True)}
    assert together == {key.encode(): value.encode() for key, value in mapping.items()}


def test_large_writes_are_cut_by_bytes_and_one_value_may_be_larger_than_a_request():
    values = [300 * KIB, 300 * KIB, 300 * KIB, 300 * KIB, 3 * MIB, 1]
    parts = written(requests.batch_put([f"k{n}" for n in range(6)], [bytes(size) for size in values], LIMITS))
    assert [len(part.keys) for part in parts] == [3, 1, 1, 1]


def test_a_limit_below_the_usual_cut_is_kept():
    limits = replace(LIMITS, operations_max=10)
    assert [len(part.keys) for part in written(requests.delete_many(map(str, range(25)), limits))] == [10, 10, 5]


def test_the_last_value_wins_when_a_key_comes_twice():
    (part,) = written(requests.batch_put(["a", b"a", "b"], ["1", "2", "3"], LIMITS))
    assert dict(zip(part.keys, part.values, strict=True)) == {b"a": b"2", b"b": b"3"}
    assert len(part.keys) == 2


def test_nothing_to_do_is_no_request():
    assert requests.put_many({}, LIMITS) == requests.get_many([], LIMITS) == requests.delete_many([], LIMITS) == []
    assert requests.write(WriteBatch(), LIMITS) == []


def test_a_batch_is_one_request_in_its_order():
    batch = WriteBatch()
    batch.put("a", "1")
    batch.delete("a")
    batch.put("b", "2")
    (write,) = written(requests.write(batch, LIMITS))
    assert (write.keys, write.values, write.kinds) == ([b"a", b"a", b"b"], [b"1", b"", b"2"], bytes([1, 2, 1]))


@pytest.mark.parametrize("limits", [replace(LIMITS, operations_max=2), replace(LIMITS, frame_bytes_max=400)])
def test_a_batch_that_does_not_fit_is_refused_whole(limits):
    batch = WriteBatch()
    for number in range(3):
        batch.put(str(number), bytes(60))
    with pytest.raises(BatchTooLarge, match="atomic batch"):
        requests.write(batch, limits)


def test_reads_are_cut_and_put_together_in_order_of_asking():
    keys = [f"k{number}" for number in range(1_500)]
    calls = requests.get_many(keys, LIMITS)
    assert [len(msgspec.msgpack.decode(call.payload(), type=Read).keys) for call in calls] == [1000, 500]
    for call in calls:
        call.values = [None if key == b"k7" else key for key in call.keys]
    answer = requests.by_key(keys, calls, bytes.decode)
    assert list(answer) == keys
    assert answer["k7"] is None
    assert answer["k1499"] == "k1499"


def test_an_answer_that_lacks_what_was_asked_for_is_an_error():
    call = requests.put("k", "v", LIMITS)
    settle(call, RawReply(1, OK, raw(WriteReply(b"\0", None, []))))
    assert requests.shared_version([call]) is None
    with pytest.raises(RemoteProtocolError, match="not its version"):
        requests.version_of(call)
    call = requests.incr("k", 1, LIMITS)
    settle(call, RawReply(1, OK, raw(WriteReply(b"\0", 7, []))))
    assert requests.version_of(call) == 7
    with pytest.raises(RemoteProtocolError, match="not its sum"):
        requests.sum_of(call)
