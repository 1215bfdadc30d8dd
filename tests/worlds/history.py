"""Load that remembers what it was told, and the check that the store still agrees.

Each writer owns its keys, so what a key may hold is known exactly: the last acknowledged value, or one of the values
whose outcome was not known since. A refusal ("not applied") is believed, so a store that applies what it refused is
caught as well.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from shardkv import Client
from shardkv.errors import OutcomeUnknown, ShardKVError

KEYS_PER_WRITER = 40


@dataclass
class Expectation:
    """What one key may hold: None stands for "not there"."""

    settled: bytes | None = None
    open: set[bytes | None] = field(default_factory=set)

    def allows(self, value: bytes | None) -> bool:
        return value == self.settled or value in self.open


class Writer(threading.Thread):
    """Puts, deletes and batches on keys of its own until told to stop. Every other one goes to the nodes directly."""

    def __init__(self, number: int, address: str | Sequence[str], seed: int, timeout_s: float = 10) -> None:
        super().__init__(daemon=True)
        self.number = number
        self.expected: dict[bytes, Expectation] = {}
        self.pair: list[tuple[bytes, bytes]] = [
            (b"{pair-%d-%d}:a" % (number, index), b"{pair-%d-%d}:b" % (number, index)) for index in range(5)
        ]
        self.acknowledged = 0
        self.refused = 0
        self.unknown = 0
        self.surprises: list[BaseException] = []
        self._rng = random.Random(seed * 1000 + number)
        self._address = address
        self._timeout_s = timeout_s
        self._ending = threading.Event()
        self._counter = 0

    def stop(self) -> None:
        self._ending.set()

    def run(self) -> None:
        try:
            with Client(self._address, timeout=self._timeout_s, direct=self.number % 2 == 1) as db:
                while not self._ending.is_set():
                    self._step(db)
        except BaseException as error:
            self.surprises.append(error)
            raise

    def _step(self, db: Client) -> None:
        self._counter += 1
        choice = self._rng.random()
        value = b"%d-%d" % (self.number, self._counter)
        if choice < 0.6:
            key = self._key()
            self._do({key: value}, lambda: db.put(key, value))
        elif choice < 0.8:
            key = self._key()
            self._do({key: None}, lambda: db.delete(key))
        else:
            a, b = self._rng.choice(self.pair)
            self._do({a: value, b: value}, lambda: db.put_many({a: value, b: value}))

    def _key(self) -> bytes:
        return b"%c-writer-%d" % (self._rng.randrange(97, 123), self.number) + b"-%d" % self._rng.randrange(
            KEYS_PER_WRITER
        )

    def _do(self, wanted: dict[bytes, bytes | None], call: object) -> None:
        expectations = [self.expected.setdefault(key, Expectation()) for key in wanted]
        try:
            call()  # type: ignore[operator]
        except OutcomeUnknown:
            self.unknown += 1
            for expectation, value in zip(expectations, wanted.values(), strict=True):
                expectation.open.add(value)
        except ShardKVError:
            self.refused += 1
        else:
            self.acknowledged += 1
            for expectation, value in zip(expectations, wanted.values(), strict=True):
                expectation.settled = value

    def check(self, db: Client) -> int:
        """Compare with the store while nobody writes; settle what was open. Returns the number of keys compared."""
        keys = list(self.expected)
        found = db.get_many(keys) if keys else {}
        for key in keys:
            value, expectation = found[key], self.expected[key]
            assert expectation.allows(value), (
                f"{key!r} holds {value!r}; acknowledged was {expectation.settled!r}, open were {expectation.open!r}"
            )
            expectation.settled, expectation.open = value, set()
        for a, b in self.pair:
            assert found.get(a) == found.get(b), f"a batch was applied by half: {a!r} and {b!r} differ"
        return len(keys)


def check_scan(db: Client, writers: Sequence[Writer]) -> None:
    """A whole scan equals everything the writers expect to be there."""
    wanted = {
        key: expectation.settled
        for writer in writers
        for key, expectation in writer.expected.items()
        if expectation.settled is not None
    }
    assert dict(db.scan()) == wanted
    assert [key for key, _ in db.scan(reverse=True)] == sorted(wanted, reverse=True)
