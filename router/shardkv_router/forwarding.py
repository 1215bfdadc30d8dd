"""Sending one shard's part of a request to the node that owns it, through restarts and changes of owner.

What goes to one node at the same time may be sent together (`Together`: a bundle of requests, a share of one); whatever
of it is not answered at the first asking becomes a part here.

Invariants: a part ends exactly once, and shortly before its deadline at the latest, so that the caller hears which
shard did not answer. It is sent again only when that is safe: it was never sent, the node refused it
before applying it, it is a read, or it is a write with a token. A write that may have been applied ends, without an
answer or a refusal for good, in OutcomeUnknown, whatever it was refused with when it was sent again.
A part that cannot be sent now is parked until its node or a newer topology comes, bounded in time by its deadline and
`park_ms`, and in bytes by `parked_bytes_max`. When the router drains, nothing is parked: the caller finds another
router sooner than this one a node.
A part that its node refused, because the shard is fenced or one of the two is behind the topology, is sent again as
soon as a topology comes in which that shard is another; until then now and then. What becomes of one whose shard was
split or merged away: heirs.py.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

import msgspec

from shardkv.errors import (
    FINAL_REFUSALS,
    DeadlineExceeded,
    Draining,
    OutcomeUnknown,
    RoutingError,
    ShardKVError,
    ShardUnavailable,
    UnavailableError,
)
from shardkv.limits import DEFAULT_LIMITS, Limits
from shardkv.topology.documents import ShardDocument
from shardkv.topology.view import Topology
from shardkv.transport.admission import overloaded
from shardkv.transport.peer import Peer
from shardkv.transport.turn import turn_of
from shardkv.wire.messages import OK, Op, RawReply, reply_error, sent_again
from shardkv_router.heirs import Shared, heirs_of, parts_for_heirs, token_of, united
from shardkv_router.links import NodeLinks
from shardkv_router.options import RouterOptions
from shardkv_router.part import REFUSED_PAUSE_MOST_S, Part

PARKED_RETRY_S = 0.5
"""What a part is told to wait that finds no room to be parked: about as long as a node takes to start again."""
EXPIRY_INTERVAL_S = 0.02
DEADLINE_MARGIN = 0.1
"""This share of a part's time, but at most DEADLINE_MARGIN_MOST_S, is kept for the answer's way back."""
DEADLINE_MARGIN_MOST_S = 0.1


class Together(Protocol):
    """What is sent to one node in one go, and turns into parts where that does not end it."""

    deadline: float | None
    answer_by: float | None
    """When what is unanswered is given up; set when it is sent."""

    def ask(self, peer: Peer, left_ms: int | None) -> None:
        """Send it. `left_ms`: how much time there is."""

    def give_up(self) -> list[Part]:
        """All that was not answered, as parts; whatever of it was sent is forgotten."""


class Forwarder:
    """Sends parts; told of topology changes and of nodes that came up."""

    def __init__(self, links: NodeLinks, options: RouterOptions, limits: Limits = DEFAULT_LIMITS) -> None:
        self._links = links
        self._limits = limits
        self._options = options
        self._loop = asyncio.get_running_loop()
        self._topology = Topology()
        self._parked: list[Part] = []
        self._parked_bytes = 0
        self._refused: dict[Part, asyncio.TimerHandle] = {}
        """Those their node refused, and when they are sent again at the latest."""
        self._sent: set[Part | Together] = set()
        self._turn = turn_of(self._loop)
        self._to_heirs: list[Part] = []
        """Those whose shard is no more, until the end of the turn."""
        self._inherited: dict[Shared, Part] = {}
        """Writes with tokens that went to a shard other than their own."""
        self._expiry: asyncio.TimerHandle | None = None
        self._draining = False

    @property
    def parked(self) -> int:
        """Parts waiting now."""
        return len(self._parked)

    def update(self, topology: Topology) -> None:
        """Follow a newer topology and try what is parked again."""
        before, self._topology = self._topology, topology
        changed = [part for part in self._refused if before.shards.get(part.shard_id) is not self._shard_of(part)]
        for part in changed:
            self._refused.pop(part).cancel()
            self._send_or_expire(part)
        self.retry_parked()

    def _shard_of(self, part: Part) -> ShardDocument | None:
        return self._topology.shards.get(part.shard_id)

    def retry_parked(self) -> None:
        """Send whatever can be sent now."""
        for part in self._unpark():
            self.send(part)

    def drain(self) -> None:
        """The router is going away: from now on a part that cannot be sent ends in Draining, not applied."""
        self._draining = True
        self.retry_parked()

    def send(self, part: Part) -> None:
        """Send a part to the owner of its shard, or park it."""
        now = self._loop.time()
        if part.deadline is not None and part.deadline <= now:
            self._end(part, DeadlineExceeded("The deadline passed before the request was sent to its node."))
            return
        shard = self._shard_of(part)
        peer = self._links.usable(shard.node) if shard is not None else None
        if shard is None and self._sent_to_heirs(part):
            return
        if shard is None or peer is None:
            self._park(part)
            return
        if part.answer_by is None and part.deadline is not None:
            part.answer_by = last_moment(part.deadline, now)
        self._sent.add(part)
        self._watch_the_clock()
        request_id = peer.send(
            part.op,
            part.payload,
            on_reply=lambda reply: self.answered(part, reply),
            shard=shard.id,
            epoch=shard.epoch,
            deadline=part.deadline,
        )
        part.asked, part.epoch = (peer, request_id), shard.epoch

    def _sent_to_heirs(self, part: Part) -> bool:
        """Send a part whose shard is no more to those that have taken its place; False: there are none."""
        view = heirs_of(self._topology, part.shard_id)
        if view is None:
            return False
        if not self._to_heirs:
            self._turn.defer(self._send_to_heirs)
        self._to_heirs.append(part)
        return True

    def _send_to_heirs(self) -> None:
        """Send on what came in this turn for shards that are no more."""
        parts, self._to_heirs = self._to_heirs, []
        found: list[Part] = []
        for part in parts:
            view = heirs_of(self._topology, part.shard_id)
            found += [part] if view is None else parts_for_heirs(part, view, self._limits.frame_bytes_max, self._end)
        self._inherited = {token: part for token, part in self._inherited.items() if not part.finished}
        for part in united(found, self._end):
            token = token_of(part)
            earlier = None if token is None else self._inherited.get(token)
            if earlier is not None and earlier is not part:
                self._end(part, _comes_late(part))
                continue
            if token is not None:
                self._inherited[token] = part
            self.send(part)

    def send_together(self, node: str, together: Together) -> None:
        """Send what is for one node in one go, or, when it cannot be reached, its parts one by one."""
        peer = self._links.usable(node)
        if peer is None:
            for part in together.give_up():
                self.send(part)
            return
        left_ms, now = None, self._loop.time()
        if together.deadline is not None:
            left_ms = max(1, int((together.deadline - now) * 1000))
            together.answer_by = last_moment(together.deadline, now)
        self._sent.add(together)
        self._watch_the_clock()
        together.ask(peer, left_ms)

    def ended(self, together: Together) -> None:
        """Nothing of it is unanswered any more."""
        self._sent.discard(together)

    def answered(self, part: Part, reply: RawReply | ShardKVError) -> None:
        """A part that was sent, alone or together with others, was answered so, or failed."""
        if part.finished:
            return
        self._sent.discard(part)
        if isinstance(reply, RawReply) and reply.status == OK:
            self._end(part, reply.payload)
            return
        error = reply if isinstance(reply, ShardKVError) else reply_error(reply.payload)
        never_sent = isinstance(reply, UnavailableError)
        if isinstance(error, Draining):
            self._park(part)
        elif never_sent or (isinstance(error, OutcomeUnknown) and _may_repeat(part, error)):
            self._send_or_expire(part)
        elif isinstance(error, RoutingError):
            self._wait_for_news(part)
        elif isinstance(error, OutcomeUnknown):
            self._end(part, _naming_shard(error, part))
        else:
            self._end(part, error)

    def _end(self, part: Part, answer: msgspec.Raw | ShardKVError) -> None:
        part.finished = True
        if part.doubt is not None and isinstance(answer, ShardKVError) and not isinstance(answer, FINAL_REFUSALS):
            answer = part.doubt
        part.done(answer)

    def _wait_for_news(self, part: Part) -> None:
        """Send a refused part again when its shard is another; now, if it is already."""
        shard = self._shard_of(part)
        if part.epoch is not None and (shard is None or shard.epoch != part.epoch):
            part.epoch = None
            self._send_or_expire(part)
            return
        self._refused[part] = self._loop.call_later(part.pause_s, self._ask_again, part)
        part.pause_s = min(2 * part.pause_s, REFUSED_PAUSE_MOST_S)

    def _ask_again(self, part: Part) -> None:
        del self._refused[part]
        self._send_or_expire(part)

    def _send_or_expire(self, part: Part) -> None:
        if self._draining or self._expired(part, self._loop.time()):
            self._give_up(part)
        else:
            self.send(part)

    # Parking

    def _park(self, part: Part) -> None:
        if self._draining or not part.waits or self._expired(part, self._loop.time()):
            self._give_up(part)
            return
        if self._parked_bytes + part.size_bytes > self._options.parked_bytes_max:
            waiting = f"{self._parked_bytes} bytes of requests already wait for shards to come back."
            self._end(part, overloaded(waiting, retry_after_s=PARKED_RETRY_S))
            return
        part.payload = part.payload.copy()  # a view would keep the whole frame it came in
        self._parked.append(part)
        self._parked_bytes += part.size_bytes
        self._watch_the_clock()

    def _unpark(self) -> list[Part]:
        """All that was parked, in order; now nothing is."""
        parts, self._parked = self._parked, []
        self._parked_bytes = 0
        return parts

    def _expired(self, part: Part, now: float) -> bool:
        """Whether a part has waited long enough for its shard; its waiting starts with the first asking."""
        if part.gives_up_at is None:
            latest = now + self._options.park_ms / 1000
            part.gives_up_at = latest if part.deadline is None else min(latest, last_moment(part.deadline, now))
        return now >= part.gives_up_at

    def _give_up(self, part: Part) -> None:
        shard = self._shard_of(part)
        if self._draining:
            self._end(part, Draining("This router is shutting down.", hint="Retry; another one takes over."))
        else:
            self._end(part, self.unavailable(shard, part.shard_id))

    # The clock

    def _watch_the_clock(self) -> None:
        if self._expiry is None:
            self._expiry = self._loop.call_later(EXPIRY_INTERVAL_S, self._expire)

    def _expire(self) -> None:
        """End the parts whose time is over, parked or sent."""
        now = self._loop.time()
        for part in self._unpark():
            if self._expired(part, now):
                self._give_up(part)
            else:
                self._parked.append(part)
                self._parked_bytes += part.size_bytes
        for sent in [sent for sent in self._sent if sent.answer_by is not None and sent.answer_by <= now]:
            self._sent.discard(sent)
            for part in self._forget(sent):
                self._end(part, self._no_answer(part))
        self._expiry = None
        if self._parked or self._sent:
            self._watch_the_clock()

    def _forget(self, sent: Part | Together) -> list[Part]:
        """The parts of what was sent, whose answers nobody waits for any more; a node that is stopped must not pile
        up parts here."""
        if not isinstance(sent, Part):
            return sent.give_up()
        if sent.asked is not None:
            peer, request_id = sent.asked
            peer.forget(request_id)
        return [sent]

    def _no_answer(self, part: Part) -> ShardKVError:
        """The error for a part whose node has not answered by the deadline."""
        shard = self._shard_of(part)
        node = shard.node if shard is not None else None
        message = f"Node {node} did not answer in time for shard {part.shard_id}."
        detail = {"shard": part.shard_id, "node": node}
        if part.op in (Op.WRITE, Op.DELETE_RANGE):
            hint = "The write may yet be applied: read the key before writing it again."
            return OutcomeUnknown(message, detail=detail, hint=hint)
        return DeadlineExceeded(message, detail=detail, hint="Retry, or allow more time.")

    def unavailable(self, shard: ShardDocument | None, shard_id: int) -> ShardUnavailable:
        """The error for a shard nobody serves now."""
        node = shard.node if shard is not None else None
        why = self._links.problem(node) if node is not None else "No node owns it."
        return ShardUnavailable(
            f"Shard {shard_id} is not served now: {why}",
            detail={"shard": shard_id, "node": node},
            hint="Other shards keep working; retry later.",
        )


def last_moment(deadline: float, now: float) -> float:
    """When to give an answer that is to arrive before `deadline`."""
    return deadline - min(DEADLINE_MARGIN_MOST_S, DEADLINE_MARGIN * max(0.0, deadline - now))


def _comes_late(part: Part) -> ShardUnavailable:
    """For a write whose token's other part, for a shard that was merged with its own, is on its way by itself.

    Sent with another token it is no repetition of that.
    """
    return ShardUnavailable(
        f"Shard {part.shard_id} was merged with another while the write was on its way. Nothing was written.",
        detail={"shard": part.shard_id},
        hint="Retry.",
    )


def _may_repeat(part: Part, error: OutcomeUnknown) -> bool:
    """Whether a part that may have been carried out may be sent again. A write with a token says from now on that it
    was sent before."""
    if part.repeatable or part.doubt is not None:
        return True
    again = sent_again(part.payload) if part.op == Op.WRITE else None
    if again is not None:
        part.payload, part.doubt = again, _naming_shard(error, part)
    return again is not None


def _naming_shard(error: OutcomeUnknown, part: Part) -> OutcomeUnknown:
    return OutcomeUnknown(
        f"A write to shard {part.shard_id} may or may not have been applied: {error.message}",
        detail={"shard": part.shard_id},
        hint="Read the key before writing it again.",
    )
