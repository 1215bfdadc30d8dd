"""The load of a storm: clients of all kinds at once, each of which knows what it may be told.

    writers     put, delete and batch on keys of their own; compared with the store whenever nobody writes
    hot keys    gets, puts, deletes and conditional writes of many on few; histories are checked for linearizability
    batches     over many shards, sent again after others have overwritten them; and many rows deleted as a range
    counters    each step is sent again, at once or much later, under the same token: it must count once
    readers     scans forward and in reverse, in pages with cursors, counts and gets over rows that nobody changes,
                among keys that others change, and rows that were deleted before: these must never be seen again

Invariant: with `faults`, calls may fail in the ways that say so; without, every call must succeed.
"""

from __future__ import annotations

import itertools
import random
import secrets
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

from shardkv import Client
from shardkv.client.connection import Connection
from shardkv.errors import OutcomeUnknown, ShardKVError
from shardkv.limits import DEFAULT_LIMITS
from shardkv.transport.address import parse_address
from shardkv.wire.hello import Identity
from shardkv.wire.messages import Kind, Op, RawReply, Token, Write, WriteReply, decode_write_reply, raw, reply_error
from tests.worlds.history import Writer
from tests.worlds.hot_keys import REFUSALS, HotKeys, check_versions
from tests.worlds.linearizability import Register, check
from tests.worlds.wired_cluster import WiredCluster

STARTS = b"09afkmpsuz"
STILL, GHOST = b"-still-", b"-ghost-"
ROWS, GHOSTS = 1_500, 300
HOT_KEYS = (b"0hot", b"a hot", b"hot", b"last hot", b"very hot", b"~")
WRITERS, READERS, LANES = 4, 2, 12
TIMEOUT_S = 20.0
PATIENCE_S = 40.0
SEND_TIMEOUT_S = 10.0
PAGE_ROWS = 97
MANY = 25


def _named(middle: bytes, count: int) -> list[bytes]:
    return [b"%c%b%05d" % (STARTS[number % len(STARTS)], middle, number) for number in range(count)]


class Worker(threading.Thread):
    """A thread that does `step` until told to stop, and keeps what it did not expect."""

    def __init__(self, name: str, *, faults: bool) -> None:
        super().__init__(daemon=True, name=name)
        self.counts: Counter[str] = Counter()
        self.surprises: list[BaseException] = []
        self.faults = faults
        self._ending = threading.Event()

    def stop(self) -> None:
        self._ending.set()

    def run(self) -> None:
        try:
            while not self._ending.is_set():
                self.step()
        except BaseException as error:
            self.surprises.append(error)
            raise

    def step(self) -> None:
        raise NotImplementedError


class Reader(Worker):
    """Reads rows that nobody changes, in every way there is."""

    def __init__(self, number: int, addresses: Sequence[str], rows: dict[bytes, bytes], *, seed: int, faults: bool):
        super().__init__(f"reader {number}", faults=faults)
        self._rng = random.Random(f"{seed} reader {number}")
        self._rows = rows
        self._keys = sorted(rows)
        self._clients = [Client([address], timeout=TIMEOUT_S) for address in addresses]
        self._clients.append(Client(list(addresses), timeout=TIMEOUT_S, direct=True))

    def step(self) -> None:
        kind = self._rng.choice((self._whole, self._range, self._pages, self._count, self._get_many))
        try:
            kind()
        except REFUSALS:
            if not self.faults:
                raise
            self.counts["read failed"] += 1
        time.sleep(self._rng.random() * 0.02)

    def _db(self) -> Client[bytes]:
        return self._rng.choice(self._clients)

    def _whole(self) -> None:
        reverse = self._rng.random() < 0.5
        self._check(list(self._db().scan(reverse=reverse)), None, None, reverse, "scan")

    def _range(self) -> None:
        reverse = self._rng.random() < 0.5
        start, stop = sorted(self._rng.sample(self._keys, 2))
        self._check(list(self._db().scan(start, stop, reverse=reverse)), start, stop, reverse, "range scan")

    def _pages(self) -> None:
        """Every page by another client."""
        reverse = self._rng.random() < 0.5
        found: list[tuple[bytes, bytes]] = []
        page = self._db().scan(limit=PAGE_ROWS, reverse=reverse)
        while True:
            found += page
            if page.cursor is None:
                break
            page = self._db().scan(cursor=page.cursor, limit=self._rng.randint(1, 5 * PAGE_ROWS))
        self._check(found, None, None, reverse, "scan in pages")

    def _count(self) -> None:
        prefix = b"%c" % self._rng.choice(STARTS) + STILL
        expected = sum(key.startswith(prefix) for key in self._keys)
        got = self._db().count(prefix=prefix)
        assert got == expected, f"{got} keys begin with {prefix!r}; all the time there were {expected}"
        self.counts["count"] += 1

    def _get_many(self) -> None:
        keys = self._rng.sample(self._keys, 50)
        found = self._db().get_many(keys)
        wrong = {key: found.get(key) for key in keys if found.get(key) != self._rows[key]}
        assert not wrong, f"rows that nobody changes read as {wrong}"
        self.counts["get_many"] += 1

    def _check(
        self, got: list[tuple[bytes, bytes]], start: bytes | None, stop: bytes | None, reverse: bool, what: str
    ) -> None:
        keys = [key for key, _ in got]
        bad = [pair for pair in itertools.pairwise(keys) if (pair[0] <= pair[1] if reverse else pair[0] >= pair[1])]
        assert not bad, f"a {what} (reverse: {reverse}) is not in order, or has keys twice: {bad[:3]}"
        inside = [key for key in self._keys if (start is None or start <= key) and (stop is None or key < stop)]
        still = dict(each for each in got if STILL in each[0])
        missed = [key for key in inside if still.get(key) != self._rows[key]]
        assert not missed, f"a {what} (reverse: {reverse}) missed {len(missed)} rows, as {missed[:3]}"
        assert len(still) == len(inside), f"a {what} has rows out of its bounds, or that never were"
        ghosts = [key for key in keys if GHOST in key]
        assert not ghosts, f"a {what} has {len(ghosts)} rows that were deleted before, as {ghosts[:3]}"
        self.counts[what] += 1
        self.counts["rows scanned"] += len(got)

    def close(self) -> None:
        for client in self._clients:
            client.close()


class Sender(Worker):
    """Sends writes under tokens of its own, through any router."""

    def __init__(self, name: str, addresses: Sequence[str], *, seed: int, faults: bool) -> None:
        super().__init__(name, faults=faults)
        self._rng = random.Random(f"{seed} {name}")
        self._addresses = list(addresses)
        self._connections: dict[str, Connection] = {}

    def send(self, write: Write, what: str) -> WriteReply | None:
        """The answer; None when it failed as it may under faults."""
        address = self._rng.choice(self._addresses)
        deadline = time.monotonic() + SEND_TIMEOUT_S
        try:
            told: object = self._connection(address, deadline).ask(Op.WRITE, raw(write), deadline)
        except (OSError, ShardKVError) as error:
            told = error
        if not isinstance(told, RawReply):
            assert self.faults, f"{what}: {told!r}"
            self._forget(address)
            return None
        if told.status:
            error = reply_error(told.payload)
            expected = (*REFUSALS, OutcomeUnknown) if self.faults else ()
            assert isinstance(error, expected), f"{what}: {error!r}"
            return None
        found: WriteReply = decode_write_reply(told.payload)
        assert self.faults or not found.problems, f"{what}: {found.problems}"
        return found if not found.problems else None

    def _connection(self, address: str, deadline: float) -> Connection:
        if address not in self._connections:
            me = Identity("client", self.name.replace(" ", "-"))
            self._connections[address] = Connection.open(
                parse_address(address), me=me, keyspace="default", limits=DEFAULT_LIMITS, deadline=deadline
            )
        return self._connections[address]

    def _forget(self, address: str) -> None:
        connection = self._connections.pop(address, None)
        if connection is not None:
            connection.close()

    def close(self) -> None:
        for address in list(self._connections):
            self._forget(address)


class Counters(Sender):
    """One lane of tokens for each counter. What a lane sent last is sent again until the lane goes on."""

    def __init__(self, addresses: Sequence[str], *, seed: int, faults: bool) -> None:
        super().__init__("counters", addresses, seed=seed, faults=faults)
        self._lanes = [(b"%c-count-%d" % (STARTS[n % len(STARTS)], n), secrets.token_bytes(16)) for n in range(LANES)]
        self.sums = dict.fromkeys((key for key, _ in self._lanes), 0)
        """What is acknowledged; the last step of a lane may be not."""
        self._open: dict[bytes, int] = {}

    def step(self) -> None:
        key, lane = self._rng.choice(self._lanes)
        if key in self._open:
            self._count(key, lane, self._open[key], again=True)
        elif self.sums[key] and self._rng.random() < 0.6:
            self._count(key, lane, self.sums[key], again=True)
            self.counts["sent again"] += 1
        else:
            self._open[key] = self.sums[key] + 1
            self._count(key, lane, self._open[key], again=False)
        time.sleep(self._rng.random() * 0.01)

    def _count(self, key: bytes, lane: bytes, number: int, *, again: bool) -> None:
        write = Write(Token(lane, number, again), None, int(Kind.INCR), [key], [b"1"], want_existed=False)
        what = f"step {number} of counter {key!r}, again: {again}"
        told = self.send(write, what)
        if told is None:
            self.counts["count failed"] += 1
            return
        assert told.number == number, f"{what}, came to {told.number}: it was made twice, or lost"
        self.counts["counted"] += 1
        self.sums[key] = number
        self._open.pop(key, None)

    def check(self, db: Client[bytes]) -> int:
        for key, total in self.sums.items():
            allowed = {total, self._open.get(key, total)}
            got = int(db.get(key) or b"0")
            assert got in allowed, f"counter {key!r} is {got}; acknowledged were {total}"
        return len(self.sums)


class Batches(Sender):
    """Batches over many shards, overwritten by another lane, then sent again: the overwritten must not come back. And
    many rows deleted as a range."""

    def __init__(self, addresses: Sequence[str], *, seed: int, faults: bool) -> None:
        super().__init__("batches", addresses, seed=seed, faults=faults)
        self._keys = [b"%c-batch" % start for start in STARTS]
        self._lanes = [secrets.token_bytes(16) for _ in range(2)]
        self._number = 0
        self._db = Client(self._addresses, timeout=TIMEOUT_S)

    @property
    def keys(self) -> list[bytes]:
        """What may be there."""
        return [*self._keys, *(key for start in STARTS for key in self._many(start))]

    def step(self) -> None:
        if self._rng.random() < 0.3:
            self._delete_range()
        else:
            self._overwrite()
        time.sleep(self._rng.random() * 0.05)

    def _overwrite(self) -> None:
        self._number += 1
        first = self._batch(0, b"first-%d" % self._number, again=False)
        second = self._batch(1, b"second-%d" % self._number, again=False)
        time.sleep(self._rng.random() * 0.5)
        if first and second and self._batch(0, b"first-%d" % self._number, again=True):
            with suppress(*(REFUSALS if self.faults else ())):
                found = self._db.get_many(self._keys)
                wrong = {key: value for key, value in found.items() if value != b"second-%d" % self._number}
                assert not wrong, f"a batch that was sent again was written again: {wrong}, batch {self._number}"
                self.counts["batches sent again"] += 1

    def _batch(self, lane: int, value: bytes, *, again: bool) -> bool:
        """Whether it is acknowledged; under faults one that is not is sent again."""
        for attempt in range(10):
            token = Token(self._lanes[lane], self._number, again or attempt > 0)
            write = Write(token, None, int(Kind.PUT), self._keys, [value] * len(self._keys), want_existed=False)
            if self.send(write, f"batch {value!r}, again: {again}") is not None:
                return True
            if self._ending.is_set():
                break
        return False

    def _delete_range(self) -> None:
        start = self._rng.choice(STARTS)
        keys = self._many(start)
        try:
            self._db.delete_range(prefix=b"%c-many-" % start)
            self._db.put_many(dict.fromkeys(keys, b"many"))
            deleted = self._db.delete_range(prefix=b"%c-many-" % start)
            left = list(self._db.scan(prefix=b"%c-many-" % start))
        except (*REFUSALS, OutcomeUnknown):
            if not self.faults:
                raise
            return
        assert not left, f"deleted as a range, and still there: {left[:3]}"
        assert deleted == len(keys) or self.faults, f"{deleted} of {len(keys)} rows were there to be deleted"
        self.counts["ranges deleted"] += 1

    def _many(self, start: int) -> list[bytes]:
        return [b"%c-many-%02d" % (start, number) for number in range(MANY)]

    def close(self) -> None:
        super().close()
        self._db.close()


class StormLoad:
    """All of it. `start`, `stop`, then `check`, as often as you like."""

    def __init__(self, world: WiredCluster, *, seed: int, faults: bool) -> None:
        self._world = world
        self._faults = faults
        self._seed = seed
        self.rows = {key: b"%d" % number * 20 for number, key in enumerate(_named(STILL, ROWS))}
        ghosts = _named(GHOST, GHOSTS)
        with world.client(timeout=TIMEOUT_S) as db:
            db.put_many(dict(list(self.rows.items())[::2]))
            db.put_many(dict(list(self.rows.items())[1::2]), ttl=3600)
            db.put_many(dict.fromkeys(ghosts, b"a ghost"))
            assert db.delete_many(ghosts[::2]) == GHOSTS // 2
            db.put_many(dict.fromkeys(ghosts[1::2], b"a ghost"), ttl=0.01)
        addresses = world.addresses
        self.writers = [Writer(number, addresses, seed=seed) for number in range(WRITERS)]
        self.hot = HotKeys(addresses, HOT_KEYS, seed=seed, threads=6, tasks=6)
        self.readers = [Reader(number, addresses, self.rows, seed=seed, faults=faults) for number in range(READERS)]
        self.counters = Counters(addresses, seed=seed, faults=faults)
        self.batches = Batches(addresses, seed=seed, faults=faults)
        self._stopped = False

    def start(self) -> None:
        for one in (*self.writers, *self.readers, self.counters, self.batches, self.hot):
            one.start()

    @property
    def surprises(self) -> list[BaseException]:
        workers = (*self.writers, *self.readers, self.counters, self.batches, self.hot)
        return [surprise for one in workers for surprise in one.surprises]

    def stop(self) -> None:
        """Let calls end. What nobody expected is raised."""
        if self._stopped:
            return
        self._stopped = True
        threads = (*self.writers, *self.readers, self.counters, self.batches)
        for one in threads:
            one.stop()
        for one in threads:
            one.join(PATIENCE_S)
            assert not one.is_alive(), "a call did not end within its timeout"
        for one in (*self.readers, self.counters, self.batches):
            one.close()
        self._raise_surprises()
        self.hot.stop()
        self._raise_surprises()

    def _raise_surprises(self) -> None:
        found = self.surprises
        if found:
            raise found[0]

    def check_histories(self) -> None:
        """Of the hot keys. Requires: stopped."""
        check_versions(self.hot.versions)
        check(self.hot.operations, Register())
        refused = sum(writer.refused for writer in self.writers)
        assert self._faults or not refused, f"{refused} writes did not outlast a change"

    def check_rows(self) -> int:
        """What is there is what was acknowledged. Requires: stopped. Returns how many keys were compared."""
        with self._world.client(timeout=TIMEOUT_S) as db:
            keys = sum(writer.check(db) for writer in self.writers) + self.counters.check(db)
            for reverse in (False, True):
                found = list(db.scan(reverse=reverse))
                self.readers[0]._check(found, None, None, reverse, "last scan")
            there = {key: value for key, value in found if STILL not in key}
            expected = {
                key for writer in self.writers for key, one in writer.expected.items() if one.settled is not None
            }
            others = there.keys() - expected - set(HOT_KEYS) - self.counters.sums.keys() - set(self.batches.keys)
            assert not others, f"keys are there that were deleted, or never written: {sorted(others)[:5]}"
            assert expected <= there.keys(), f"a scan misses {sorted(expected - there.keys())[:5]}"
        return keys + len(self.rows)

    def counts(self) -> Counter[str]:
        """What was done and checked."""
        found: Counter[str] = Counter()
        found["writes acknowledged"] = sum(writer.acknowledged for writer in self.writers)
        found["writes refused"] = sum(writer.refused for writer in self.writers)
        found["writes unknown"] = sum(writer.unknown for writer in self.writers)
        found["operations in histories"] = self.hot.counts.total()
        for one in (*self.readers, self.counters, self.batches):
            found += one.counts
        with suppress(KeyError):
            del found["last scan"]
        return found
