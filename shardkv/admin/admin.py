"""The cluster as an operator sees it: nodes, shards, keyspaces, jobs. Blocking; safe to share among threads.

    from shardkv import Admin

    with Admin("127.0.0.1:7400") as admin:
        job = admin.add_node().job
        for step in admin.watch_job(job):
            print(step.bytes_done, step.bytes_total, step.problem)

Invariants: what changes something returns when it is written down in the metadata store; a job then goes on by itself,
whatever becomes of this program. A change that is asked for again with the same `token` is made once.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, overload

import msgspec

from shardkv.admin.asker import Asker
from shardkv.client.arguments import DEFAULT_ADDRESS, to_addresses, to_column, to_timeout_s
from shardkv.client.sync import Client
from shardkv.control.told import Job, Keyspace, Node, Plan, Settings, Shard, Status
from shardkv.errors import DeadlineExceeded, InvalidArgument, RemoteProtocolError
from shardkv.topology.documents import Partition, TopologyBound
from shardkv.write_batch import Text

TIMEOUT_S = 30.0
POLL_S = 0.2
LISTED_BYTES_MAX = 16 * 1024 * 1024
"""Nodes tell the middle of shards that are larger."""

T = TypeVar("T")


class Added(msgspec.Struct, frozen=True):
    """A node that is wanted from now on."""

    node: str
    job: int
    """The job that moves its share of shards to it; 0: none was asked for."""


class Admin:
    """What may be asked of the cluster as a whole.

    `addresses`: "HOST:PORT" of a router, several with commas between, or a list. `timeout`: seconds a call may take,
    retries included. Every method raises UnavailableError when neither router nor metadata process could be reached in
    that time, OutcomeUnknown when a change was sent and no answer came (ask again with its `token`), and
    InvalidArgument when what is asked for makes no sense now: the message says why.

    `rate_bytes_s` is for each shard that moves; 0: the rate of the settings, or no limit.
    """

    def __init__(self, addresses: str | Iterable[str] = DEFAULT_ADDRESS, *, timeout: float = TIMEOUT_S) -> None:
        self._timeout_s = to_timeout_s(timeout, TIMEOUT_S)
        self._addresses = addresses if isinstance(addresses, str) else list(addresses)
        self._asker = Asker(to_addresses(self._addresses))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give up the connection. Every later use raises ClientClosed."""
        self._asker.close()

    # Nodes

    def nodes(self) -> list[Node]:
        """Every node that is registered or wanted, in the order of their names."""
        return self._tell("nodes", "nodes", list[Node])

    def add_node(
        self,
        name: str | None = None,
        *,
        host: str = "",
        started_by: Literal["launcher", "operator"] | None = None,
        rebalance: bool = True,
        rate_bytes_s: int = 0,
        token: str | None = None,
    ) -> Added:
        """Want one more node. Its share of the shards is moved to it by a job as soon as it has joined.

        `name`: without one, the next free node-<number>; a name is never used twice. `started_by`: "launcher" lets
        `shardkv cluster up` start it; "operator" (the default with a `host`, a note for people) leaves that to you.
        """
        asked = {
            "name": name or "",
            "host": host,
            "started_by": started_by or ("operator" if host else "launcher"),
            "rebalance": rebalance,
            "rate_bytes_s": rate_bytes_s,
        }
        return _decoded(self._change("add_node", asked, token), Added)

    def remove_node(
        self,
        name: str,
        *,
        force: bool = False,
        accept_data_loss: str | None = None,
        rate_bytes_s: int = 0,
        token: str | None = None,
    ) -> Job:
        """Move everything away from a node; then it is not wanted any more, and its launcher stops it.

        A node that does not answer is waited for. `force`: it is not; that is refused when it has the only copy of a
        shard, unless `accept_data_loss` is the node's name said once more: what only it has is then lost.
        """
        asked = {
            "name": name,
            "force": force or accept_data_loss is not None,
            "accept_data_loss": accept_data_loss or "",
            "rate_bytes_s": rate_bytes_s,
        }
        return self._job_of("remove_node", asked, token)

    def wait_joined(self, name: str, *, timeout: float | None = None) -> Node:
        """Wait until a node has registered and answers. Raises DeadlineExceeded."""
        timeout_s = to_timeout_s(timeout, self._timeout_s)
        end = time.monotonic() + timeout_s
        while True:
            found = [node for node in self.nodes() if node.name == name]
            if not found:
                raise InvalidArgument(f"There is no node {name}.")
            if found[0].state == "serving":
                return found[0]
            if time.monotonic() >= end:
                raise DeadlineExceeded(f"Node {name} has not joined within {timeout_s:g} s.")
            time.sleep(POLL_S)

    # Plans and balance

    def plan_add(self, count: int = 1, *, rate_bytes_s: int = 0) -> Plan:
        """What `count` more nodes would get."""
        return self._plan(kind="add", count=count, rate_bytes_s=rate_bytes_s)

    def plan_remove(self, name: str, *, rate_bytes_s: int = 0) -> Plan:
        """What would leave a node, and where it would go."""
        return self._plan(kind="remove", node=name, rate_bytes_s=rate_bytes_s)

    def plan_move(self, shard: int, node: str, *, rate_bytes_s: int = 0) -> Plan:
        """What moving one shard means."""
        return self._plan(kind="move", shards=[shard], node=node, rate_bytes_s=rate_bytes_s)

    def plan_merge(self, left: int, right: int, *, rate_bytes_s: int = 0) -> Plan:
        """What has to move before two shards can become one: the smaller of them, unless they are on one node."""
        return self._plan(kind="merge", shards=[left, right], rate_bytes_s=rate_bytes_s)

    @overload
    def rebalance(
        self,
        *,
        dry_run: Literal[False] = ...,
        moves_max: int | None = ...,
        rate_bytes_s: int = ...,
        token: str | None = ...,
    ) -> Job: ...
    @overload
    def rebalance(
        self, *, dry_run: Literal[True], moves_max: int | None = ..., rate_bytes_s: int = ..., token: str | None = ...
    ) -> Plan: ...
    def rebalance(
        self,
        *,
        dry_run: bool = False,
        moves_max: int | None = None,
        rate_bytes_s: int = 0,
        token: str | None = None,
    ) -> Job | Plan:
        """Move shards until every node has about the mean, by bytes and then by load. `dry_run`: only the plan."""
        if dry_run:
            return self._plan(kind="rebalance", moves_max=moves_max, rate_bytes_s=rate_bytes_s)
        return self._job_of("rebalance", {"moves_max": moves_max, "rate_bytes_s": rate_bytes_s}, token)

    # Shards

    def shards(self, keyspace: str | None = None) -> list[Shard]:
        """All shards, or those of one keyspace, in the order of their tokens. Raises UnknownKeyspace."""
        return self._tell("shards", "shards", list[Shard], keyspace=keyspace)

    def move_shard(self, shard: int, node: str, *, rate_bytes_s: int = 0, token: str | None = None) -> Job:
        return self._job_of("move_shard", {"shard": shard, "node": node, "rate_bytes_s": rate_bytes_s}, token)

    def split_shard(
        self, shard: int, *, at: int | Text | None = None, rate_bytes_s: int = 0, token: str | None = None
    ) -> Job:
        """Make two shards of one. `at`: where the upper one begins, a key of a range keyspace, a token (a whole number
        below 2**64) of a hash keyspace; without it, where half of the bytes are on either side.

        The middle of a small shard of a range keyspace is found by listing its keys.
        """
        if at is None:
            cut = self._middle_of(shard)
        else:
            cut = at if isinstance(at, int) else to_column([at], "key")[0]
        return self._job_of("split_shard", {"shard": shard, "at": cut, "rate_bytes_s": rate_bytes_s}, token)

    def _middle_of(self, number: int) -> TopologyBound | None:
        """The key in the middle of a range shard that its node knows no middle of, for it has hardly any tables; None:
        the cluster finds one. Raises InvalidArgument when there are too few keys."""
        shard = next((each for each in self.shards() if each.id == number), None)
        if shard is None or not isinstance(shard.start, bytes) or (shard.bytes or 0) >= LISTED_BYTES_MAX:
            return None
        stop = shard.stop if isinstance(shard.stop, bytes) else None
        with Client(self._addresses, keyspace=shard.keyspace, timeout=self._timeout_s) as db:
            count = int(db.count(shard.start, stop))
            if count < 2:
                raise InvalidArgument(
                    f"Shard {number} has too few keys to be halved.", hint="Say at which key to split."
                )
            keys = list(db.scan(shard.start, stop, keys_only=True, limit=count // 2 + 1))
        return keys[-1]

    def merge_shards(self, left: int, right: int, *, rate_bytes_s: int = 0, token: str | None = None) -> Job:
        """Make one shard of two neighbours; the smaller one is moved first, if they are on two nodes."""
        return self._job_of("merge_shards", {"left": left, "right": right, "rate_bytes_s": rate_bytes_s}, token)

    # Keyspaces

    def keyspaces(self) -> list[Keyspace]:
        return self._tell("keyspaces", "keyspaces", list[Keyspace])

    def create_keyspace(
        self,
        name: str,
        *,
        partition: Partition = "hash",
        shards: int = 16,
        split_at: Sequence[Text] = (),
        timeout: float | None = None,
        token: str | None = None,
    ) -> Keyspace:
        """Make a keyspace and wait until all its shards are placed. Raises DeadlineExceeded when they are not in time;
        the making goes on.

        `split_at`: the first keys of the second and later shards of a range keyspace, which then has as many.
        """
        asked = {"name": name, "partition": partition, "shards": shards, "split_at": to_column(split_at, "key")}
        self._change("create_keyspace", asked, token)
        found = self._until_keyspace(name, lambda state: state == "serving", timeout)
        assert found is not None
        return found

    def drop_keyspace(self, name: str, *, timeout: float | None = None, token: str | None = None) -> None:
        """Delete a keyspace and all that is in it, and wait until it is gone. It takes no more requests at once.

        Raises DeadlineExceeded when it is not gone in time, because a node does not answer; the dropping goes on.
        """
        self._change("drop_keyspace", {"name": name}, token)
        self._until_keyspace(name, lambda state: state is None, timeout)

    def _until_keyspace(self, name: str, holds: Any, timeout: float | None) -> Keyspace | None:
        timeout_s = to_timeout_s(timeout, self._timeout_s)
        end = time.monotonic() + timeout_s
        while True:
            found = next((each for each in self.keyspaces() if each.name == name), None)
            if holds(found.state if found is not None else None):
                return found
            if time.monotonic() >= end:
                state = found.state if found is not None else "not there"
                raise DeadlineExceeded(f"Keyspace {name!r} is still {state} after {timeout_s:g} s.")
            time.sleep(POLL_S)

    # Jobs

    def jobs(self) -> list[Job]:
        """The jobs there are, oldest first. Those that ended long ago are forgotten."""
        return self._tell("jobs", "jobs", list[Job])

    def job(self, id: int) -> Job:
        """One job. Raises InvalidArgument when there is none."""
        return self._tell("jobs", "jobs", list[Job], id=id)[0]

    def pause_job(self, id: int, *, token: str | None = None) -> Job:
        """Begin nothing more, and ship nothing more of what is under way."""
        return self._job_of("pause_job", {"job": id}, token)

    def resume_job(self, id: int, *, token: str | None = None) -> Job:
        return self._job_of("resume_job", {"job": id}, token)

    def cancel_job(self, id: int, *, token: str | None = None) -> Job:
        """Give up what is under way. What has arrived stays where it is."""
        return self._job_of("cancel_job", {"job": id}, token)

    def set_job_rate(self, id: int, rate_bytes_s: int, *, token: str | None = None) -> Job:
        """Limit a job from now on, what is under way too. 0: the rate of the settings, or no limit."""
        return self._job_of("set_rate", {"job": id, "rate_bytes_s": rate_bytes_s}, token)

    def watch_job(self, id: int, *, poll_s: float = POLL_S) -> Iterator[Job]:
        """The job as it is now, and again whenever something about it is new; the last one has `ended`."""
        before: Job | None = None
        while True:
            job = self.job(id)
            if job != before:
                yield job
            if job.ended:
                return
            before = job
            time.sleep(poll_s)

    def wait_job(self, id: int, *, timeout: float | None = None) -> Job:
        """The job once it has ended, however it did. Raises DeadlineExceeded; the job goes on."""
        timeout_s = to_timeout_s(timeout, self._timeout_s)
        end = time.monotonic() + timeout_s
        for job in self.watch_job(id, poll_s=min(POLL_S, timeout_s)):
            if job.ended:
                return job
            if time.monotonic() >= end:
                break
        raise DeadlineExceeded(f"Job {id} has not ended within {timeout_s:g} s. {job.problem}".rstrip())

    # The whole

    def status(self) -> Status:
        """Nodes, keyspaces, jobs that have not ended, and what to do next, if anything."""
        return self._tell("status", "status", Status)

    def settings(self) -> Settings:
        """How the controller decides."""
        return self._tell("settings", "settings", Settings)

    def change_settings(self, *, token: str | None = None, **changed: Any) -> Settings:
        """Change what is named, for example `auto_split=False`; the rest stays. Fields of `Settings`."""
        payload = self._change("change_settings", {"changed": changed}, token)
        return _field(payload, "settings", Settings)

    # Asking

    def _job_of(self, verb: str, asked: dict[str, Any], token: str | None) -> Job:
        return self.job(_field(self._change(verb, asked, token), "job", int))

    def _plan(self, **asked: Any) -> Plan:
        return self._tell("plan", "plan", Plan, **asked)

    def _change(self, verb: str, asked: dict[str, Any], token: str | None) -> msgspec.Raw:
        return self._asker.ask(verb, asked, timeout_s=self._timeout_s, token=token or secrets.token_hex(8))

    def _tell(self, verb: str, field: str, shape: type[T], /, **asked: Any) -> T:
        told = {name: value for name, value in asked.items() if value is not None}
        return _field(self._asker.ask(verb, told, timeout_s=self._timeout_s), field, shape)


def _field(payload: msgspec.Raw, name: str, kind: type[T]) -> T:
    return _decoded(_decoded(payload, dict[str, msgspec.Raw])[name], kind)


def _decoded(payload: msgspec.Raw, kind: type[T]) -> T:
    try:
        return msgspec.msgpack.decode(payload, type=kind)
    except msgspec.MsgspecError as error:
        raise RemoteProtocolError(f"The cluster's answer cannot be read: {error}.") from error
