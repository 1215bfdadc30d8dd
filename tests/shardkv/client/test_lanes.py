"""Lanes: by which a client's writes are told apart, and what calls in them send again."""

from __future__ import annotations

import os

import pytest

from shardkv.client.calls import Lane, Lost, State, WriteCall, raise_failure, settle
from shardkv.client.lanes import TIMEOUT_S_MAX, Lanes
from shardkv.errors import BatchTooLarge, InvalidArgument, OutcomeUnknown, Overloaded, ShardKVError
from shardkv.wire.messages import (
    OK,
    RawReply,
    ShardProblem,
    Token,
    Write,
    WriteReply,
    WriteResult,
    decode_write,
    error_reply,
    raw,
)

APPLIED, REFUSED, UNKNOWN = WriteResult.APPLIED, WriteResult.REFUSED, WriteResult.UNKNOWN
CUT = Lost("The connection broke.", sent=True)
LANE = b"lane".ljust(16)


def call_in_a_lane(*keys: bytes, may_cut: bool = False) -> WriteCall:
    call = WriteCall(1, list(keys), [b"v"] * len(keys), want_existed=False, may_cut=may_cut)
    call.use(Lane(LANE))
    return call


def asked(call: WriteCall) -> tuple[list[bytes], int, bool]:
    """Keys, number and whether it says that it was sent before."""
    write: Write = decode_write(call.payload())
    assert isinstance(write.token, Token) and write.token.lane == LANE
    return write.keys, write.token.number, write.token.again


def answer(call: WriteCall, results: bytes, *problems: ShardProblem) -> None:
    settle(call, RawReply(1, OK, raw(WriteReply(results, 1, list(problems)))))


def refuse(call: WriteCall, error: ShardKVError) -> None:
    settle(call, RawReply(1, 1, raw(error_reply(1, error).payload)))


def away(shard: int, code: str = "shard_unavailable") -> ShardProblem:
    return ShardProblem(shard, code, "The shard is away.", {}, "")


def test_what_was_lost_goes_again_with_the_same_number_and_what_was_refused_too() -> None:
    call = call_in_a_lane(b"k")
    assert asked(call) == ([b"k"], 1, False)
    settle(call, CUT)
    assert (call.state, asked(call)) == (State.WAITING, ([b"k"], 1, True))
    refuse(call, Overloaded("Not now."))
    assert (call.state, asked(call)) == (State.WAITING, ([b"k"], 1, True))
    answer(call, bytes([APPLIED]))
    assert call.state is State.DONE and call.results == bytes([APPLIED])


def test_a_doubt_outlives_refusals_and_the_deadline() -> None:
    for end in (lambda call: call.expire(1.0), lambda call: refuse(call, InvalidArgument("No such write."))):
        call = call_in_a_lane(b"k")
        settle(call, CUT)
        refuse(call, Overloaded("Not now."))
        end(call)
        with pytest.raises(OutcomeUnknown) as caught:
            raise_failure([call])
        assert (caught.value.detail["unknown"], caught.value.detail["refused"]) == (1, 0)


def test_only_what_is_not_known_or_refused_goes_again_and_a_refusal_settles_no_doubt() -> None:
    call = call_in_a_lane(b"a", b"b", b"c", b"d")
    answer(call, bytes([APPLIED, UNKNOWN, REFUSED, UNKNOWN]), away(2, "outcome_unknown"), away(3))
    assert asked(call) == ([b"b", b"c", b"d"], 1, True)
    answer(call, bytes([REFUSED, APPLIED, REFUSED]), away(2))
    assert call.results == bytes([APPLIED, UNKNOWN, APPLIED, UNKNOWN])
    assert asked(call) == ([b"b", b"d"], 1, True)
    answer(call, bytes([APPLIED, APPLIED]))
    assert call.state is State.DONE


def test_what_was_surely_refused_goes_again_as_a_new_write() -> None:
    call = call_in_a_lane(b"a", b"b")
    answer(call, bytes([APPLIED, REFUSED]), away(3))
    assert asked(call) == ([b"b"], 2, False)


def test_halves_have_numbers_of_their_own_and_a_lost_half_goes_again_as_it_was() -> None:
    call = call_in_a_lane(b"a", b"b", b"c", b"d", may_cut=True)
    asked(call)
    refuse(call, BatchTooLarge("Too large."))
    assert asked(call) == ([b"a", b"b"], 2, False)
    settle(call, CUT)
    assert asked(call) == ([b"a", b"b"], 2, True)
    answer(call, bytes([APPLIED, APPLIED]))
    assert asked(call) == ([b"c", b"d"], 3, False)
    answer(call, bytes([APPLIED, APPLIED]))
    assert call.state is State.DONE and call.results == bytes(4)


def test_a_write_in_doubt_beside_one_that_failed_is_told_of() -> None:
    doubtful, failed = call_in_a_lane(b"a"), call_in_a_lane(b"b")
    settle(doubtful, CUT)
    refuse(failed, InvalidArgument("No such write."))
    with pytest.raises(OutcomeUnknown):
        raise_failure([doubtful, failed])


def test_lanes_are_lent_to_one_write_at_a_time_and_come_back() -> None:
    lanes = Lanes()
    calls = [WriteCall(1, [b"k"], [b"v"], want_existed=False) for _ in range(3)]
    lanes.lend(calls, 1.0)
    names = [decode_write(call.payload()).token.lane for call in calls]
    assert len(set(names)) == 3 and {len(name) for name in names} == {16}
    lanes.take_back(calls)
    lanes.take_back(calls)
    calls = [WriteCall(1, [b"k"], [b"v"], want_existed=False) for _ in range(4)]
    lanes.lend(calls, 1.0)
    tokens = [decode_write(call.payload()).token for call in calls]
    assert {token.lane for token in tokens} > set(names) and sorted(token.number for token in tokens) == [1, 2, 2, 2]


def test_a_call_that_may_outlive_its_record_has_no_token() -> None:
    call = WriteCall(1, [b"k"], [b"v"], want_existed=False)
    Lanes().lend([call], TIMEOUT_S_MAX + 1)
    assert decode_write(call.payload()).token is None


def test_a_forked_child_has_other_lanes() -> None:
    lanes = Lanes()
    mine, its, kept = (WriteCall(1, [b"k"], [b"v"], want_existed=False) for _ in range(3))
    lanes.lend([mine, kept], 1.0)
    lanes.take_back([kept])
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:  # the child
        lanes.take_back([mine])
        lanes.lend([its], 1.0)
        os.write(writing, decode_write(its.payload()).token.lane)
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(reading, 100)[:12] != decode_write(mine.payload()).token.lane[:12]
