"""What the benchmark does: named mixes of operations, and which key comes next. Pure; randomness is an argument.

The ycsb-* mixes are those of Cooper and others, "Benchmarking Cloud Serving Systems with YCSB", 2010; the zipfian
generator is that of Gray and others, "Quickly Generating Billion-Record Synthetic Databases", 1994.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Literal

import xxhash

READ, UPDATE, INSERT, SCAN, MODIFY = "read", "update", "insert", "scan", "modify"
OPERATIONS = (READ, UPDATE, INSERT, SCAN, MODIFY)
SCAN_ROWS_MAX = 100
ZIPFIAN_THETA = 0.99
KEY_PREFIX = "bench:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Shares of operations in percent, and how the key of each but an insert is chosen."""

    read: int = 0
    update: int = 0
    insert: int = 0
    scan: int = 0
    modify: int = 0
    """Read the value, then write a new one."""
    keys: Literal["uniform", "zipfian", "latest"] = "uniform"

    @property
    def weights(self) -> tuple[int, ...]:
        """The shares in the order of OPERATIONS."""
        return (self.read, self.update, self.insert, self.scan, self.modify)


WORKLOADS = {
    "fill": Mix(insert=100),
    "read": Mix(read=100),
    "mixed": Mix(read=50, update=50),
    "scan": Mix(scan=100),
    "ycsb-a": Mix(read=50, update=50, keys="zipfian"),
    "ycsb-b": Mix(read=95, update=5, keys="zipfian"),
    "ycsb-c": Mix(read=100, keys="zipfian"),
    "ycsb-d": Mix(read=95, insert=5, keys="latest"),
    "ycsb-e": Mix(scan=95, insert=5, keys="zipfian"),
    "ycsb-f": Mix(read=50, modify=50, keys="zipfian"),
}


def key_of(number: int) -> str:
    """The key of record `number`, 16 bytes."""
    return f"{KEY_PREFIX}{number:010d}"


class Zipfian:
    """Numbers in [0, count), small ones far more often: the i-th with a chance of about 1 / i**theta."""

    def __init__(self, count: int) -> None:
        self._count = count
        theta = ZIPFIAN_THETA
        self._zeta = sum(1 / i**theta for i in range(1, count + 1))
        self._alpha = 1 / (1 - theta)
        first_two = 1 + 0.5**theta
        self._second = first_two
        self._eta = (1 - (2 / count) ** (1 - theta)) / (1 - first_two / self._zeta) if count > 2 else 0.0

    def pick(self, random: Random) -> int:
        chance = random.random()
        scaled = chance * self._zeta
        if scaled < 1:
            return 0
        if scaled < self._second:
            return min(1, self._count - 1)
        return min(self._count - 1, int(self._count * (self._eta * chance - self._eta + 1) ** self._alpha))


class Chooser:
    """Chooses operations and record numbers of a mix over `count` records; inserts make it grow."""

    def __init__(self, mix: Mix, count: int, random: Random) -> None:
        self.count = count
        self._mix = mix
        self._random = random
        self._loaded = count
        self._zipfian = Zipfian(max(count, 1)) if mix.keys != "uniform" else None

    def operations(self, number: int) -> list[str]:
        """The next `number` operations."""
        return self._random.choices(OPERATIONS, self._mix.weights, k=number)

    def existing(self) -> int:
        """The record to read, update or scan from."""
        if self._zipfian is None:
            return self._random.randrange(max(self.count, 1))
        rank = self._zipfian.pick(self._random)
        if self._mix.keys == "latest":
            return max(0, self.count - 1 - rank)
        return xxhash.xxh3_64_intdigest(rank.to_bytes(8, "big")) % self._loaded

    def fresh(self) -> int:
        """The record to insert."""
        self.count += 1
        return self.count - 1

    def scan_rows(self) -> int:
        """How many rows a scan asks for."""
        return self._random.randint(1, SCAN_ROWS_MAX)
