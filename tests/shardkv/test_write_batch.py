"""A `WriteBatch` keeps what was added, in order, and takes nothing of what it refuses."""

from __future__ import annotations

import pytest

from shardkv.errors import InvalidArgument
from shardkv.write_batch import DELETE, PUT, WriteBatch


def test_kinds_are_one_number_when_all_operations_are_alike_and_a_byte_each_otherwise() -> None:
    batch = WriteBatch()
    batch.put("a", b"1")
    batch.put(b"b", "2")
    assert batch.kinds == PUT
    batch.delete("a")
    batch.put(bytearray(b"c"), memoryview(b"3"))
    assert (batch.keys, batch.kinds, batch.values) == (
        [b"a", b"b", b"a", b"c"],
        bytes((PUT, PUT, DELETE, PUT)),
        [b"1", b"2", b"", b"3"],
    )
    batch.clear()
    batch.delete("a")
    batch.delete("b")
    assert batch.kinds == DELETE and len(batch) == 2


def test_many_puts_at_once_are_the_same_as_one_by_one() -> None:
    batch, other = WriteBatch(), WriteBatch()
    rows = {"a": b"1", b"b": "2", b"c": bytearray(b"3")}
    batch.put_many(rows.keys(), rows.values())
    batch.put_many([b"x", b"y"], [b"4", b"5"])
    for key, value in [*rows.items(), (b"x", b"4"), (b"y", b"5")]:
        other.put(key, value)
    assert (batch.keys, batch.kinds, batch.values) == (other.keys, other.kinds, other.values)


@pytest.mark.parametrize("keys,values", [([b"a", 1], [b"1", b"2"]), ([b"a", b"b"], [b"1", None]), ([b"a"], [])])
def test_what_is_no_text_is_refused_and_nothing_is_added(keys: list[bytes], values: list[bytes]) -> None:
    batch = WriteBatch()
    batch.put(b"first", b"0")
    with pytest.raises(InvalidArgument):
        batch.put_many(keys, values)
    with pytest.raises(InvalidArgument):
        batch.put(b"k", None)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument):
        batch.delete(1)  # type: ignore[arg-type]
    assert (batch.keys, batch.kinds, batch.values) == ([b"first"], PUT, [b"0"])


def test_a_batch_does_not_hold_on_to_the_lists_it_was_given() -> None:
    batch, keys = WriteBatch(), [b"a"]
    batch.put_many(keys, [b"1"])
    keys.append(b"b")
    assert batch.keys == [b"a"]
