import msgspec
import pytest

from shardkv.errors import (
    BatchTooLarge,
    InvalidArgument,
    OutcomeUnknown,
    RemoteProtocolError,
    ShardUnavailable,
    WrongShard,
)
from shardkv.topology.gathering import (
    PartialReadGather,
    ReadGather,
    WriteGather,
    one_shard,
    read_part,
    split_by_shard,
    write_part,
)
from shardkv.topology.placement import place_keyspace
from shardkv.topology.view import KeyspaceView
from shardkv.wire.messages import (
    PartialReadReply,
    Read,
    ReadReply,
    Write,
    WriteReply,
    WriteResult,
    decode_read,
    decode_write,
    raw,
)

VIEW = KeyspaceView(
    "default", "range", place_keyspace("default", "range", shards=1, split_at=[b"h", b"p"], nodes=["n"], first_id=1)
)
KEYS = [b"z", b"a", b"i", b"b", b"a"]


def test_keys_go_to_their_shards_in_the_order_asked() -> None:
    assert split_by_shard(VIEW, KEYS) == [(1, [1, 3, 4]), (2, [2]), (3, [0])]
    assert decode_read(read_part(Read(KEYS), [1, 3, 4])).keys == [b"a", b"b", b"a"]
    assert decode_read(read_part(Read(KEYS), [2])) == Read([b"i"])


def test_a_write_is_cut_with_its_columns() -> None:
    write = Write(None, None, b"\x01\x02\x01\x01\x02", KEYS, [b"0", b"", b"2", b"3", b""], True)
    part = decode_write(write_part(write, [1, 3, 4]))
    assert (part.kinds, part.keys, part.values, part.want_existed) == (
        b"\x02\x01\x02",
        [b"a", b"b", b"a"],
        [b"", b"3", b""],
        True,
    )


def test_a_read_is_answered_once_in_the_order_asked() -> None:
    answers: list[object] = []
    gather = ReadGather(3, 2, 1000, answers.append)
    gather.part([2])(raw(ReadReply([b"two"])))
    assert answers == []
    gather.part([0, 1])(raw(ReadReply([None, b"one"])))
    assert answers == [ReadReply([None, b"one", b"two"])]


def test_a_read_fails_whole_with_the_error_of_its_shard() -> None:
    answers: list[object] = []
    gather = ReadGather(2, 2, 1000, answers.append)
    problem = ShardUnavailable("Shard 7 is away.")
    gather.part([0])(problem)
    gather.part([1])(raw(ReadReply([b"x"])))
    assert answers == [problem]


def test_a_partial_read_lacks_the_keys_of_shards_that_are_away_and_names_them() -> None:
    answers: list[PartialReadReply] = []
    gather = PartialReadGather(5, 3, 1000, answers.append, versions=True)  # type: ignore[arg-type]
    first, second, third = VIEW.shards
    gather.part_of(third, [0])(OutcomeUnknown("The connection broke."))
    gather.part_of(first, [1, 3, 4])(ShardUnavailable("Shard 1 is away.", detail={"node": "n"}))
    gather.part_of(second, [2])(raw(ReadReply([b"v"], [7])))
    (reply,) = answers
    assert (reply.values, reply.versions, reply.missing) == (
        [None, None, b"v", None, None],
        [0, 0, 7, 0, 0],
        [0, 1, 3, 4],
    )
    assert [(problem.shard, problem.code) for problem in reply.problems] == [
        (3, "shard_unavailable"),
        (1, "shard_unavailable"),
    ]
    assert reply.problems[1].detail == {"node": "n", "shard": 1, "start": b"", "stop": b"h"}


@pytest.mark.parametrize("error", [BatchTooLarge("Too much."), WrongShard("Not mine.")])
def test_a_partial_read_fails_for_what_is_no_absence(error: Exception) -> None:
    answers: list[object] = []
    gather = PartialReadGather(2, 2, 1000, answers.append)
    gather.part_of(VIEW.shards[0], [0])(error)  # type: ignore[arg-type]
    gather.part_of(VIEW.shards[1], [1])(raw(ReadReply([b"x"])))
    assert answers == [error]


def test_a_read_that_would_not_fit_into_a_frame_is_refused_and_not_kept() -> None:
    answers: list[object] = []
    gather = ReadGather(3, 3, 100, answers.append)
    for index in range(3):
        gather.part([index])(raw(ReadReply([b"v" * 45])))
    (error,) = answers
    assert isinstance(error, BatchTooLarge)
    assert gather._values == [None] * 3


def test_a_write_tells_the_fate_of_every_operation() -> None:
    answers: list[WriteReply] = []
    gather = WriteGather(4, 3, answers.append)
    gather.part(1, [0, 2])(raw(WriteReply(bytes((0, 1)), 5, [])))
    gather.part(2, [1])(ShardUnavailable("Shard 2 is away."))
    gather.part(3, [3])(OutcomeUnknown("Who knows."))
    (reply,) = answers
    assert list(reply.results) == [0, WriteResult.REFUSED, WriteResult.APPLIED_EXISTED, WriteResult.UNKNOWN]
    assert [(problem.shard, problem.code) for problem in reply.problems] == [
        (2, "shard_unavailable"),
        (3, "outcome_unknown"),
    ]


@pytest.mark.parametrize("answer", [raw(ReadReply([b"one", b"too many"])), raw(["no", "reply", 1]), raw(None)])
def test_a_read_of_nonsense_from_a_node_is_an_error_and_ends(answer: msgspec.Raw) -> None:
    answers: list[object] = []
    gather = ReadGather(2, 2, 10**6, answers.append)
    gather.part([0])(answer)
    gather.part([1])(raw(ReadReply([b"x"])))
    assert [type(answer) for answer in answers] == [RemoteProtocolError]


@pytest.mark.parametrize("answer", [raw(WriteReply(b"\0\0", 1, [])), raw(["no", "reply", 1]), raw(None)])
def test_a_write_answered_with_nonsense_is_unknown_and_ends(answer: msgspec.Raw) -> None:
    answers: list[WriteReply] = []
    gather = WriteGather(2, 2, answers.append)
    gather.part(1, [0])(answer)
    gather.part(2, [1])(raw(WriteReply(b"\0", 5, [])))
    (reply,) = answers
    assert list(reply.results) == [WriteResult.UNKNOWN, WriteResult.APPLIED]
    assert [(problem.shard, problem.code) for problem in reply.problems] == [(1, "outcome_unknown")]


def test_versions_are_gathered_with_the_values() -> None:
    answers: list[object] = []
    assert decode_read(read_part(Read(KEYS, want_versions=True), [0])) == Read([b"z"], want_versions=True)
    gather = ReadGather(3, 2, 1000, answers.append, versions=True)
    gather.part([2])(raw(ReadReply([b"two"], [22])))
    gather.part([0, 1])(raw(ReadReply([None, b"one"], [0, 11])))
    assert answers == [ReadReply([None, b"one", b"two"], [0, 11, 22])]
    for versions in (None, [1, 2]):
        gather = ReadGather(1, 1, 1000, answers.append, versions=True)
        gather.part([0])(raw(ReadReply([b"one"], versions)))
        assert isinstance(answers[-1], RemoteProtocolError)


def test_a_time_to_live_goes_with_every_part_of_a_write() -> None:
    write = Write(None, None, 1, KEYS, [b"v"] * 5, False, 1234)
    assert decode_write(write_part(write, [1, 3])).ttl_ms == 1234


def test_a_write_with_conditions_keeps_to_one_shard() -> None:
    assert one_shard(VIEW, [b"a", b"b"], [b"c"]) == 1
    with pytest.raises(InvalidArgument, match=r"its keys are of 2: b'a' is of shard 1, b'z' is of shard 3\.") as caught:
        one_shard(VIEW, [b"a", b"b"], [b"z"])
    assert caught.value.detail == {"shards": [1, 3]}
