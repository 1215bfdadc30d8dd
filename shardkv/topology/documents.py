"""What the metadata store holds about a cluster: one small document for each thing, under a key of its own.

Invariant: a shard's token interval never changes and its id is never used again; what changes is its owner, and
every change of owner raises its epoch, and so does a change that was given up. Documents are msgpack maps, so fields
can be added (with a default, which is not stored); none is ever renamed.

Keys:  cluster   keyspaces/<name>   shards/<id>   nodes/<name>   routers/<name>   wanted/<node>
       jobs/<id>   counters/<name>   settings/controller

What the fields of changes and jobs mean, step by step: shardkv/control/CHANGES.md.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

TopologyBound = int | bytes
"""A token: an unsigned 64-bit int in a hash keyspace, a key in a range keyspace."""

Partition = Literal["hash", "range"]

ChangeKind = Literal["move", "split", "merge"]
JobKind = Literal["add", "remove", "rebalance", "move", "split", "merge"]
JobState = Literal["planned", "running", "paused", "cancelling", "cancelled", "done", "failed"]
NodeWish = Literal["active", "draining", "removed"]

HASH_TOKENS = 2**64
FIRST_EPOCH = 1

CLUSTER_KEY = "cluster"
KEYSPACES = "keyspaces/"
SHARDS = "shards/"
NODES = "nodes/"
ROUTERS = "routers/"
WANTED = "wanted/"
JOBS = "jobs/"
COUNTERS = "counters/"
SHARD_ID_COUNTER = "counters/shard_id"
JOB_ID_COUNTER = "counters/job_id"
CONTROLLER_SETTINGS = "settings/controller"


class ClusterDocument(msgspec.Struct, frozen=True):
    """Who the cluster is and what was wanted when it was made."""

    cluster_id: str
    nodes_wanted: int
    """The default keyspace is placed once this many nodes have registered."""
    partition: Partition
    shards: int
    split_at: list[bytes]
    """First keys of the second and later shards of a range keyspace; empty: evenly over letters and digits."""


class Placing(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the shards of a new keyspace are put: dealt round robin to `nodes`, ids counting up from `first_id`."""

    shards: int
    split_at: list[bytes]
    first_id: int
    nodes: list[str]


class KeyspaceDocument(msgspec.Struct, frozen=True, omit_defaults=True):
    name: str
    partition: Partition
    dropped: bool = False
    """It takes no more requests, and its shards go one after the other; then the document goes."""
    shards: int = 0
    """How many it was made with: neighbours are not merged below that. 0: not known, nothing merges by itself."""
    placing: Placing | None = None
    """Not all of its shards are put yet, so it is not usable. None: it is complete."""


class Change(msgspec.Struct, frozen=True, omit_defaults=True):
    """A transition of a shard that is under way. It ends by one transaction: commit or abort."""

    id: str
    """Hex of 8 random bytes."""
    kind: ChangeKind
    job: int
    source_incarnation: int
    """Of the owner when the change began: a later start of it never goes on with the change, it aborts it."""
    target: str = ""
    """move: the node that fetches the shard."""
    target_incarnation: int = 0
    at: TopologyBound | None = None
    """split: first token of the upper half."""
    children: list[int] = []
    """Ids of the shards that take over: split: lower, upper; merge: one."""
    partner: int = 0
    """merge: the other shard, which carries the same change."""
    rate_bytes_s: int = 0
    """0: no limit."""
    paused: bool = False


class ShardDocument(msgspec.Struct, frozen=True, omit_defaults=True):
    """A half-open token interval [start, stop) and its owner."""

    id: int
    keyspace: str
    start: TopologyBound
    stop: TopologyBound | None
    """None: to the end of the key space (range); in a hash keyspace the last stop is 2**64, stored as None too."""
    epoch: int
    node: str
    owned_since: int = FIRST_EPOCH
    """The epoch at which `node` became the owner: the epoch of the last commit. Aborts leave it as it is. The owner's
    tablet is labelled with it, so data of an earlier or later ownership is never taken for this one's."""
    change: Change | None = None
    parents: list[int] = []
    """Shards that this one was made from, newest first: their tablets may go, wherever they are."""
    last_change: str = ""
    """Id of the change that made `node` the owner; empty: it was placed there, empty."""
    source: str = ""
    """The node it came from, whose copy is to go."""
    dropped: bool = False
    """Its tablets may go, wherever they are."""
    problem: str = ""
    """Why the last change was given up; empty after a commit."""


class NodeDocument(msgspec.Struct, frozen=True, omit_defaults=True):
    """A node as it last registered."""

    name: str
    store_id: str
    """Identity of its data directory (hex)."""
    incarnation: int
    """Number of its starts; rises by one at each."""
    address: str
    """HOST:PORT where it serves."""
    pid: int
    host: str = ""
    """Name of its machine."""
    start_id: str = ""
    """Drawn at random at each start. A directory knows the ids it drew since the last one it saw registered: a store
    that shows another one has been there with a later state of this directory (see CHANGES.md, no-old-directory)."""


class RouterDocument(msgspec.Struct, frozen=True):
    name: str
    address: str
    """Its own HOST:PORT, beside the port it may share with other routers."""
    pid: int


class WantedDocument(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is wanted of a node. A node without such a document is wanted: it counts as active."""

    name: str
    host: str = ""
    state: NodeWish = "active"
    """active: it gets its share of shards. draining: it gets no more and gives away what it has. removed: it is to
    stop for good."""
    started_by: Literal["launcher", "operator"] = "launcher"


class PlannedMove(msgspec.Struct, frozen=True, array_like=True):
    shard: int
    source: str
    target: str
    bytes: int


class Attempt(msgspec.Struct, frozen=True, array_like=True):
    """How often a job began a change of a shard, and when it may begin the next one."""

    count: int
    next_ms: int


class JobDocument(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a person asked for, or the controller decided. It is carried out by changes that name it."""

    id: int
    kind: JobKind
    state: JobState = "planned"
    asked: dict[str, Any] = {}
    """add, remove: node. move: shard, node. split: shard, at (may be left out). merge: left, right.
    remove, too: force, accept_data_loss. rebalance: moves_max (may be left out). by: who decided, "size" or "load"."""
    moves: list[PlannedMove] = []
    done: list[int] = []
    """Shards that arrived."""
    skipped: list[int] = []
    """Shards whose planned move was overtaken: they were split, merged, dropped, or went elsewhere."""
    attempts: dict[int, Attempt] = {}
    """By shard; only those that did not arrive yet."""
    problem: str = ""
    """Why it failed, or what it waits for: a sentence."""
    created_ms: int = 0
    started_ms: int = 0
    ended_ms: int = 0
    rate_bytes_s: int = 0
    """For each of its changes; 0: no limit."""


class CounterDocument(msgspec.Struct, frozen=True):
    """The next id to give; compared and put in the transaction that uses it, so an id is given once."""

    next: int


class ControllerSettings(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the controller decides. A missing document means these defaults."""

    changes_per_node: int = 2
    """How many changes a node may take part in at once."""
    rate_bytes_s: int = 0
    """Of a change of a job that has no rate of its own; 0: no limit."""
    attempts_max: int = 10
    """Of one shard of a job, before the job fails."""
    backoff_ms: int = 1_000
    """Pause before the second attempt; doubled for every further one."""
    backoff_most_ms: int = 60_000
    stuck_ms: int = 60_000
    """A change without progress for so long is aborted, and tried again."""
    away_ms: int = 15_000
    """A node that was not heard of for so long is away: nothing is moved to it, and its changes are aborted."""
    auto_split: bool = True
    split_bytes: int = 1 << 30
    split_ops_s: int = 20_000
    auto_merge: bool = True
    merge_bytes: int = 128 << 20
    """Two neighbours that are together smaller and quieter than this become one."""
    merge_ops_s: int = 1_000
    merge_quiet_ms: int = 600_000
    """They must have been so for this long, and no younger than that."""
    balance_slack: float = 0.1
    """A node may be this much above or below the mean before a rebalance moves anything."""
    jobs_kept: int = 100
    """Ended jobs beyond these are forgotten, oldest first."""


def encode_document(document: msgspec.Struct) -> bytes:
    return msgspec.msgpack.encode(document)


_decoders: dict[str, msgspec.msgpack.Decoder[msgspec.Struct]] = {
    CLUSTER_KEY: msgspec.msgpack.Decoder(ClusterDocument),
    KEYSPACES: msgspec.msgpack.Decoder(KeyspaceDocument),
    SHARDS: msgspec.msgpack.Decoder(ShardDocument),
    NODES: msgspec.msgpack.Decoder(NodeDocument),
    ROUTERS: msgspec.msgpack.Decoder(RouterDocument),
    WANTED: msgspec.msgpack.Decoder(WantedDocument),
    JOBS: msgspec.msgpack.Decoder(JobDocument),
    COUNTERS: msgspec.msgpack.Decoder(CounterDocument),
    CONTROLLER_SETTINGS: msgspec.msgpack.Decoder(ControllerSettings),
}


def decode_document(key: str, value: bytes) -> msgspec.Struct | None:
    """The document stored under `key`; None for a key this version does not know."""
    decoder = _decoders.get(key[: key.find("/") + 1] or key) or _decoders.get(key)
    return decoder.decode(value) if decoder else None
