"""What direct mode sends where, and what the outcomes make of a call; played through without a cluster."""

from __future__ import annotations

import pytest

from shardkv.client import requests
from shardkv.client.calls import Call, Lost, Outcome, State
from shardkv.client.direct import Leg, left_for_router, legs_of
from shardkv.client.lanes import Lanes
from shardkv.errors import (
    BatchTooLarge,
    Draining,
    InvalidKey,
    OutcomeUnknown,
    Overloaded,
    ShardKVError,
    ShardUnavailable,
    StaleEpoch,
    WrongShard,
)
from shardkv.limits import DEFAULT_LIMITS
from shardkv.topology.documents import ShardDocument
from shardkv.topology.routes import Routes
from shardkv.topology.view import KeyspaceView
from shardkv.wire.messages import (
    ERROR,
    OK,
    ErrorPayload,
    Message,
    Op,
    PartialReadReply,
    RawReply,
    ReadReply,
    ShardProblem,
    SharedRead,
    Token,
    WriteReply,
    decode_read,
    decode_shared_read,
    decode_shared_write,
    decode_write,
    raw,
)
from shardkv.write_batch import WriteBatch

VIEW = KeyspaceView(
    "default",
    "range",
    [
        ShardDocument(1, "default", b"", b"h", 4, "node-1"),
        ShardDocument(2, "default", b"h", b"p", 5, "node-2"),
        ShardDocument(3, "default", b"p", None, 6, "node-1"),
    ],
)
ROUTES = Routes("c1", 9, VIEW, {"node-1": "h:1", "node-2": "h:2"})


def ok(reply: Message) -> RawReply:
    return RawReply(1, OK, raw(reply))


def refused(error: ShardKVError) -> RawReply:
    return RawReply(1, ERROR, raw(ErrorPayload(error.code, error.message, error.detail, error.hint)))


def asked(legs: list[Leg]) -> list[tuple[Op, str, int | None, int | None]]:
    return [(leg.ask[0], leg.node, leg.ask[2], leg.ask[3]) for leg in legs]


def end(call: Call, legs: list[Leg], *outcomes: Outcome) -> list[Call]:
    """Deliver; what is left for a router."""
    for leg, outcome in zip(legs, outcomes, strict=True):
        leg.deliver(outcome)
    return left_for_router([call])


def test_one_key_goes_to_its_node_as_it_is() -> None:
    for call in (requests.get("k", DEFAULT_LIMITS, with_version=True), requests.put("k", "v", DEFAULT_LIMITS, ttl=1)):
        legs = legs_of(call, ROUTES)
        assert asked(legs) == [(call.op, "node-2", 2, 5)]
        assert legs[0].ask[1] == call.message()


def test_keys_of_several_shards_are_asked_for_node_by_node_and_put_together() -> None:
    keys = ["z", "a", "i", "b", "a"]
    (call,) = requests.get_many(keys, DEFAULT_LIMITS, with_version=True)
    legs = legs_of(call, ROUTES)
    assert asked(legs) == [(Op.READ, "node-1", None, None), (Op.READ, "node-2", None, None)]
    assert [decode_shared_read(leg.ask[1]) for leg in legs] == [
        SharedRead([b"a", b"b", b"a", b"z"], True, shards=[(1, 4, 3), (3, 6, 1)]),
        SharedRead([b"i"], True, shards=[(2, 5, 1)]),
    ]
    left = end(call, legs, ok(ReadReply([b"A", None, b"A", b"Z"], [1, 0, 1, 3])), ok(ReadReply([b"I"], [2])))
    assert (left, call.state) == ([], State.DONE)
    assert requests.versioned_by_key(keys, [call], lambda value: value) == {
        "z": (b"Z", 3),
        "a": (b"A", 1),
        "i": (b"I", 2),
        "b": None,
    }


@pytest.mark.parametrize(
    "outcome",
    [
        refused(WrongShard("Not mine.")),
        refused(StaleEpoch("Not now.")),
        refused(Draining("Bye.")),
        Lost("It broke.", sent=True),
        Lost("Nobody there.", sent=False),
    ],
)
def test_a_read_that_fails_at_a_node_goes_whole_through_a_router(outcome: Outcome) -> None:
    one = requests.get("k", DEFAULT_LIMITS)
    assert end(one, legs_of(one, ROUTES), outcome) == [one]
    (many,) = requests.get_many(["a", "k"], DEFAULT_LIMITS)
    assert end(many, legs_of(many, ROUTES), ok(ReadReply([b"A"])), outcome) == [many]
    assert decode_read(many.payload()).keys == [b"a", b"k"]
    for call in (one, many):
        assert isinstance(call.error, ShardKVError)
        assert call.error.code in ("shard_unavailable", "router_unavailable", "draining")
        assert legs_of(call, ROUTES) == [], "a call that was refused goes through routers from then on"


def test_a_write_is_sent_on_only_where_it_surely_was_not_applied() -> None:
    call = requests.put("k", "v", DEFAULT_LIMITS)
    assert end(call, legs_of(call, ROUTES), Lost("It broke.", sent=False)) == [call]
    call = requests.put("k", "v", DEFAULT_LIMITS)
    assert end(call, legs_of(call, ROUTES), Lost("It broke.", sent=True)) == []
    assert isinstance(call.error, OutcomeUnknown)
    (many,) = requests.batch_put(["a", "k", "z"], ["1", "2", "3"], DEFAULT_LIMITS)
    moved = ShardProblem(3, "stale_epoch", "Moved.", {}, "")
    first = ok(WriteReply(b"\0\2", None, [moved]))
    assert end(many, legs_of(many, ROUTES), first, Lost("Nobody there.", sent=False)) == [many]
    assert decode_write(many.payload()).keys == [b"k", b"z"]
    assert isinstance(many.error, ShardUnavailable)
    assert list(many.results) == [0, 2, 2]
    (many,) = requests.batch_put(["a", "k", "z"], ["1", "2", "3"], DEFAULT_LIMITS)
    assert end(many, legs_of(many, ROUTES), first, Lost("Gone.", sent=True)) == []
    assert isinstance(many.error, OutcomeUnknown)
    assert list(many.results) == [0, 3, 2]
    (many,) = requests.batch_put(["a", "k", "z"], ["1", "2", "3"], DEFAULT_LIMITS)
    assert end(many, legs_of(many, ROUTES), ok(WriteReply(b"\0\1", None, [])), ok(WriteReply(b"\1", 3, []))) == []
    assert many.state is State.DONE
    assert list(many.results) == [0, 1, 1]


def test_a_write_with_a_token_that_was_lost_goes_through_a_router_with_the_same_token() -> None:
    lanes = Lanes()
    (many,) = requests.batch_put(["a", "k", "z"], ["1", "2", "3"], DEFAULT_LIMITS)
    one = requests.incr("k", 1, DEFAULT_LIMITS)
    lanes.lend([one, many], 5)
    legs = legs_of(one, ROUTES)
    sent = decode_write(raw(legs[0].ask[1])).token
    assert end(one, legs, Lost("It broke.", sent=True)) == [one]
    again = decode_write(one.payload()).token
    assert sent is not None
    assert again == Token(sent.lane, sent.number, again=True)
    legs = legs_of(many, ROUTES)
    tokens = [decode_shared_write(leg.ask[1]).token for leg in legs]
    assert end(many, legs, ok(WriteReply(b"\0\0", None, [])), Lost("It broke.", sent=True)) == [many]
    rest = decode_write(many.payload())
    assert tokens[0] == tokens[1]
    assert tokens[0] is not None
    assert (rest.keys, rest.token) == ([b"k"], Token(tokens[0].lane, tokens[0].number, again=True))
    assert legs_of(many, ROUTES) == []


@pytest.mark.parametrize("nonsense", [ok(WriteReply(b"\0\0\0", 7, [])), RawReply(1, OK, raw("well"))])
def test_an_answer_that_is_none_leaves_a_write_unknown_and_fails_a_read(nonsense: RawReply) -> None:
    (write,) = requests.batch_put(["a", "k"], ["1", "2"], DEFAULT_LIMITS)
    assert end(write, legs_of(write, ROUTES), ok(WriteReply(b"\0", 7, [])), nonsense) == []
    assert isinstance(write.error, OutcomeUnknown)
    (read,) = requests.get_many(["a", "k"], DEFAULT_LIMITS)
    assert end(read, legs_of(read, ROUTES), ok(ReadReply([b"A"])), nonsense) == []
    assert read.state is State.FAILED


def test_a_read_of_which_a_shard_has_moved_goes_whole_through_a_router() -> None:
    (call,) = requests.get_many(["a", "k", "z"], DEFAULT_LIMITS)
    moved = ShardProblem(3, "wrong_shard", "Moved.", {}, "")
    lacking = PartialReadReply([b"A", None], None, [1], [moved])
    assert end(call, legs_of(call, ROUTES), ok(lacking), ok(ReadReply([b"K"]))) == [call]
    assert isinstance(call.error, ShardUnavailable)
    assert decode_read(call.payload()).keys == [b"a", b"k", b"z"]


def test_what_a_router_would_answer_no_better_ends_at_the_node() -> None:
    call = requests.get("k", DEFAULT_LIMITS)
    assert end(call, legs_of(call, ROUTES), refused(InvalidKey("What a key."))) == []
    assert call.state is State.FAILED
    call = requests.get("k", DEFAULT_LIMITS)
    assert end(call, legs_of(call, ROUTES), refused(Overloaded("Later.", detail={"retry_after_ms": 20}))) == []
    assert call.state is State.WAITING
    assert asked(legs_of(call, ROUTES)) == [(Op.READ, "node-2", 2, 5)]
    (many,) = requests.get_many(["a", "b", "k"], DEFAULT_LIMITS)
    assert end(many, legs_of(many, ROUTES), refused(BatchTooLarge("Half, please.")), ok(ReadReply([b"K"]))) == []
    assert len(decode_read(many.payload()).keys) == 1
    assert legs_of(many, ROUTES) != []


def test_what_needs_more_than_its_own_shards_goes_through_a_router() -> None:
    batch = WriteBatch()
    batch.put("a", "1")
    (within,) = requests.write(batch, DEFAULT_LIMITS, if_versions={"b": 3})
    assert asked(legs_of(within, ROUTES)) == [(Op.WRITE, "node-1", 1, 4)]
    (across,) = requests.write(batch, DEFAULT_LIMITS, if_versions={"k": 3})
    assert legs_of(across, ROUTES) == []
    (partial,) = requests.get_some(["a", "k"], DEFAULT_LIMITS)
    assert legs_of(partial, ROUTES) == []
    for call in [*requests.count("a", None, None, DEFAULT_LIMITS), requests.status(), requests.ping()]:
        assert legs_of(call, ROUTES) == []
