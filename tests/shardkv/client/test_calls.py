"""What answers and broken connections mean for a request: what is sent again, what is not, and what is told."""

from __future__ import annotations

import msgspec
import pytest

from shardkv.client.calls import (
    Call,
    Lost,
    PageCall,
    ReadCall,
    State,
    VersionedReadCall,
    WriteCall,
    raise_failure,
    settle,
)
from shardkv.errors import (
    BatchTooLarge,
    ConditionFailed,
    DeadlineExceeded,
    InvalidArgument,
    OutcomeUnknown,
    RemoteProtocolError,
    RouterUnavailable,
    ShardKVError,
    ShardUnavailable,
    StorePoisoned,
)
from shardkv.wire.messages import (
    OK,
    Conditions,
    ErrorPayload,
    Page,
    RawReply,
    Read,
    ReadReply,
    Scan,
    ShardProblem,
    Write,
    WriteReply,
    raw,
)


def answer(message) -> RawReply:
    return RawReply(1, OK, raw(message))


def refusal(error: ShardKVError) -> RawReply:
    return RawReply(1, 1, raw(ErrorPayload(error.code, error.message, error.detail, error.hint)))


def problem(shard: int, error: ShardKVError) -> ShardProblem:
    return ShardProblem(shard, error.code, error.message, {}, "")


def write(*keys: bytes) -> WriteCall:
    return WriteCall(1, list(keys), [b"v-" + key for key in keys], want_existed=False)


def sent(call: Call, kind):
    return msgspec.msgpack.decode(call.payload(), type=kind)


def test_a_read_is_asked_again_after_a_broken_connection_or_a_retriable_error():
    for outcome in (Lost("It broke.", sent=True), refusal(ShardUnavailable("Shard 3 is away."))):
        call = ReadCall([b"k"])
        settle(call, outcome)
        assert call.state is State.WAITING
        assert call.error is not None
        settle(call, answer(ReadReply([b"v"])))
        assert call.state is State.DONE
        assert call.values == [b"v"]
        assert call.error is None


def test_a_refusal_for_good_fails_the_call():
    call = ReadCall([b"k"])
    settle(call, refusal(InvalidArgument("No.")))
    with pytest.raises(InvalidArgument, match="No"):
        raise_failure([call])


def test_a_write_that_was_sent_is_never_sent_again():
    call = write(b"k")
    settle(call, Lost("The connection broke.", sent=True))
    assert call.state is State.FAILED
    with pytest.raises(OutcomeUnknown) as caught:
        raise_failure([call])
    assert caught.value.detail == {"applied": 0, "refused": 0, "unknown": 1, "shards": []}


def test_a_write_that_was_not_sent_is_sent_again():
    call = write(b"k")
    settle(call, Lost("Connection refused.", sent=False))
    assert call.state is State.WAITING
    settle(call, answer(WriteReply(b"\0", 7, [])))
    assert call.state is State.DONE


def test_only_the_refused_operations_of_a_write_are_sent_again():
    call = WriteCall(bytes([1, 2, 1]), [b"a", b"b", b"c"], [b"1", b"", b"3"], want_existed=True)
    settle(call, answer(WriteReply(bytes([0, 2, 2]), None, [problem(4, ShardUnavailable("Away."))])))
    assert call.state is State.WAITING
    again = sent(call, Write)
    assert (again.keys, again.values, again.kinds, again.want_existed) == (
        [b"b", b"c"],
        [b"", b"3"],
        bytes([2, 1]),
        True,
    )
    settle(call, answer(WriteReply(bytes([1, 0]), None, [])))
    assert call.state is State.DONE
    assert bytes(call.results) == bytes([0, 1, 0])


def test_what_became_of_each_operation_is_told():
    call = write(b"a", b"b", b"c", b"d")
    problems = [problem(4, StorePoisoned("The disk failed.")), problem(9, OutcomeUnknown("Nobody knows."))]
    settle(call, answer(WriteReply(bytes([0, 2, 3, 0]), None, problems)))
    with pytest.raises(OutcomeUnknown, match="Of 4 operations 2 were applied, 1 were not, 1 may have been") as caught:
        raise_failure([call])
    assert caught.value.detail == {"shard": 9, "applied": 2, "refused": 1, "unknown": 1, "shards": [4, 9]}


def test_parts_that_were_never_sent_count_as_refused():
    first, second = write(b"a", b"b"), write(b"c")
    settle(first, answer(WriteReply(bytes([0, 2]), None, [problem(1, StorePoisoned("The disk failed."))])))
    with pytest.raises(StorePoisoned) as caught:
        raise_failure([first, second])
    assert caught.value.detail["refused"] == 2


def test_an_unknown_outcome_is_told_before_a_refusal():
    refused, unknown = write(b"a"), write(b"b")
    settle(refused, refusal(StorePoisoned("The disk failed.")))
    settle(unknown, Lost("It broke.", sent=True))
    with pytest.raises(OutcomeUnknown):
        raise_failure([refused, unknown])


def test_out_of_time_tells_the_last_reason():
    waiting, silent = ReadCall([b"k"]), ReadCall([b"k"])
    settle(waiting, refusal(ShardUnavailable("Shard 3 is away.", detail={"shard": 3})))
    settle(silent, Lost("No answer.", sent=True, timed_out=True))
    waiting.expire(2)
    silent.expire(2)
    with pytest.raises(ShardUnavailable, match="Shard 3"):
        raise_failure([waiting])
    with pytest.raises(DeadlineExceeded, match="within 2 s"):
        raise_failure([silent])


def test_a_write_that_timed_out_is_unknown():
    call = write(b"k")
    settle(call, Lost("No answer in time.", sent=True, timed_out=True))
    with pytest.raises(OutcomeUnknown):
        raise_failure([call])


def test_a_reply_that_is_too_large_is_asked_for_in_halves():
    keys = [str(number).encode() for number in range(5)]
    call = ReadCall(keys)
    settle(call, refusal(BatchTooLarge("Too large.")))
    asked = []
    while call.state is State.WAITING:
        assert call.error is None
        part = sent(call, Read).keys
        if len(part) > 2:
            settle(call, refusal(BatchTooLarge("Too large.")))
        else:
            asked.append(part)
            settle(call, answer(ReadReply(part)))
    assert asked == [keys[:2], keys[2:3], keys[3:]]
    assert call.values == keys


def test_a_page_that_is_too_large_is_asked_for_row_by_row():
    call = PageCall(Scan(b"", None, False, False, 10_000, 65536, None))
    settle(call, refusal(BatchTooLarge("Too large.")))
    assert (call.state, call.error, sent(call, Scan).limit) == (State.WAITING, None, 1)
    settle(call, answer(Page([b"k"], [b"v"], b"k\0", None)))
    assert call.result.keys == [b"k"]


def test_one_value_that_is_too_large_ends_it():
    call = ReadCall([b"k"])
    settle(call, refusal(BatchTooLarge("Too large.")))
    assert call.state is State.FAILED


def test_an_answer_that_makes_no_sense_leaves_a_write_unknown_and_fails_a_read():
    read, written = ReadCall([b"k"]), write(b"k")
    settle(read, answer(ReadReply([])))
    settle(written, answer(WriteReply(b"\0\0", None, [])))
    assert read.state is written.state is State.FAILED
    with pytest.raises(OutcomeUnknown, match="2 results for 1"):
        raise_failure([written])
    with pytest.raises(ShardKVError, match="0 values for 1"):
        raise_failure([read])


def test_a_call_that_could_not_be_sent_at_all():
    call = write(b"k")
    call.give_up(RouterUnavailable("No router."))
    with pytest.raises(RouterUnavailable) as caught:
        raise_failure([call])
    assert caught.value.detail["refused"] == 1


def test_a_read_of_versions_that_gets_none_fails():
    call = VersionedReadCall([b"k"])
    settle(call, answer(ReadReply([b"v"])))
    with pytest.raises(RemoteProtocolError, match="does not have one for each key"):
        raise_failure([call])


def test_a_conditional_write_of_unknown_outcome_is_never_sent_again():
    condition = Conditions([b"k"], [3])
    for outcome, error in (
        (Lost("The connection broke.", sent=True), OutcomeUnknown),
        (refusal(OutcomeUnknown("Who knows.")), OutcomeUnknown),
        (refusal(ConditionFailed("No.", detail={"expected": 3, "found": 4})), ConditionFailed),
    ):
        call = WriteCall(1, [b"k"], [b"v"], want_existed=False, conditions=condition)
        settle(call, outcome)
        assert call.state is State.FAILED
        with pytest.raises(error):
            raise_failure([call])
    call = WriteCall(1, [b"k"], [b"v"], want_existed=False, conditions=condition, ttl_ms=5)
    settle(call, refusal(ShardUnavailable("Away.")))
    assert (sent(call, Write).conditions, sent(call, Write).ttl_ms) == (condition, 5)


def test_versions_are_put_together_from_halves():
    call = VersionedReadCall([b"a", b"b"])
    settle(call, refusal(BatchTooLarge("Too much.")))
    assert sent(call, Read) == Read([b"a"], want_versions=True)
    settle(call, answer(ReadReply([b"1"], [11])))
    settle(call, answer(ReadReply([None], [0])))
    assert (call.values, call.versions, call.state) == ([b"1", None], [11, 0], State.DONE)


def test_a_time_to_live_goes_with_what_is_sent_again():
    call = WriteCall(1, [b"a", b"b"], [b"1", b"2"], want_existed=False, may_cut=True, ttl_ms=99)
    settle(call, answer(WriteReply(bytes([0, 2]), None, [problem(4, ShardUnavailable("Away."))])))
    assert (sent(call, Write).keys, sent(call, Write).ttl_ms) == ([b"b"], 99)
    settle(call, answer(WriteReply(b"\0", 7, [])))
    assert call.state is State.DONE
    assert call.reply is not None
    assert call.reply.version is None
