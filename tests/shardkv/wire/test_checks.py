import pytest

from shardkv.errors import (
    BatchTooLarge,
    InvalidArgument,
    InvalidKey,
    InvalidRange,
    KeyTooLarge,
    ShardKVError,
    ValueTooLarge,
)
from shardkv.limits import TTL_MS_MAX, Limits
from shardkv.wire.checks import check_keys, check_range, check_values, check_write
from shardkv.wire.messages import Conditions, Token, Write

LIMITS = Limits(key_bytes_max=10, value_bytes_max=20, operations_max=3)


def test_what_is_within_the_limits_passes() -> None:
    check_keys([b"a" * 10], LIMITS)
    check_values([b"", b"v" * 20], LIMITS)
    check_range(b"a", b"a", LIMITS)
    check_range(b"", None, LIMITS)


def test_each_limit_has_its_own_error_that_says_which_and_by_how_much() -> None:
    with pytest.raises(InvalidKey, match="A key is empty"):
        check_keys([b"a", b""], LIMITS)
    with pytest.raises(KeyTooLarge, match="11 bytes long; the limit is 10") as info:
        check_keys([b"a", b"b" * 11], LIMITS)
    assert info.value.detail["index"] == 1
    with pytest.raises(BatchTooLarge, match="4 keys; the limit is 3"):
        check_keys([b"a"] * 4, LIMITS)
    with pytest.raises(ValueTooLarge, match="21 bytes long; the limit is 20"):
        check_values([b"v" * 21], LIMITS)
    with pytest.raises(InvalidRange, match=r"stops at b'a', before it starts at b'b'"):
        check_range(b"b", b"a", LIMITS)


@pytest.mark.parametrize(
    "write",
    [
        Write(None, None, 1, [], [], False),
        Write(Token(b"short", 1), None, 1, [b"k"], [b"v"], False),
        Write(Token(bytes(16), 0), None, 1, [b"k"], [b"v"], False),
        Write(Token(bytes(16), 1 << 64), None, 1, [b"k"], [b"v"], False),
        Write(None, None, 1, [b"k"], [], False),
        Write(None, None, 3, [b"k"], [b"v"], False),
        Write(None, None, -1, [b"k"], [b"v"], False),
        Write(None, None, 10**12, [b"k"], [b"v"], False),
        Write(None, None, b"\x01\x03", [b"k", b"l"], [b"v", b""], False),
        Write(None, None, 2, [b"k"], [b"v"], False),
        Write(None, None, b"\x01\x02", [b"k", b"l"], [b"v", b"w"], False),
        Write(None, None, b"\x01", [b"k", b"l"], [b"v", b""], False),
        Write(None, None, b"", [b"k"], [b"v"], False),
        Write(None, None, 4, [b"k"], [b"v"], False),
        Write(None, None, b"\x05", [b"k"], [b"1"], False),
        Write(None, None, 5, [b"k", b"l"], [b"1", b"1"], False),
        Write(None, None, 5, [b"k"], [b""], False),
        Write(None, None, 5, [b"k"], [b"+1"], False),
        Write(None, None, 5, [b"k"], [b"9223372036854775808"], False),
        Write(None, Conditions([], []), 1, [b"k"], [b"v"], False),
        Write(None, Conditions([b"k"], []), 1, [b"k"], [b"v"], False),
        Write(None, Conditions([b""], [0]), 1, [b"k"], [b"v"], False),
        Write(None, Conditions([b"k"] * 4, [0] * 4), 1, [b"k"], [b"v"], False),
        Write(None, None, 1, [b"k"], [b"v"], False, 0),
        Write(None, None, 1, [b"k"], [b"v"], False, -1),
        Write(None, None, 1, [b"k"], [b"v"], False, TTL_MS_MAX + 1),
        Write(None, None, 2, [b"k"], [b""], False, 1),
        Write(None, None, b"\x01", [b"k"], [b"v"], False, 1),
    ],
)
def test_columns_that_do_not_agree_are_refused(write: Write) -> None:
    with pytest.raises((InvalidArgument, ShardKVError)):
        check_write(write, LIMITS)


@pytest.mark.parametrize(
    "write",
    [
        Write(None, None, b"\x01\x02", [b"k", b"l"], [b"v", b""], True),
        Write(None, None, 5, [b"k"], [b"-9223372036854775808"], False, TTL_MS_MAX),
        Write(None, Conditions([b"other", b"k"], [0, 7]), 2, [b"k"], [b""], True),
        Write(None, None, 1, [b"k", b"l"], [b"v", b"w"], False, 1),
    ],
)
def test_what_the_one_write_operation_may_be(write: Write) -> None:
    check_write(write, LIMITS)
