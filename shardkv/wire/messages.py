"""Requests and replies: their numbers, shapes, encoders and typed decoders. See PROTOCOL.md.

Invariant: what a decoder here returns has exactly the declared types and bounded lengths; anything else is
RemoteProtocolError (an envelope) or InvalidArgument (a payload), raised before a large structure is built.
Operation numbers and reply statuses are never renumbered; zero in a status means success and nothing else.
Sizes of keys and values are checked by `shardkv.wire.checks`, not here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from shardkv.errors import InvalidArgument, RemoteProtocolError, ShardKVError, from_wire

PROTOCOL_VERSION = 1
MAGIC = "shardkv"

COLUMN_LENGTH_HARD_MAX = 1_000_000
"""No column longer than this is even decoded; `Limits.operations_max` then gives the exact, kinder refusal."""

FRAME_REQUESTS_MAX = 16_384
"""Most requests of one frame: it is decoded in one go, and nobody else is served meanwhile."""

TOKEN_LANE_BYTES = 16

ADMIN_BYTES_MAX = 64 * 1024
"""Of the payload of a META_ADMIN request: it is decoded without a declared shape."""

NAME_LENGTH_MAX = 255
"""Characters of a keyspace's, principal's or trace's name."""


class Op(IntEnum):
    """What a request asks for. Never renumber."""

    HELLO = 0
    CONTEXT = 1
    PING = 2
    READ = 10
    WRITE = 11
    SCAN = 12
    COUNT = 13
    DELETE_RANGE = 14
    STATUS = 20
    ROUTES = 21
    META_READ = 30
    META_TXN = 31
    META_WATCH = 32
    META_ADMIN = 33
    MOVE_BEGIN = 40
    MOVE_FILE = 41
    MOVE_DUMP = 42
    MOVE_TAIL = 43
    MOVE_FENCE = 44
    MOVE_END = 45


class Kind(IntEnum):
    """What one operation of a write does. Never renumber; the storage formats use the same numbers.

    3 and 4 are kinds of storage that no request names.
    """

    PUT = 1
    DELETE = 2
    INCR = 5
    """Add the value, decimal text, to the number the key has. Stored as the put of the sum."""


class WriteResult(IntEnum):
    """What became of one operation of a write."""

    APPLIED = 0
    APPLIED_EXISTED = 1
    """Applied, and the key existed before; told only when asked for with `want_existed`."""
    REFUSED = 2
    """Not applied."""
    UNKNOWN = 3
    """May or may not have been applied."""


OK = 0
ERROR = 1

Column = Annotated[list[bytes], msgspec.Meta(max_length=COLUMN_LENGTH_HARD_MAX)]
Name = Annotated[str, msgspec.Meta(max_length=NAME_LENGTH_MAX)]
Versions = Annotated[list[Annotated[int, msgspec.Meta(ge=0)]], msgspec.Meta(max_length=COLUMN_LENGTH_HARD_MAX)]
IntColumn = Annotated[list[Annotated[int, msgspec.Meta(ge=0)]], msgspec.Meta(max_length=COLUMN_LENGTH_HARD_MAX)]
OptionalColumn = Annotated[list[bytes | None], msgspec.Meta(max_length=COLUMN_LENGTH_HARD_MAX)]


class Message(msgspec.Struct, array_like=True, gc=False):
    """Base of all wire structures: arrays on the wire, so a later version may add fields at the end."""


class Request(Message):
    """One request. `shard` and `epoch` are nil towards a router; `deadline_ms` is what remains, nil for none."""

    id: int
    op: int
    ctx: int
    shard: int | None
    epoch: int | None
    deadline_ms: int | None
    payload: msgspec.Raw


class Reply(Message):
    """One reply. `status` is OK and `payload` the operation's reply, or ERROR and an ErrorPayload."""

    id: int
    status: int
    payload: Any


class RawReply(Message):
    """A reply as it is received: its payload is decoded once the request it answers is known."""

    id: int
    status: int
    payload: msgspec.Raw


class ErrorPayload(Message):
    code: str
    message: str
    detail: dict[str, Any]
    hint: str


class Hello(Message):
    """The first request of a connection, and the payload of its reply: who each side is."""

    magic: str
    protocol: int
    role: str
    """`client`, `router`, `node`, `meta` or `launcher`."""
    name: str
    cluster_id: str | None
    """None for a client: it belongs to no cluster until it is told one."""
    incarnation: int
    credentials: bytes | None
    ordered: bool
    """Ask that replies to one key keep the order of the requests."""


class Context(Message):
    """Registers what number `ctx` stands for on this connection."""

    ctx: int
    keyspace: Name
    principal: Name | None
    trace: Name | None


class Read(Message):
    keys: Column
    want_versions: bool = False


class ReadReply(Message):
    values: OptionalColumn
    """In the order of the keys; nil where there is none."""
    versions: Versions | None = None
    """With `want_versions`: one for each value, 0 where there is none."""


class PartialRead(Read):
    """A read that a router may answer without the shards it cannot reach. Apart, so that a plain read stays short."""

    partial: bool = False


class Token(Message):
    """An idempotency token: with it a write may be sent again, and is made once.

    A lane is one caller's sequence of writes: the next one is sent, with a higher number, only when the one before was
    answered or given up.
    """

    lane: bytes
    """TOKEN_LANE_BYTES that nobody else has."""
    number: int
    again: bool = False
    """It may have been sent before, and no answer came."""


class Conditions(Message):
    """What must hold for a write to be made: each key has this version, 0: does not exist."""

    keys: Column
    versions: Versions


class Write(Message):
    """The one write operation. `kinds` is one Kind for all operations or one byte for each."""

    token: Token | None
    conditions: Conditions | None
    """Their keys, and those of all operations, are of one shard."""
    kinds: int | bytes
    keys: Column
    values: Column
    """Empty bytes where the operation is a delete; what to add, as decimal text, where it is an INCR."""
    want_existed: bool
    ttl_ms: int | None = None
    """What is written reads as absent so many milliseconds after the node took it; nil: it stays."""


ShardSpans = Annotated[list[tuple[int, int, int]], msgspec.Meta(max_length=COLUMN_LENGTH_HARD_MAX)]
"""(shard, epoch, count): the next `count` keys are of that shard."""


class SharedRead(PartialRead):
    """A node's share of a read: keys of several shards. Its request names no shard."""

    shards: ShardSpans = []


class SharedWrite(Write):
    """A node's share of a write without conditions: operations on several shards, atomic in each of them. Its request
    names no shard."""

    shards: ShardSpans = []


class ShardProblem(Message):
    """Why the operations of one shard were not applied, or are not known to be; or why it could not be read."""

    shard: int
    code: str
    message: str
    detail: dict[str, Any]
    hint: str


class PartialReadReply(ReadReply):
    """What could be read. `problems` are as those of a Page."""

    missing: IntColumn = []
    """The places, ascending, of the keys that were not read; their values are nil, too."""
    problems: list[ShardProblem] = []


class WriteReply(Message):
    results: bytes
    """One WriteResult for each operation, in the order asked."""
    version: int | None
    """The version given to every operation when one shard took them all."""
    problems: list[ShardProblem]
    number: int | None = None
    """What an INCR came to."""


class Scan(Message):
    """One page of an ordered scan of [start, stop). To a node, `shards` names (shard, epoch) pairs."""

    start: bytes
    stop: bytes | None
    reverse: bool
    keys_only: bool
    limit: int
    page_bytes: int
    shards: Annotated[list[tuple[int, int]], msgspec.Meta(max_length=COLUMN_LENGTH_HARD_MAX)] | None
    partial: bool = False
    """To a router: leave out shards that cannot be read now, and name them, instead of failing."""


class Page(Message):
    """Rows in the scan's order and what they cover.

    Forward the page covers [start, frontier) and the next one starts at `frontier`; in reverse it covers
    [frontier, stop) and the next one stops there. A nil frontier: everything asked for is covered.
    """

    keys: Column
    values: Column | None
    frontier: bytes | None
    shards: list[int] | None
    """From a node: the shards covered. From a router: nil, all of the keyspace but those of `problems`."""
    problems: list[ShardProblem] = []
    """Shards whose rows are missing from what the page covers; only when `partial` was asked for. The detail of each
    has `start` and `stop`, its tokens: keys in a range keyspace, numbers in a hash keyspace."""


class Count(Message):
    """How many keys are in [start, stop). To a node: in one step of one shard's part of it."""

    start: bytes
    stop: bytes | None
    partial: bool = False
    """To a router: leave out shards that cannot be counted now, and name them, instead of failing."""


class CountReply(Message):
    """Keys of [start, frontier); a nil frontier, the only one of a router: of all that was asked for."""

    count: int
    frontier: bytes | None
    problems: list[ShardProblem] = []
    """Shards that were not counted, as those of a Page; only when `partial` was asked for."""


class DeleteRange(Message):
    """Delete the first keys of [start, stop), at most `limit` of them: one step, resumed at the reply's frontier."""

    start: bytes
    stop: bytes | None
    limit: int | None


class DeleteRangeReply(Message):
    """So many keys existed and were deleted; all of [start, frontier) were. A nil frontier: all of [start, stop)."""

    deleted: int
    frontier: bytes | None


class RoutesAsked(Message):
    """Where the keys of the keyspace are, unless that is what the asker knows: the routes of this revision."""

    cluster_id: str | None
    revision: int


class RoutesReply(Message):
    """A keyspace's shards in token order, a row in each column, and their nodes. No `partition`: they are as known."""

    cluster_id: str
    revision: int
    partition: Literal["hash", "range"] | None = None
    starts: Annotated[list[int | bytes], msgspec.Meta(max_length=COLUMN_LENGTH_HARD_MAX)] = []
    """First tokens: numbers in a hash keyspace, keys in a range keyspace. A shard stops where the next one starts."""
    shards: IntColumn = []
    epochs: IntColumn = []
    owners: IntColumn = []
    """Places in `nodes`."""
    nodes: Annotated[list[tuple[str, str]], msgspec.Meta(max_length=COLUMN_LENGTH_HARD_MAX)] = []
    """(name, HOST:PORT); an empty address: it has none yet."""


class MetaRead(Message):
    prefix: str


class MetaEntry(Message):
    key: str
    value: bytes | None
    """nil: deleted."""
    revision: int


class MetaCompare(Message):
    key: str
    revision: int
    """The entry's revision must be this one; 0: the key must not exist."""


class MetaPut(Message):
    key: str
    value: bytes | None
    """nil deletes."""


class MetaTxn(Message):
    compares: list[MetaCompare]
    puts: list[MetaPut]


class MetaTxnReply(Message):
    applied: bool
    revision: int


class MetaWatch(Message):
    since: int
    """Answered when something is newer than this revision, or after `wait_ms` with nothing."""
    wait_ms: int


class MetaEntries(Message):
    revision: int
    entries: list[MetaEntry]


class _ReadProblems(Message):
    """As far as something went wrong; the values are not looked at."""

    values: msgspec.Raw
    versions: msgspec.Raw
    missing: msgspec.Raw
    problems: list[ShardProblem]


Requests = tuple[int, Annotated[list[Request], msgspec.Meta(max_length=FRAME_REQUESTS_MAX)]]
Replies = tuple[int, Annotated[list[RawReply], msgspec.Meta(max_length=COLUMN_LENGTH_HARD_MAX)]]

Batch = TypeVar("Batch")

UNDECODABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OverflowError)
"""What msgspec raises for bytes that are not what was declared."""

_encoder = msgspec.msgpack.Encoder()
_requests_decoder: msgspec.msgpack.Decoder[Requests] = msgspec.msgpack.Decoder(Requests)
_replies_decoder: msgspec.msgpack.Decoder[Replies] = msgspec.msgpack.Decoder(Replies)
_error_decoder = msgspec.msgpack.Decoder(ErrorPayload)
_admin_decoder: msgspec.msgpack.Decoder[dict[str, Any]] = msgspec.msgpack.Decoder(dict[str, Any])

encode = _encoder.encode
"""Any message, or a list of them, as msgpack."""

NOTHING = msgspec.Raw(b"\xc0")
"""An empty payload."""


def raw(message: Any) -> msgspec.Raw:
    """`message` encoded, ready to be put into a Request."""
    return msgspec.Raw(encode(message))


def encode_batch(clock: int, messages: Sequence[Any]) -> bytes:
    """The body of a frame: the sender's hybrid clock and a batch of requests or replies."""
    return encode((clock, messages))


def decode_requests(body: bytes) -> Requests:
    """(sender's clock, requests) of a frame body. Raises RemoteProtocolError."""
    return _decode_envelope(_requests_decoder, body, "request")


def decode_replies(body: bytes) -> Replies:
    """(sender's clock, replies) of a frame body. Raises RemoteProtocolError."""
    return _decode_envelope(_replies_decoder, body, "reply")


def _as_list(encoded: Sequence[bytes | msgspec.Raw]) -> bytes:
    """The list of so many things, up to 65,535, that are encoded already."""
    return b"\xdc" + len(encoded).to_bytes(2, "big") + b"".join(encoded)


_ONE_REQUEST = b"\x91"
_CLOCK_END = 10
"""A body begins with the array's byte and, as long as clocks are above 2**32, nine bytes of clock."""
_lone_requests_decoder: msgspec.msgpack.Decoder[list[tuple[int, tuple[Request]]]] = msgspec.msgpack.Decoder(
    list[tuple[int, tuple[Request]]]
)


def has_one_request(body: bytes) -> bool:
    """Whether the body of a frame looks like that of one request: a guess, cheaper than decoding it."""
    return body[_CLOCK_END : _CLOCK_END + 1] == _ONE_REQUEST


def decode_lone_requests(bodies: Sequence[bytes]) -> list[tuple[int, tuple[Request]]] | None:
    """(sender's clock, the one request) of each of up to 65,535 frame bodies, decoded in one go; None when one of them
    is something else."""
    try:
        return _lone_requests_decoder.decode(_as_list(bodies))
    except UNDECODABLE:
        return None


def _decode_envelope(decoder: msgspec.msgpack.Decoder[Batch], body: bytes, what: str) -> Batch:
    try:
        return decoder.decode(body)
    except UNDECODABLE as error:
        raise RemoteProtocolError(f"A frame is not a batch of {what}s: {_reason(error)}.") from error


class PayloadDecoder:
    """Decodes one type of payload; what does not fit is InvalidArgument with the place and the reason."""

    __slots__ = ("_decode", "_name")

    def __init__(self, kind: type[Message], name: str = "") -> None:
        self._decode = msgspec.msgpack.Decoder(kind).decode
        self._name = name or kind.__name__.lower()

    def __call__(self, payload: msgspec.Raw) -> Any:
        try:
            return self._decode(payload)
        except UNDECODABLE as error:
            raise InvalidArgument(f"The payload of a {self._name} request is malformed: {_reason(error)}.") from error


def _reason(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error).rstrip(".")


decode_hello = PayloadDecoder(Hello)
decode_context = PayloadDecoder(Context)
decode_read = PayloadDecoder(Read)
decode_read_reply = PayloadDecoder(ReadReply)
decode_partial_read = PayloadDecoder(PartialRead, "read")
decode_partial_read_reply = PayloadDecoder(PartialReadReply)
decode_shared_read = PayloadDecoder(SharedRead)
decode_read_problems = PayloadDecoder(_ReadProblems)
"""Of a PartialReadReply."""
decode_write = PayloadDecoder(Write)
decode_shared_write = PayloadDecoder(SharedWrite)
decode_write_reply = PayloadDecoder(WriteReply)
decode_scan = PayloadDecoder(Scan)
decode_page = PayloadDecoder(Page)
decode_count = PayloadDecoder(Count)
decode_count_reply = PayloadDecoder(CountReply)
decode_delete_range = PayloadDecoder(DeleteRange)
decode_delete_range_reply = PayloadDecoder(DeleteRangeReply)
decode_routes = PayloadDecoder(RoutesAsked, "routes")
decode_routes_reply = PayloadDecoder(RoutesReply)
decode_meta_read = PayloadDecoder(MetaRead)
decode_meta_txn = PayloadDecoder(MetaTxn)
decode_meta_txn_reply = PayloadDecoder(MetaTxnReply)
decode_meta_watch = PayloadDecoder(MetaWatch)
decode_meta_entries = PayloadDecoder(MetaEntries)


_reads_decoder: msgspec.msgpack.Decoder[list[Read]] = msgspec.msgpack.Decoder(list[Read])


def decode_reads(payloads: Sequence[msgspec.Raw]) -> list[Read] | None:
    """The payloads of up to 65,535 reads, decoded in one go; None when one of them is malformed."""
    try:
        return _reads_decoder.decode(_as_list(payloads))
    except UNDECODABLE:
        return None


class _ReadOfOne(Message, forbid_unknown_fields=True):
    keys: tuple[bytes]
    want_versions: bool = False


class _WriteOfOne(Message):
    """As far as a key is looked for; what comes after it is not looked at."""

    token: msgspec.Raw
    conditions: None
    kinds: msgspec.Raw
    keys: tuple[bytes]


_single_decoders: dict[int, Callable[[bytes], list[_ReadOfOne] | list[_WriteOfOne]]] = {
    int(Op.READ): msgspec.msgpack.Decoder(list[_ReadOfOne]).decode,
    int(Op.WRITE): msgspec.msgpack.Decoder(list[_WriteOfOne]).decode,
}


def single_keys(op: int, payloads: Sequence[msgspec.Raw]) -> list[bytes] | None:
    """The key of each of up to 65,535 reads or writes. Nothing else in them is looked at: their node does that.

    None when one of them has not just one key, or asks for what does not go to its node as it is.
    """
    try:
        return [found.keys[0] for found in _single_decoders[op](_as_list(payloads))]
    except UNDECODABLE:
        return None


class PlainPut(msgspec.Struct, array_like=True, gc=False):
    """What most writes are: a `Write` of puts that asks for nothing else."""

    token: Token | None
    conditions: None
    kinds: Literal[1]
    keys: Column
    values: Column
    want_existed: Literal[False]
    ttl_ms: None = None


_puts_decoder: msgspec.msgpack.Decoder[list[PlainPut]] = msgspec.msgpack.Decoder(list[PlainPut])


def decode_puts(payloads: Sequence[msgspec.Raw]) -> list[PlainPut] | None:
    """The payloads of up to 65,535 writes, decoded in one go; None when one of them is more than plain puts."""
    try:
        return _puts_decoder.decode(_as_list(payloads))
    except UNDECODABLE:
        return None


def sent_again(payload: msgspec.Raw) -> msgspec.Raw | None:
    """The payload of a write, saying that it may have been sent before; None when it has no token by which to tell."""
    try:
        write: Write = decode_write(payload)
    except InvalidArgument:
        return None
    if write.token is None:
        return None
    write.token.again = True
    return raw(write)


def decode_any(payload: msgspec.Raw) -> Any:
    """A payload of a trusted peer without a declared shape (status)."""
    return msgspec.msgpack.decode(payload)


def decode_admin(payload: msgspec.Raw) -> dict[str, Any]:
    """What a META_ADMIN request asks for; it has at least a `verb`. Raises InvalidArgument."""
    if len(bytes(payload)) > ADMIN_BYTES_MAX:
        raise InvalidArgument(f"An admin request is longer than {ADMIN_BYTES_MAX} bytes.")
    try:
        asked: dict[str, Any] = _admin_decoder.decode(payload)
    except UNDECODABLE as error:
        raise InvalidArgument(f"An admin request is malformed: {_reason(error)}.") from error
    if not isinstance(asked.get("verb"), str):
        raise InvalidArgument("An admin request names no verb.")
    return asked


def error_reply(request_id: int, error: ShardKVError) -> Reply:
    """The reply that reports `error`."""
    return Reply(request_id, ERROR, ErrorPayload(error.code, error.message, error.detail, error.hint))


def problem_of(shard: int, error: ShardKVError) -> ShardProblem:
    """What `error` says of a shard."""
    return ShardProblem(shard, error.code, error.message, error.detail, error.hint)


def problem_reply(problem: ShardProblem) -> RawReply:
    """The reply that would have told this of a request of that shard alone."""
    told = ErrorPayload(problem.code, problem.message, problem.detail, problem.hint)
    return RawReply(0, ERROR, raw(told))


def reply_error(payload: msgspec.Raw) -> ShardKVError:
    """The exception an ERROR reply's payload stands for."""
    try:
        told = _error_decoder.decode(payload)
    except UNDECODABLE as error:
        return RemoteProtocolError(f"The peer reported an error that cannot be read: {error}.")
    return from_wire(told.code, told.message, told.detail, told.hint)
