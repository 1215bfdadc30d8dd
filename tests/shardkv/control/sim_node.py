"""A simulated node: tablets as dictionaries, and the loop that carries out what the real `duties` and `changes` say.

Its data is small, but has what makes moving hard: versions, tombstones that are collected at some time, deduplication
records, writes that are logged but not yet applied, a tail with an end, syncs that take time, and a crash that keeps
what was synced and perhaps some of the rest.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from shardkv.control import changes, duties
from shardkv.control.duties import Abort, Adopt, Create, Drop, Fence, Missing, Serve, Unfence, Work
from shardkv.control.labels import owned_label, parse_label
from shardkv.control.registration import is_newest_directory, next_incarnation
from shardkv.control.reports import ChangeReport, NodeReport, ShardReport
from shardkv.topology.documents import NODES, Change, NodeDocument, encode_document
from shardkv.topology.tokens import TOKEN_OF
from shardkv.wire.messages import MetaCompare, MetaPut, MetaTxn, MetaTxnReply
from tests.shardkv.control.sim_world import Broken, Process, World

TAIL_MAX = 6
CHUNK_KEYS = 2
FENCE_ABORT_S = 2.0
Token = tuple[str, int]


@dataclass(frozen=True)
class Entry:
    """One write as it stands in a log."""

    seq: int
    key: bytes
    value: str | None
    token: Token
    result: Any

    def digest(self) -> int:
        return zlib.crc32(repr((self.seq, self.key, self.value, self.token)).encode())


@dataclass
class Tablet:
    """Cells are (seq, value), None for a tombstone."""

    cells: dict[bytes, tuple[int, str | None]] = field(default_factory=dict)
    tokens: dict[Token, Any] = field(default_factory=dict)
    seq: int = 0
    tail: list[Entry] = field(default_factory=list)
    digest: int = 0
    """Order-independent, of every entry applied in this life."""
    pending: list[tuple[bytes, str | None, Token, str, int]] = field(default_factory=list)
    """Logged, not synced yet: (key, value, token, client, request)."""
    saved: tuple[dict[bytes, tuple[int, str | None]], dict[Token, Any], int] = field(
        default_factory=lambda: ({}, {}, 0)
    )

    def apply(self, entry: Entry) -> None:
        self.cells[entry.key] = (entry.seq, entry.value)
        self.tokens[entry.token] = entry.result
        self.seq = max(self.seq, entry.seq)
        self.digest += entry.digest()
        self.tail.append(entry)
        del self.tail[:-TAIL_MAX]

    def value(self, key: bytes) -> str | None:
        return self.cells.get(key, (0, None))[1]

    def write(self, key: bytes, value: str | None, token: Token) -> Entry:
        result = True if value is not None else self.value(key) is not None
        entry = Entry(self.seq + 1, key, value, token, result)
        self.apply(entry)
        return entry

    def sync(self) -> None:
        self.saved = (dict(self.cells), dict(self.tokens), self.seq)

    def crash(self, *, keep: bool) -> None:
        """What was not synced survives only if the disk happened to have it."""
        if not keep:
            cells, tokens, self.seq = self.saved
            self.cells, self.tokens = dict(cells), dict(tokens)
        self.pending, self.tail = [], []
        self.sync()

    def collect(self) -> None:
        """Tombstones reach the bottom and go."""
        for cells in (self.cells, self.saved[0]):
            for key in [key for key, (_, value) in cells.items() if value is None]:
                del cells[key]

    def since(self, seq: int) -> list[Entry] | None:
        """The entries after `seq`; None when the tail does not reach back so far."""
        if seq >= self.seq:
            return []
        found = [entry for entry in self.tail if entry.seq > seq]
        return found if found and found[0].seq == seq + 1 else None


@dataclass
class Disk:
    """What survives a kill."""

    start_ids: list[str] = field(default_factory=list)
    tablets: dict[bytes, Tablet] = field(default_factory=dict)
    fences: set[Fence] = field(default_factory=set)
    seen: int = 0


@dataclass
class Session:
    """What the source of a move keeps for one round of it, in memory."""

    number: int
    chunks: list[list[tuple[bytes, tuple[int, str | None]]]]
    tokens: dict[Token, Any]
    seq: int
    digest: int
    """The tablet's, at `seq`."""


class Node(Process):
    """`boot` registers and follows the topology; `request` and `scan` are what clients send."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name)
        self.disk = Disk()
        self.missing: list[Missing] = []
        self.refuses_to_start = False
        self.reports_to: list[Process] = []
        self._reset()

    def _reset(self) -> None:
        self.incarnation = 0
        self.registered = False
        self.serving: dict[int, Serve] = {}
        self.fencing: dict[Fence, float] = {}
        """Fences of this life, from the moment they are asked for."""
        self.works: dict[str, Work] = {}
        self.workers: dict[str, Worker] = {}
        self.sessions: dict[str, Session] = {}
        self._served_once: dict[int, bytes] = {}
        self._aborting: list[Abort] = []

    # Life

    def boot(self) -> None:
        self.start_id = f"{self.world.rng.getrandbits(64):016x}"
        self.disk.start_ids.append(self.start_id)
        self.world.step("start", self)
        self._reset()
        if "read-first" in self.world.removed:
            for label in self.disk.tablets:
                found = parse_label(label)
                if found is not None and not found.is_staging:
                    self.serving[found.shard] = Serve(found.shard, found.since, label)
            self._owners_changed()
        self._register()
        self.later(0.05, self._tick)
        self.later(self.world.rng.uniform(0, 0.2), self._report)

    def crashed(self) -> None:
        rng = self.world.rng
        for label in sorted(self.disk.tablets):
            tablet = self.disk.tablets[label]
            reached = rng.randrange(len(tablet.pending) + 1)
            for key, value, token, _, _ in tablet.pending[:reached]:
                tablet.write(key, value, token)
                tablet.sync()
            tablet.crash(keep=rng.random() < 0.5)
        self.serving = {}

    def _register(self) -> None:
        """Compare-and-set on the document of the last start, if that was a start of this directory."""
        known = self.view.nodes.get(self.name)
        if self._is_registered():
            return
        if not is_newest_directory(known, "", self.disk.start_ids) and "no-old-directory" not in self.world.removed:
            self.refuses_to_start = True
            self.kill()
            return
        if self.view.revision:
            self.incarnation = next_incarnation(known)
            document = NodeDocument(self.name, "", self.incarnation, f"{self.name}:1", 1, start_id=self.start_id)
            key = f"{NODES}{self.name}"
            put = MetaPut(key, encode_document(document))
            self.transact(MetaTxn([MetaCompare(key, self.view.revision_of(key))], [put]))
        self.later(self.world.rng.uniform(0.05, 0.2), self._register)

    def _is_registered(self) -> bool:
        """Whether the view has this very start."""
        known = self.view.nodes.get(self.name)
        return known is not None and known.start_id == self.start_id

    def _note_registered(self) -> None:
        self.registered = True
        self.incarnation = self.view.nodes[self.name].incarnation
        self.disk.start_ids = [self.start_id]
        self.world.step("registered", self)

    def on_view(self) -> None:
        if self._is_registered():
            if not self.registered:
                self._note_registered()
            self._carry_out()
        elif self.registered:
            self.kill()

    def _tick(self) -> None:
        """Send again what may have been lost, and look after fences."""
        for step in self._aborting:
            self._abort(step.shard, step.change, step.problem)
        for fence, since in list(self.fencing.items()):
            if self.world.now - since > FENCE_ABORT_S:
                self._abort(fence.shard, fence.change, f"The fence stood for {FENCE_ABORT_S} s.")
            if self.world.now - since > 1.0 and "fence-stays" in self.world.removed:
                self.fencing.pop(fence, None)
                self.disk.fences.discard(fence)
                self._carry_out()
        for worker in list(self.workers.values()):
            worker.advance()
        for tablet in self.disk.tablets.values():
            if self.world.rng.random() < 0.06:
                tablet.collect()
        busy = self.workers or self.fencing or self._aborting
        self.later(self.world.rng.uniform(0.005, 0.02) if busy else 0.05, self._tick)

    def _abort(self, shard: int, change: str, problem: str) -> None:
        txn = changes.abort(self.view, shard, change, problem)
        if txn is not None:
            self.transact(txn)

    # Duties

    def _duties(self) -> list[duties.Step] | None:
        if self.view.nodes.get(self.name) is None:
            return None
        fences = sorted({*self.disk.fences, *self.fencing})
        labels = list(self.disk.tablets)
        return duties.duties(self.name, self.incarnation, self.view, labels, fences, revision_seen=self.disk.seen)

    def _carry_out(self) -> None:
        steps = self._duties()
        if steps is None:
            return
        serving = {step.shard: step for step in steps if isinstance(step, Serve)}
        self.serving = {shard: step for shard, step in self.serving.items() if serving.get(shard) == step}
        self.works = {step.change.id: step for step in steps if isinstance(step, Work)}
        for change in [change for change in self.workers if change not in self.works]:
            del self.workers[change]
        self.sessions = {change: session for change, session in self.sessions.items() if change in self.works}
        self._aborting = [step for step in steps if isinstance(step, Abort)]
        self.missing = [step for step in steps if isinstance(step, Missing)]
        for step in steps:
            self._carry_out_one(step)
        self.serving = serving
        self._served_once |= {shard: step.label for shard, step in serving.items()}
        self._owners_changed()
        for work in self.works.values():
            if work.role != "source" and work.change.id not in self.workers:
                self.workers[work.change.id] = (Fetcher if work.role == "target" else Maker)(self, work)

    def _carry_out_one(self, step: duties.Step) -> None:
        disk, kind = self.disk, type(step).__name__.lower()
        if isinstance(step, Create | Adopt | Drop | Unfence):
            self.world.step(f"before {kind}", self)
        match step:
            case Create(label):
                disk.tablets[label] = Tablet()
            case Adopt(staging, label):
                disk.tablets[label] = disk.tablets.pop(staging)
            case Drop(label, _):
                del disk.tablets[label]
            case Unfence(fence):
                disk.fences.discard(fence)
                self.fencing.pop(fence, None)
            case Abort(shard, change, problem):
                self._abort(shard, change, problem)
        if isinstance(step, Create | Adopt | Drop | Unfence):
            disk.seen = max(disk.seen, self.view.revision if "forward" not in self.world.removed else 0)
            self.world.step(f"after {kind}", self)

    def _owners_changed(self) -> None:
        """The one thing that must never be: two nodes that serve one token."""
        intervals = self.world.intervals
        for other in self.world.processes.values():
            if isinstance(other, Node) and other is not self and other.up:
                for theirs in other.serving.keys() & intervals.keys():
                    for own in self.serving.keys() & intervals.keys():
                        (start, stop), (start_too, stop_too) = intervals[own], intervals[theirs]
                        if start < stop_too and start_too < stop:
                            raise Broken(f"{self.name} serves shard {own} and {other.name} shard {theirs}")

    # Requests

    def request(self, client: Any, number: int, shard: int, epoch: int, key: bytes, value: Any, token: Token) -> None:
        """`value`: ... for a read, None for a delete. Refused or answered, sooner or later or never."""
        tablet = self._tablet_for(shard, epoch, read=value is ...)
        if tablet is None:
            self.world.send(self.name, client.name, client.refused, number)
        elif value is ...:
            self.world.send(self.name, client.name, client.answered, number, tablet.value(key))
        elif token in tablet.tokens:
            self.world.send(self.name, client.name, client.answered, number, tablet.tokens[token])
        elif all(each[2] != token for each in tablet.pending):
            tablet.pending.append((key, value, token, client, number))
            self.later(self.world.disk_s(), self._settle, tablet)

    def _settle(self, tablet: Tablet) -> None:
        """The oldest write that waits for its sync is applied and acknowledged."""
        if tablet.pending:
            key, value, token, client, number = tablet.pending.pop(0)
            entry = tablet.write(key, value, token)
            tablet.sync()
            self.world.send(self.name, client.name, client.answered, number, entry.result)

    def _tablet_for(self, shard: int, epoch: int, *, read: bool) -> Tablet | None:
        serve = self.serving.get(shard)
        if serve is not None and (serve.epoch == epoch or "read-first" in self.world.removed):
            return self.disk.tablets.get(serve.label)
        if read and "fence-reads" in self.world.removed and any(f.shard == shard for f in self.fencing):
            return self.disk.tablets.get(self._served_once.get(shard, b""))
        return None

    def scan(self, client: Any, number: int, shard: int, epoch: int) -> None:
        """A page: all of a shard."""
        tablet = self._tablet_for(shard, epoch, read=True)
        if tablet is None:
            self.world.send(self.name, client.name, client.refused, number)
        else:
            rows = {key: value for key, (_, value) in tablet.cells.items() if value is not None}
            self.world.send(self.name, client.name, client.answered, number, rows)

    # As the source of a move

    def _work(self, change: str, role: str) -> Work | None:
        work = self.works.get(change)
        return work if work is not None and work.role == role else None

    def message(self, sender: Node, incarnation: int, kind: str, change: str, shard: int, *rest: Any) -> None:
        """From the target of a move."""
        work = self._work(change, "source")
        named = "change-named" not in self.world.removed
        if named and (
            work is None or work.change.target != sender.name or work.change.target_incarnation != incarnation
        ):
            return
        tablet = self.own_tablet(shard)
        if tablet is not None:
            answer: Callable[..., None] = getattr(self, f"_on_{kind}")
            answer(sender, change, shard, tablet, *rest)

    def own_tablet(self, shard: int) -> Tablet | None:
        """Of a shard that the view gives to this node, served or fenced."""
        document = self.view.shards.get(shard)
        if document is None or document.node != self.name:
            return None
        return self.disk.tablets.get(owned_label(shard, document.owned_since))

    def _reply(self, sender: Node, change: str, shard: int, kind: str, *rest: Any) -> None:
        self.world.send(self.name, sender.name, sender.on_reply, self.incarnation, change, shard, kind, *rest)

    def _on_begin(self, sender: Node, change: str, shard: int, tablet: Tablet, number: int) -> None:
        session = self.sessions.get(change)
        if session is None or session.number < number:
            session = self.sessions[change] = self._pinned(tablet, number)
        if session.number == number:
            self._reply(sender, change, shard, "begun", number, len(session.chunks), session.seq, session.tokens)

    def _pinned(self, tablet: Tablet, number: int) -> Session:
        cells, tokens = sorted(tablet.cells.items()), dict(tablet.tokens)
        if "whole-data" in self.world.removed:
            cells, tokens = [cell for cell in cells if cell[1][1] is not None], {}
        chunks = [cells[at : at + CHUNK_KEYS] for at in range(0, len(cells), CHUNK_KEYS)]
        return Session(number, chunks, tokens, tablet.seq, tablet.digest)

    def _on_fetch(self, sender: Node, change: str, shard: int, tablet: Tablet, number: int, at: int) -> None:
        session = self.sessions.get(change)
        if session is not None and session.number == number and at < len(session.chunks):
            self._reply(sender, change, shard, "chunk", number, at, session.chunks[at])

    def _on_tail(self, sender: Node, change: str, shard: int, tablet: Tablet, number: int, since: int) -> None:
        session = self.sessions.get(change)
        if session is not None and session.number == number:
            self._reply(sender, change, shard, "entries", number, since, tablet.since(since))

    def _on_fence(self, sender: Node, change: str, shard: int, tablet: Tablet, number: int) -> None:
        session = self.sessions.get(change)
        if session is None or session.number != number:
            return
        fence = self.fence(shard, change)
        if fence is not None and fence in self.disk_fences() and self._has_drained(tablet):
            self._reply(sender, change, shard, "fenced", number, tablet.seq, tablet.digest - session.digest)

    def disk_fences(self) -> set[Fence]:
        return set(self.fencing) if "fence-durable" in self.world.removed else self.disk.fences

    def _has_drained(self, tablet: Tablet) -> bool:
        return not tablet.pending or "fence-drains" in self.world.removed

    def fence(self, shard: int, change: str) -> Fence | None:
        """Refuse the shard from now on; on disk a while later. None: the change is not under way."""
        document = self.view.shards.get(shard)
        if (
            document is None
            or document.node != self.name
            or ("change-named" not in self.world.removed and (document.change is None or document.change.id != change))
        ):
            return None
        fence = Fence(shard, document.epoch, change)
        if fence not in self.fencing:
            self.fencing[fence] = self.world.now
            self.serving.pop(shard, None)
            self.later(self.world.disk_s(), self._fence_synced, fence)
        return fence

    def _fence_synced(self, fence: Fence) -> None:
        if fence in self.fencing and "fence-durable" not in self.world.removed:
            self.world.step("before fence", self)
            self.disk.fences.add(fence)
            self.world.step("after fence", self)

    def on_reply(self, incarnation: int, change: str, shard: int, kind: str, *rest: Any) -> None:
        """From the source of a move, to its target."""
        for worker in list(self.workers.values()):
            if isinstance(worker, Fetcher) and worker.takes(incarnation, change, shard):
                worker.on_reply(kind, *rest)

    # Reports

    def _report(self) -> None:
        shards = [
            ShardReport(serve.shard, 100 * len(self.disk.tablets[serve.label].cells), 1.0, self._middle(serve))
            for serve in self.serving.values()
            if serve.label in self.disk.tablets
        ]
        parsed = [parse_label(label) for label in self.disk.tablets]
        kept = [label.shard for label in parsed if label and not label.is_staging and label.shard not in self.serving]
        underway = [worker.report() for worker in self.workers.values()]
        report = NodeReport(self.name, self.incarnation, self.view.revision, shards, underway, kept)
        for controller in self.reports_to:
            hear: Callable[..., None] = controller.hear  # type: ignore[attr-defined]
            self.world.send(self.name, controller.name, hear, report)
        self.later(self.world.rng.uniform(0.1, 0.3), self._report)

    def _middle(self, serve: Serve) -> Any:
        document = self.view.shards.get(serve.shard)
        if document is None or document.keyspace not in self.view.keyspaces:
            return None
        token = TOKEN_OF[self.view.keyspaces[document.keyspace].partition]
        tokens = sorted(token(key) for key in self.disk.tablets[serve.label].cells)
        return tokens[len(tokens) // 2] if len(tokens) > 1 else None


class Worker:
    """What a node does for one change, as long as the change is under way in this life."""

    def __init__(self, node: Node, work: Work) -> None:
        self.node = node
        self.world = node.world
        self.change: Change = work.change
        self.work = work
        self.phase = "begin"
        self._txn: MetaTxn | None = None
        self._sent_at = 0.0
        self._refused_at = 0
        self.progress = 0

    def advance(self) -> None:
        """Do, or ask for, the next thing. Called again and again."""

    def report(self) -> ChangeReport:
        return ChangeReport(self.change.id, self.work.shards[0], self.phase, self.progress)

    @property
    def paused(self) -> bool:
        work = self.node.works.get(self.change.id)
        return work is not None and work.change.paused

    def staging(self, number: int = 0) -> Tablet | None:
        return self.node.disk.tablets.get(self.work.stagings[number])

    def sync_then_commit(self) -> None:
        self.phase = "sync"
        if "synced-first" in self.world.removed:
            self._synced()
        else:
            self.node.later(self.world.disk_s(), self._synced)

    def _synced(self) -> None:
        if self.node.workers.get(self.change.id) is not self or self.phase != "sync":
            return
        if "synced-first" not in self.world.removed:
            for label in self.work.stagings:
                self.node.disk.tablets[label].sync()
        self.world.step("synced", self.node)
        self.phase = "commit"
        self.commit()

    def commit(self) -> None:
        """Send it; send it again when there was no answer; build it anew when the view moved on."""
        if self.world.now - self._sent_at < 0.3 and self._txn is not None:
            return
        if self._txn is not None and self._refused_at and self.node.view.revision < self._refused_at:
            return
        if self._txn is None or self._refused_at:
            self._txn = changes.commit(self.node.view, self.work.shards[0], self.change.id)
            self._refused_at = 0
        if self._txn is None:
            return
        first = not self._sent_at
        self._sent_at = self.world.now
        if first:
            self.world.step("before commit", self.node)
        self.node.transact(self._txn, self._answered)
        if first:
            self.world.step("commit sent", self.node)
        if "word-of-the-store" in self.world.removed:
            self._believe()

    def _answered(self, reply: MetaTxnReply) -> None:
        if not reply.applied:
            self._refused_at = max(reply.revision, 1)
        else:
            self.world.step("commit answered", self.node)

    def _believe(self) -> None:
        """What a holder does that does not wait for the answer."""
        carrying = changes.carriers(self.node.view, self.work.shards[0], self.change.id)
        for shard, label in zip(changes.outcome(carrying) if carrying else [], self.work.stagings, strict=False):
            self.world.note_shard(shard)
            self.node.serving[shard.id] = Serve(shard.id, shard.epoch, label)
        self.node._owners_changed()


class Fetcher(Worker):
    """The target of a move."""

    def __init__(self, node: Node, work: Work) -> None:
        super().__init__(node, work)
        self.session = 1
        """The number of this round."""
        self.chunks = 0
        self.at = 0
        self.seq = 0
        self.digest = 0
        self.final: tuple[int, int] | None = None

    def takes(self, incarnation: int, change: str, shard: int) -> bool:
        if "change-named" in self.world.removed:
            return shard == self.work.shards[0]
        return change == self.change.id and incarnation == self.change.source_incarnation

    def advance(self) -> None:
        if self.phase == "commit":
            self.commit()
        elif self.phase == "differs":
            self.node._abort(self.work.shards[0], self.change.id, "The copy is not what the source had.")
        elif self.phase != "sync" and not (self.paused and self.phase in ("begin", "fetch")):
            self._ask()

    def _ask(self) -> None:
        arguments = {
            "begin": ("begin", self.session),
            "fetch": ("fetch", self.session, self.at),
            "tail": ("tail", self.session, self.seq),
            "fence": ("fence", self.session),
        }[self.phase]
        node, kind = self.node, arguments[0]
        source = self.world.processes[self.work.source]
        assert isinstance(source, Node)
        shard = self.work.shards[0]
        self.world.send(
            node.name, source.name, source.message, node, node.incarnation, kind, self.change.id, shard, *arguments[1:]
        )

    def on_reply(self, kind: str, number: int, *rest: Any) -> None:
        answer: Callable[..., None] = getattr(self, f"_on_{kind}")
        if number == self.session or "change-named" in self.world.removed:
            answer(*rest)
        self.progress += 1

    def _on_begun(self, chunks: int, seq: int, tokens: dict[Token, Any]) -> None:
        """A round begins: with an empty staging, whatever an earlier one brought."""
        if self.phase != "begin":
            return
        self.chunks, self.at, self.seq, self.digest = chunks, 0, seq, 0
        self.world.step("before staging", self.node)
        label = self.work.stagings[0]
        if "fresh-round" not in self.world.removed or label not in self.node.disk.tablets:
            self.node.disk.tablets[label] = Tablet()
        staging = self.node.disk.tablets[label]
        staging.tokens.update(tokens)
        staging.seq = max(staging.seq, seq)
        self.world.step("after staging", self.node)
        self.phase = "fetch" if chunks else "tail"

    def _on_chunk(self, at: int, cells: list[tuple[bytes, tuple[int, str | None]]]) -> None:
        staging = self.staging()
        if staging is None or (at != self.at and "change-named" not in self.world.removed) or self.phase != "fetch":
            return
        for key, cell in cells:
            if key not in staging.cells or staging.cells[key][0] < cell[0]:
                staging.cells[key] = cell
        self.at += 1
        if self.at >= self.chunks:
            self.world.step("fetched", self.node)
            self.phase = "tail"

    def _on_entries(self, since: int, entries: list[Entry] | None) -> None:
        staging = self.staging()
        if staging is None or since != self.seq or self.phase != "tail":
            return
        if entries is None:
            self.phase, self.final = "begin", None
            self.session += 1
            return
        for entry in entries:
            if not (self.world.damage and self.world.rng.random() < self.world.damage):
                staging.apply(entry)
                self.digest += entry.digest()
            self.seq = max(self.seq, entry.seq)
            staging.seq = self.seq
        if self.final is not None and self.seq >= self.final[0]:
            self._compare()
        elif self.final is None and len(entries) <= 2 and not self.paused:
            self.phase = "fence"

    def _on_fenced(self, seq: int, digest: int) -> None:
        if self.phase == "fence":
            self.world.step("fence told", self.node)
            self.final = (seq, digest)
            self.phase = "tail"
            if self.seq >= seq:
                self._compare()

    def _compare(self) -> None:
        assert self.final is not None
        same = self.final == (self.seq, self.digest)
        if same or "numbers-agree" in self.world.removed:
            self.sync_then_commit()
        else:
            self.phase = "differs"


class Maker(Worker):
    """The owner of a split or merge."""

    def __init__(self, node: Node, work: Work) -> None:
        super().__init__(node, work)
        self._seqs: list[int] = []
        self._fences: list[Fence] = []
        self._rests_until = 0.0
        self._token = TOKEN_OF[node.view.keyspaces[node.view.shards[work.shards[0]].keyspace].partition]

    def advance(self) -> None:
        sources = self._sources()
        if sources is None or self.phase == "sync" or self.world.now < self._rests_until:
            return
        if self.phase == "commit":
            self.commit()
            if "settled-by-txn" in self.world.removed and self.world.now - self._sent_at > 0.15:
                self._believe_a_read()
        elif self.phase == "begin" and not self.paused:
            self._pin(sources)
        elif self.phase == "follow" and self._follow(sources) and not self.paused:
            self._fence()
        elif self.phase == "fence":
            self._finish(sources)
        self.progress += 1

    def _sources(self) -> list[Tablet] | None:
        found = [self.node.own_tablet(shard) for shard in self.work.shards]
        present = [tablet for tablet in found if tablet is not None]
        return present if len(present) == len(found) else None

    def _pin(self, sources: list[Tablet]) -> None:
        self.world.step("before staging", self.node)
        for number, label in enumerate(self.work.stagings):
            made = Tablet(seq=max(source.seq for source in sources))
            for source in sources:
                made.cells |= {key: cell for key, cell in source.cells.items() if self._child_of(key) == number}
                made.tokens |= source.tokens if "whole-data" not in self.world.removed else {}
            self.node.disk.tablets[label] = made
        self._seqs = [source.seq for source in sources]
        self.world.step("after staging", self.node)
        self.phase = "follow"

    def _child_of(self, key: bytes) -> int:
        at = self.change.at
        return 0 if at is None or self._token(key) < at else 1  # type: ignore[operator]

    def _follow(self, sources: list[Tablet]) -> bool:
        """Apply what came since; False: the tail does not reach back, so the next round begins."""
        for number, source in enumerate(sources):
            entries = source.since(self._seqs[number])
            if entries is None:
                self.phase = "begin"
                return False
            for entry in entries:
                child = self.staging(self._child_of(entry.key))
                if child is None:
                    return False
                child.cells[entry.key] = (entry.seq, entry.value)
                for label in self.work.stagings:
                    self.node.disk.tablets[label].tokens[entry.token] = entry.result
                    self.node.disk.tablets[label].seq = max(self.node.disk.tablets[label].seq, entry.seq)
            self._seqs[number] = source.seq
        return True

    def _fence(self) -> None:
        fences = [self.node.fence(shard, self.change.id) for shard in self.work.shards]
        self._fences = [fence for fence in fences if fence is not None]
        self.phase = "fence"

    def _finish(self, sources: list[Tablet]) -> None:
        durable = self.node.disk_fences()
        if len(self._fences) < len(sources) or not all(fence in durable for fence in self._fences):
            return
        if all(map(self.node._has_drained, sources)) and self._follow(sources):
            self.sync_then_commit()

    def _believe_a_read(self) -> None:
        """What a node does that takes a read of the old state for "not applied"."""
        if self._refused_at or self.world.store.topology.shards.get(self.work.shards[0]) is None:
            return
        for fence in self._fences:
            self.node.fencing.pop(fence, None)
            self.node.disk.fences.discard(fence)
        self.phase, self._txn, self._sent_at = "follow", None, 0.0
        self._rests_until = self.world.now + 0.5
        self.node._carry_out()
