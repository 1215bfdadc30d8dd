"""Steps of a delete of a range: what is asked next, what is counted, and what is told when it cannot go on."""

from __future__ import annotations

import msgspec
import pytest

from shardkv.client.calls import Lost, State, raise_failure, settle
from shardkv.client.deleting import DeleteRangeCall
from shardkv.errors import (
    DeadlineExceeded,
    OutcomeUnknown,
    RemoteProtocolError,
    RouterUnavailable,
    ShardUnavailable,
)
from shardkv.wire.messages import DeleteRange, DeleteRangeReply
from tests.shardkv.client.test_calls import answer, refusal

BROKEN = Lost("The connection broke.", sent=True)


def asked(call: DeleteRangeCall) -> DeleteRange:
    return msgspec.msgpack.decode(call.payload(), type=DeleteRange)


def test_each_step_begins_where_the_one_before_ended():
    call = DeleteRangeCall(b"a", b"z", None)
    assert asked(call) == DeleteRange(b"a", b"z", None)
    settle(call, answer(DeleteRangeReply(5, b"c")))
    assert (asked(call), call.state, call.error) == (DeleteRange(b"c", b"z", None), State.WAITING, None)
    settle(call, answer(DeleteRangeReply(0, b"x")))
    settle(call, answer(DeleteRangeReply(2, None)))
    assert (call.state, call.deleted) == (State.DONE, 7)


def test_a_limit_is_what_is_left_of_it():
    call = DeleteRangeCall(b"", None, 7)
    settle(call, answer(DeleteRangeReply(5, b"c")))
    assert asked(call) == DeleteRange(b"c", None, 2)
    settle(call, refusal(ShardUnavailable("Away.", detail={"shard": 3, "deleted": 1})))
    assert (asked(call), call.state) == (DeleteRange(b"c", None, 1), State.WAITING)
    settle(call, answer(DeleteRangeReply(1, b"c")))
    assert (call.state, call.deleted) == (State.DONE, 7)


def test_a_refusal_that_says_all_was_deleted_ends_it_well():
    call = DeleteRangeCall(b"", None, 7)
    settle(call, refusal(ShardUnavailable("Away.", detail={"deleted": 7})))
    assert (call.state, call.deleted) == (State.DONE, 7)


def test_a_step_whose_answer_was_lost_is_repeated_unless_there_is_a_limit():
    call = DeleteRangeCall(b"a", None, None)
    settle(call, BROKEN)
    assert (call.state, asked(call)) == (State.WAITING, DeleteRange(b"a", None, None))
    settle(call, answer(DeleteRangeReply(1, None)))
    assert call.state is State.DONE
    call = DeleteRangeCall(b"a", None, 9)
    settle(call, answer(DeleteRangeReply(4, b"b")))
    settle(call, BROKEN)
    with pytest.raises(OutcomeUnknown, match="At least 4 keys of the range were deleted") as caught:
        raise_failure([call])
    assert caught.value.detail == {"deleted": 4}


def test_what_was_deleted_before_an_error_is_told():
    call = DeleteRangeCall(b"a", None, None)
    settle(call, answer(DeleteRangeReply(4, b"b")))
    settle(call, refusal(ShardUnavailable("Shard 3 is away.", detail={"shard": 3, "deleted": 2})))
    call.expire(1)
    with pytest.raises(ShardUnavailable, match=r"Shard 3 is away\. 6 keys of the range were deleted before") as caught:
        raise_failure([call])
    assert caught.value.detail == {"shard": 3, "deleted": 6}
    call = DeleteRangeCall(b"a", None, None)
    call.expire(1)
    with pytest.raises(DeadlineExceeded) as late:
        raise_failure([call])
    assert late.value.detail == {"deleted": 0}


def test_a_doubt_is_told_whatever_the_error():
    for lost in (BROKEN, Lost("No answer in time.", sent=True, timed_out=True)):
        call = DeleteRangeCall(b"a", None, None)
        settle(call, lost)
        if call.state is State.WAITING:
            call.give_up(RouterUnavailable("No router."))
        with pytest.raises(OutcomeUnknown, match="At least 0 keys"):
            raise_failure([call])


def test_a_step_that_covers_nothing_fails_instead_of_going_on_for_ever():
    call = DeleteRangeCall(b"a", None, None)
    settle(call, answer(DeleteRangeReply(4, b"a")))
    with pytest.raises((RemoteProtocolError, OutcomeUnknown), match="covered nothing"):
        raise_failure([call])
    assert call.deleted == 4
